"""Cases, ratios and the Markdown reports of the benchmarks.

A case is one setting measured on every side in turn, several rounds over. Round i of one side is compared with round i of
the other, so that what else the machine did in that minute weighs on both; the median of those ratios is the result.
"""

import os
import statistics
import time

import chart
import lab
from chart import number

OURS = "Tidewire"


class Case:
    """One setting: `runs` maps a side to its runs in order, each a dict of metrics."""

    def __init__(self, label, metric, goal, runs, unit="GB/s", higher_is_better=True, cpu_goal=None, only=None,
                 ours=OURS):
        self.label, self.metric, self.goal, self.runs, self.unit = label, metric, goal, runs, unit
        self.higher_is_better, self.cpu_goal = higher_is_better, cpu_goal
        self.ours = ours
        self._peers = only or [name for name in runs if not name.startswith(OURS)]

    def values(self, side, metric=None):
        return [run[metric or self.metric] for run in self.runs[side]]

    def peer(self):
        """The strongest peer by its median."""
        best = max if self.higher_is_better else min
        return best(self._peers, key=lambda name: statistics.median(self.values(name)))

    def ratios(self, metric=None):
        """Ours to the strongest peer, round by round."""
        pairs = zip(self.values(self.ours, metric), self.values(self.peer(), metric))
        return [ours / peer for ours, peer in pairs if peer > 0]

    def met(self):
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        ratio = statistics.median(self.ratios())
        return ratio >= self.goal if self.higher_is_better else ratio <= self.goal

    def cpu_met(self):
        if self.cpu_goal is None:
            return None
        return statistics.median(self.ratios("cpu_s_per_gb")) <= self.cpu_goal


def spread(values):
    median, low, high = lab.summary(values)
    return f"{number(median)} ({number(low)}–{number(high)})"


def _verdict(met):
    return {None: "", True: "yes", False: "**no**"}[met]


def _sides(cases):
    return list(dict.fromkeys(name for case in cases for name in case.runs))


def throughput_table(cases):
    """Rows of the main metric, with every side, the ratio and the goal."""
    sides = _sides(cases)
    units = list(dict.fromkeys(case.unit for case in cases))
    lines = ["| case | " + " | ".join(sides) + " | ratio | goal | met |", "|---|" + "---:|" * (len(sides) + 2) + "---|"]
    for case in cases:
        cells = [spread(case.values(side)) if side in case.runs else "" for side in sides]
        ratio, goal = spread(case.ratios()) + " ×", ""
        if case.goal is not None:
            goal = ("≥ " if case.higher_is_better else "≤ ") + number(case.goal) + " ×"
        unit = f", {case.unit}" if len(units) > 1 else ""
        lines.append(f"| {case.label}{unit} | " + " | ".join(cells) + f" | {ratio} | {goal} | {_verdict(case.met())} |")
    return lines


def cpu_table(cases):
    """Rows of CPU seconds per GB, initiator and target together."""
    cases = [case for case in cases if case.metric == "gb_per_s" and all("cpu_s_per_gb" in run for runs in case.runs.values() for run in runs)]
    if not cases:
        return []
    sides = _sides(cases)
    lines = ["", "CPU seconds per GB, both processes together:", "",
             "| case | " + " | ".join(sides) + " | ratio | goal | met |", "|---|" + "---:|" * (len(sides) + 2) + "---|"]
    for case in cases:
        cells = [spread(case.values(side, "cpu_s_per_gb")) if side in case.runs else "" for side in sides]
        ratio = spread(case.ratios("cpu_s_per_gb")) + " ×"
        goal = f"≤ {number(case.cpu_goal)} ×" if case.cpu_goal is not None else ""
        lines.append(f"| {case.label} | " + " | ".join(cells) + f" | {ratio} | {goal} | {_verdict(case.cpu_met())} |")
    return lines


def header(title, method, rounds, command):
    """What a number needs to be quoted: machine, command, date, commit, rounds and the noise beside it."""
    shares = lab.Foreign.shares
    noise = "not recorded"
    if shares:
        noise = f"{100 * statistics.median(shares):.0f} % of the machine in the median run, {100 * max(shares):.0f} % in the worst"
    return [
        f"# {title}", "", *method, "",
        f"* machine: {lab.machine()}", f"* date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, commit {lab.commit()}",
        f"* command: `{command}`",
        f"* {rounds} rounds, every side in turn in each; median (smallest–largest); ratios are medians of the rounds' ratios",
        f"* other processes used {noise}; a round with more than {100 * lab.NOISE_LIMIT:.0f} % is taken again, twice at most", "",
    ]


class Writer:
    """Writes the files of one report: `<date>-<what>.md` and its charts."""

    def __init__(self, folder, what):
        self.stem = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{what}"
        self.folder = folder
        os.makedirs(folder, exist_ok=True)

    def write(self, suffix, text):
        path = os.path.join(self.folder, self.stem + suffix)
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
        print(f"wrote {os.path.relpath(path, lab.ROOT)}", flush=True)

    def picture(self, suffix):
        """The Markdown of a chart that `write` put beside the report."""
        return f"![chart]({self.stem}{suffix})"


def comparison(writer, title, method, rounds, command, cases, subtitle):
    """A whole report of cases with one chart per unit."""
    lines = header(title, method, rounds, command) + throughput_table(cases) + cpu_table(cases) + [""]
    for unit in dict.fromkeys(case.unit for case in cases):
        chosen = [case for case in cases if case.unit == unit]
        suffix = ".svg" if unit == cases[0].unit else "-latency.svg"
        sides = sorted(_sides(chosen), key=lambda side: not side.startswith(OURS))
        drawn = [(case.label, {side: lab.summary(case.values(side)) for side in case.runs}, _note(case)) for case in chosen]
        writer.write(suffix, chart.rows(title, subtitle, unit, sides, drawn))
        lines += [writer.picture(suffix), ""]
    writer.write(".md", "\n".join(lines))


def _note(case):
    note = f"{number(statistics.median(case.ratios()))} ×"
    if case.goal is not None:
        note += f"  (goal {'≥' if case.higher_is_better else '≤'} {number(case.goal)})"
    return note
