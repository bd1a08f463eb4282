"""SVG charts of the benchmarks: a row per case with a mark per side, and lines over a count.

Numbers are medians; the thin line through a mark spans the smallest and the largest run. Axes are logarithmic, because
the cases span three decades.
"""

import math
from xml.sax.saxutils import escape

COLOURS = ["#0a6ebd", "#d1603d", "#5b8c3e", "#8a6bbf", "#777777"]
FONT = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\""
INK, FAINT, GRID = "#1c2733", "#5c6b7a", "#e3e8ee"


def number(value):
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else f"{round(value):,}".replace(",", " ")


class LogAxis:
    """Positions on a logarithmic axis whose ends are powers of ten, or 1-2-5 steps of them."""

    def __init__(self, values, begin, end):
        positive = [value for value in values if value > 0] or [1.0]
        steps = [factor * 10.0**power for power in range(-6, 10) for factor in (1, 2, 5)]
        self.low = max([step for step in steps if step <= min(positive) * 0.95] or [steps[0]])
        self.high = min([step for step in steps if step >= max(positive) * 1.05] or [steps[-1]])
        self.begin, self.end = begin, end
        inside = [step for step in steps if self.low <= step <= self.high]
        self.ticks = inside if len(inside) <= 9 else [step for step in inside if abs(math.log10(step) % 1) < 1e-9]

    def at(self, value):
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)


def _text(x, y, content, anchor="start", fill=INK, points=13, weight="normal"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{points}" '
            f'font-weight="{weight}">{escape(content)}</text>')


def _frame(width, height, title, subtitle, parts):
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {FONT}>', f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(24, 32, title, points=18, weight="600"), _text(24, 54, subtitle, fill=FAINT),
    ]
    return "\n".join(head + parts + ["</svg>", ""])


def _legend(names, x, y):
    parts = []
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<circle cx="{x + 6}" cy="{y - 4}" r="5.5" fill="{colour}"/>')
        parts.append(_text(x + 18, y, name))
        x += 34 + 7.6 * len(name)
    return parts


def rows(title, subtitle, unit, names, cases):
    """One row per case. `cases` is a list of (label, {name: (median, low, high)}, note at the right)."""
    width, left, right, top, step = 940, 250, 190, 112, 34
    bottom = top + step * len(cases)
    values = [value for _, sides, _ in cases for triple in sides.values() for value in triple]
    axis = LogAxis(values, left, width - right)
    parts = _legend(names, 24, 82)
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{top - 10}" x2="{x:.1f}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 20, number(tick), "middle", FAINT, 12))
    parts.append(_text((left + width - right) / 2, bottom + 42, unit, "middle", FAINT, 12))
    for index, (label, sides, note) in enumerate(cases):
        y = top + step * index + step / 2 - 5
        parts.append(_text(left - 16, y + 4, label, "end"))
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="{GRID}"/>')
        for place, name in enumerate(names):
            if name not in sides:
                continue
            median, low, high = sides[name]
            colour = COLOURS[place % len(COLOURS)]
            shift = (place - (len(names) - 1) / 2) * 5
            parts.append(f'<line x1="{axis.at(low):.1f}" y1="{y + shift:.1f}" x2="{axis.at(high):.1f}" '
                         f'y2="{y + shift:.1f}" stroke="{colour}" stroke-width="2" stroke-opacity="0.55"/>')
            parts.append(f'<circle cx="{axis.at(median):.1f}" cy="{y + shift:.1f}" r="5.5" fill="{colour}">'
                         f"<title>{escape(name)}: {number(median)} {escape(unit)}</title></circle>")
        parts.append(_text(width - right + 14, y + 4, note, fill=INK, points=12))
    return _frame(width, bottom + 58, title, subtitle, parts)


def lines(title, subtitle, x_label, y_label, series):
    """Lines over a count. `series` is {name: [(x, (median, low, high))]}."""
    width, height, left, right, top, bottom = 760, 430, 84, 150, 104, 370
    across = LogAxis([x for points in series.values() for x, _ in points], left, width - right)
    up = LogAxis([value for points in series.values() for _, triple in points for value in triple], bottom, top)
    parts = _legend(list(series), 24, 82)
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 10, y + 4, number(tick), "end", FAINT, 12))
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="{FAINT}"/>')
        parts.append(_text(x, bottom + 20, number(tick), "middle", FAINT, 12))
    parts.append(_text((left + width - right) / 2, bottom + 42, x_label, "middle", FAINT, 12))
    parts.append(f'<text transform="translate(22 {(top + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle" '
                 f'fill="{FAINT}" font-size="12">{escape(y_label)}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{across.at(x):.1f},{up.at(triple[0]):.1f}" for x, triple in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, (median, low, high) in points:
            at = across.at(x)
            parts.append(f'<line x1="{at:.1f}" y1="{up.at(low):.1f}" x2="{at:.1f}" y2="{up.at(high):.1f}" '
                         f'stroke="{colour}" stroke-width="2" stroke-opacity="0.5"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{up.at(median):.1f}" r="4.5" fill="{colour}"/>')
        last_x, last = points[-1]
        parts.append(_text(across.at(last_x) + 12, up.at(last[0]) + 4, f"{number(last[0])} at {number(last_x)}", fill=colour, points=12))
    return _frame(width, height, title, subtitle, parts)
