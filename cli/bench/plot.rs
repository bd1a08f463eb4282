//! Throughput over block size as an SVG line chart: logarithmic sizes, linear GB/s from 0, one line per series.

use std::fmt::Write;

use super::report::Point;
use crate::units::binary_size;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 110.0;
/// Colours that stay apart for colour-blind readers.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d00", "#000000"];

/// A line of the chart.
struct Series {
    label: String,
    points: Vec<(u64, f64)>,
}

/// Draws `points`; a chart with axes only when there are none.
pub fn draw(title: &str, points: &[Point]) -> String {
    let series = group(points);
    let sizes: Vec<u64> = series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
    let (low, high) = (sizes.iter().min().copied().unwrap_or(1), sizes.iter().max().copied().unwrap_or(2));
    let peak = series.iter().flat_map(|s| s.points.iter().map(|p| p.1)).fold(0.0, f64::max);
    let step = tick_step(peak);
    let top_value = step * (peak / step).ceil().max(1.0);
    let (plot_width, plot_height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let (x_low, x_high) = ((low as f64).log2() - 0.25, (high as f64).log2() + 0.25);
    let x = |size: u64| LEFT + plot_width * ((size as f64).log2() - x_low) / (x_high - x_low);
    let y = |value: f64| TOP + plot_height * (1.0 - value / top_value);

    let mut svg = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "{text}");
    };
    put(format_args!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">"#
    ));
    put(format_args!(r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##));
    put(format_args!(r##"<text x="{LEFT}" y="32" font-size="18" fill="#111111">{}</text>"##, escape(title)));
    let base = HEIGHT - BOTTOM;
    let edge = WIDTH - RIGHT;
    for tick in 0..=(top_value / step).round() as u32 {
        let value = f64::from(tick) * step;
        let at = y(value);
        put(format_args!(r##"<line x1="{LEFT}" y1="{at:.1}" x2="{edge}" y2="{at:.1}" stroke="#dddddd"/>"##));
        let (to, line) = (LEFT - 8.0, at + 5.0);
        let label = format!("{:.*}", decimals(step), value);
        put(format_args!(r##"<text x="{to}" y="{line:.1}" text-anchor="end" fill="#333333">{label}</text>"##));
    }
    let mut ticks = sizes;
    ticks.sort_unstable();
    ticks.dedup();
    let every = ticks.len().div_ceil(10);
    for size in ticks.iter().step_by(every.max(1)) {
        let at = x(*size);
        let (below, line) = (base + 6.0, base + 24.0);
        put(format_args!(r##"<line x1="{at:.1}" y1="{base}" x2="{at:.1}" y2="{below}" stroke="#333333"/>"##));
        let label = binary_size(*size);
        put(format_args!(r##"<text x="{at:.1}" y="{line}" text-anchor="middle" fill="#333333">{label}</text>"##));
    }
    put(format_args!(r##"<line x1="{LEFT}" y1="{base}" x2="{edge}" y2="{base}" stroke="#333333"/>"##));
    put(format_args!(r##"<line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{base}" stroke="#333333"/>"##));
    let middle = (LEFT + edge) / 2.0;
    let line = base + 46.0;
    put(format_args!(r##"<text x="{middle}" y="{line}" text-anchor="middle" fill="#333333">block size</text>"##));
    let line = TOP - 12.0;
    put(format_args!(r##"<text x="{LEFT}" y="{line}" text-anchor="end" fill="#333333">GB/s</text>"##));
    let mut legend_x = LEFT;
    let mut legend_y = base + 74.0;
    for (number, one) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let path: Vec<String> = one.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let path = path.join(" ");
        put(format_args!(r#"<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>"#));
        for (size, value) in &one.points {
            let (cx, cy) = (x(*size), y(*value));
            let hover = format!("{}: {value:.2} GB/s", binary_size(*size));
            put(format_args!(
                r#"<circle cx="{cx:.1}" cy="{cy:.1}" r="4" fill="{colour}"><title>{hover}</title></circle>"#
            ));
        }
        let width = 46.0 + 7.6 * one.label.chars().count() as f64;
        if legend_x + width > edge && legend_x > LEFT {
            legend_x = LEFT;
            legend_y += 20.0;
        }
        let (to, line, text_at) = (legend_x + 24.0, legend_y - 5.0, legend_x + 30.0);
        put(format_args!(
            r#"<line x1="{legend_x}" y1="{line}" x2="{to}" y2="{line}" stroke="{colour}" stroke-width="3"/>"#
        ));
        put(format_args!(
            r##"<text x="{text_at}" y="{legend_y}" fill="#111111">{}</text>"##,
            escape(&one.label)
        ));
        legend_x += width;
    }
    put(format_args!("</svg>"));
    svg
}

fn group(points: &[Point]) -> Vec<Series> {
    let many = |of: fn(&Point) -> u32| points.iter().any(|p| of(p) != points.first().map_or(0, of));
    let (batches, threads) = (many(|p| p.batch_size), many(|p| p.threads));
    let mut series: Vec<Series> = Vec::new();
    for point in points {
        let mut label = format!("{} over {}", point.operation, point.transport);
        if batches {
            label += &format!(", batch {}", point.batch_size);
        }
        if threads {
            label += &format!(", {} threads", point.threads);
        }
        let index = series.iter().position(|s| s.label == label).unwrap_or_else(|| {
            series.push(Series { label, points: Vec::new() });
            series.len() - 1
        });
        series[index].points.push((point.block_size.max(1), point.gb_per_s));
    }
    series.iter_mut().for_each(|s| s.points.sort_by_key(|p| p.0));
    series
}

/// The step of 1, 2 or 5 times a power of ten that gives four to eight ticks up to `peak`.
fn tick_step(peak: f64) -> f64 {
    if peak.is_nan() || peak <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf((peak / 4.0).log10().floor());
    let steps = [power, 2.0 * power, 5.0 * power, 10.0 * power];
    steps.into_iter().find(|step| peak / step <= 8.0).unwrap_or(10.0 * power)
}

fn decimals(step: f64) -> usize {
    (-step.log10().floor()).max(0.0) as usize
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_round() {
        for peak in [0.001, 0.037, 0.9, 1.0, 3.3, 7.9, 12.0, 99.0, 1234.0] {
            let count = peak / tick_step(peak);
            assert!((1.5..=8.0).contains(&count), "{count} ticks up to {peak}");
        }
        assert_eq!(tick_step(0.0), 1.0);
        assert_eq!((decimals(0.5), decimals(0.02), decimals(2.0)), (1, 2, 0));
    }

    #[test]
    fn an_empty_chart_is_still_a_chart() {
        let svg = draw("<none>", &[]);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("&lt;none&gt;"));
    }
}
