//! Throughput over block size as an SVG line chart: logarithmic sizes, linear GB/s from 0, one line per series.

use std::fmt::Write;

use super::report::Point;
use crate::units::binary_size;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 70.0;
/// Right edge of the plotting area.
const EDGE: f64 = WIDTH - 30.0;
const TOP: f64 = 70.0;
/// Lower edge of the plotting area; labels and legend are below.
const BASE: f64 = HEIGHT - 120.0;
/// Most labels on the axis of sizes.
const MAX_SIZE_LABELS: usize = 12;
/// Colours that stay apart for colour-blind readers.
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d00", "#000000"];

/// Draws `points`; a chart with axes only when there are none.
pub fn draw(title: &str, points: &[Point]) -> String {
    let series = group(points);
    let axes = Axes::around(&series);
    let mut svg = Svg::default();
    svg.tag(format_args!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="14">"#
    ));
    svg.tag(format_args!(r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##));
    svg.tag(format_args!(r##"<text x="{LEFT}" y="30" font-size="18" fill="#111111">{}</text>"##, escape(title)));
    axes.draw(&mut svg);
    for (one, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        one.draw(&axes, colour, &mut svg);
    }
    draw_legend(&series, &mut svg);
    svg.tag(format_args!("</svg>"));
    svg.text
}

/// Tags, one a line.
#[derive(Default)]
struct Svg {
    text: String,
}

impl Svg {
    fn tag(&mut self, tag: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{tag}");
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.tag(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{stroke}" stroke-width="{width}"/>"#
        ));
    }

    fn label(&mut self, at: (f64, f64), anchor: &str, text: &str) {
        let ((x, y), text) = (at, escape(text));
        self.tag(format_args!(r##"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" fill="#222222">{text}</text>"##));
    }
}

/// Scales, and what is written along them.
struct Axes {
    sizes: Vec<u64>,
    log_low: f64,
    log_high: f64,
    step: f64,
    ticks: u32,
}

impl Axes {
    fn around(series: &[Series]) -> Self {
        let mut sizes: Vec<u64> = series.iter().flat_map(|one| one.points.iter().map(|point| point.0)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let log = |size: Option<&u64>, otherwise: f64| size.map_or(otherwise, |size| (*size as f64).log2());
        let peak = series.iter().flat_map(|one| one.points.iter().map(|point| point.1)).fold(0.0, f64::max);
        let step = tick_step(peak);
        let ticks = (peak / step).ceil().max(1.0) as u32;
        let (log_low, log_high) = (log(sizes.first(), 0.0) - 0.3, log(sizes.last(), 1.0) + 0.3);
        Axes { sizes, log_low, log_high, step, ticks }
    }

    fn x(&self, size: u64) -> f64 {
        LEFT + (EDGE - LEFT) * ((size as f64).log2() - self.log_low) / (self.log_high - self.log_low)
    }

    fn y(&self, value: f64) -> f64 {
        BASE - (BASE - TOP) * value / (self.step * f64::from(self.ticks))
    }

    fn draw(&self, svg: &mut Svg) {
        for tick in 0..=self.ticks {
            let value = f64::from(tick) * self.step;
            let at = self.y(value);
            svg.line((LEFT, at), (EDGE, at), "#dddddd", 1.0);
            svg.label((LEFT - 8.0, at + 5.0), "end", &format!("{value:.*}", decimals(self.step)));
        }
        let every = self.sizes.len().div_ceil(MAX_SIZE_LABELS).max(1);
        for size in self.sizes.iter().step_by(every) {
            let at = self.x(*size);
            svg.line((at, BASE), (at, BASE + 6.0), "#333333", 1.0);
            svg.label((at, BASE + 22.0), "middle", &binary_size(*size));
        }
        svg.line((LEFT, BASE), (EDGE, BASE), "#333333", 1.0);
        svg.line((LEFT, TOP), (LEFT, BASE), "#333333", 1.0);
        svg.label(((LEFT + EDGE) / 2.0, BASE + 46.0), "middle", "block size");
        svg.label((LEFT - 8.0, TOP - 16.0), "end", "GB/s");
    }
}

/// A line of the chart.
struct Series {
    label: String,
    points: Vec<(u64, f64)>,
}

impl Series {
    fn draw(&self, axes: &Axes, colour: &str, svg: &mut Svg) {
        let places: Vec<(f64, f64)> = self.points.iter().map(|(size, value)| (axes.x(*size), axes.y(*value))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        svg.tag(format_args!(r#"<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>"#));
        for ((x, y), (size, value)) in places.iter().zip(&self.points) {
            let hover = format!("{}: {value:.3} GB/s", binary_size(*size));
            svg.tag(format_args!(
                r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"><title>{hover}</title></circle>"#
            ));
        }
    }
}

/// One line per operation and transport, and per batch size and thread count where there are several.
fn group(points: &[Point]) -> Vec<Series> {
    let varies = |of: fn(&Point) -> u32| points.windows(2).any(|pair| of(&pair[0]) != of(&pair[1]));
    let (batches, threads) = (varies(|point| point.batch_size), varies(|point| point.threads));
    let mut series: Vec<Series> = Vec::new();
    for point in points {
        let mut label = format!("{} over {}", point.operation, point.transport);
        if batches {
            label += &format!(", batch {}", point.batch_size);
        }
        if threads {
            label += &format!(", {} threads", point.threads);
        }
        let place = (point.block_size.max(1), point.gb_per_s);
        match series.iter_mut().find(|one| one.label == label) {
            Some(one) => one.points.push(place),
            None => series.push(Series { label, points: vec![place] }),
        }
    }
    series.iter_mut().for_each(|one| one.points.sort_by_key(|point| point.0));
    series
}

fn draw_legend(series: &[Series], svg: &mut Svg) {
    let (mut x, mut y) = (LEFT, BASE + 74.0);
    for (one, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let width = 50.0 + 7.6 * one.label.chars().count() as f64;
        if x > LEFT && x + width > EDGE {
            (x, y) = (LEFT, y + 20.0);
        }
        svg.line((x, y - 5.0), (x + 24.0, y - 5.0), colour, 3.0);
        svg.label((x + 30.0, y), "start", &one.label);
        x += width;
    }
}

/// The step of 1, 2 or 5 times a power of ten that gives two to eight ticks up to `peak`.
fn tick_step(peak: f64) -> f64 {
    if peak.is_nan() || peak <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf((peak / 8.0).log10().floor());
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

    #[test]
    fn points_of_one_operation_and_transport_are_one_line() {
        let point = |operation: &str, block_size, gb_per_s| Point {
            operation: operation.to_owned(),
            transport: "tcp".to_owned(),
            block_size,
            gb_per_s,
            ..Point::default()
        };
        let points = [point("write", 65536, 3.0), point("read", 4096, 1.0), point("write", 4096, 0.5)];
        let svg = draw("sizes", &points);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("write over tcp") && svg.contains("64 KiB") && !svg.contains("batch"));
    }
}
