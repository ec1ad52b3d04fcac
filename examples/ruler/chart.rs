//! Line charts as SVG.

use std::fmt::Write as _;

/// A chart of some series over a logarithmic axis.
pub struct Chart<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// Whether `y` is logarithmic as well; otherwise it starts at 0.
    pub log_y: bool,
    pub series: Vec<Series>,
}

/// One line.
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
    /// What was reckoned, not measured.
    pub dashed: bool,
}

/// A point with its interval.
#[derive(Clone, Copy)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

/// One colour for each line, told apart also by readers who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00"];
/// Pixels: the plot's area, and the margins around it.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;
const LEGEND_LINE: f64 = 18.0;

impl Chart<'_> {
    /// The picture, or `None` without points.
    pub fn svg(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let least = |value: fn(&Point) -> f64| points().map(value).min_by(f64::total_cmp);
        let most = |value: fn(&Point) -> f64| points().map(value).max_by(f64::total_cmp);
        let x = Axis::log(least(|point| point.x)?, most(|point| point.x)?, 2.0);
        let y = if self.log_y {
            Axis::log(least(|point| point.low)?, most(|point| point.high)?, 10.0)
        } else {
            Axis::linear(most(|point| point.high)?)
        };
        let to_x = |value| LEFT + WIDTH * x.place(value);
        let to_y = |value| TOP + HEIGHT * (1.0 - y.place(value));
        let (width, height) =
            (LEFT + WIDTH + 20.0, TOP + HEIGHT + BOTTOM + LEGEND_LINE * self.series.len() as f64);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
            self.title
        );
        let mut line = |text: std::fmt::Arguments<'_>| {
            // Writing to a string does not fail.
            let _ = svg.write_fmt(format_args!("{text}\n"));
        };
        for tick in x.ticks() {
            let (at, bottom) = (to_x(tick), TOP + HEIGHT);
            line(format_args!("<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#dddddd\"/>"));
            line(format_args!(
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                short(tick)
            ));
        }
        for tick in y.ticks() {
            let (at, right) = (to_y(tick), LEFT + WIDTH);
            line(format_args!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#dddddd\"/>"));
            line(format_args!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                at + 4.0,
                short(tick)
            ));
        }
        let (middle, below) = (LEFT + WIDTH / 2.0, TOP + HEIGHT + 36.0);
        line(format_args!("<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{}</text>", self.x));
        let centre = TOP + HEIGHT / 2.0;
        line(format_args!(
            "<text transform=\"translate(16 {centre}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            self.y
        ));
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let dash = if series.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
            let path: Vec<String> = series
                .points
                .iter()
                .map(|point| format!("{:.1} {:.1}", to_x(point.x), to_y(point.y)))
                .collect();
            line(format_args!(
                "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
                path.join("L")
            ));
            for point in &series.points {
                let (at, low, high) = (to_x(point.x), to_y(point.low), to_y(point.high));
                line(format_args!("<path d=\"M{at:.1} {low:.1}V{high:.1}\" stroke=\"{colour}\"/>"));
                line(format_args!(
                    "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    to_y(point.y)
                ));
            }
            let at = TOP + HEIGHT + BOTTOM + LEGEND_LINE * index as f64;
            line(format_args!("<path d=\"M{LEFT} {at}h28\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>"));
            line(format_args!("<text x=\"{}\" y=\"{}\">{}</text>", LEFT + 36.0, at + 4.0, series.name));
        }
        svg.push_str("</svg>\n");
        Some(svg)
    }
}

/// A range of values, from 0 to 1 along an axis.
struct Axis {
    low: f64,
    high: f64,
    /// Of a logarithmic axis: the ratio of neighbouring ticks.
    base: Option<f64>,
}

impl Axis {
    fn log(low: f64, high: f64, base: f64) -> Self {
        let power = |value: f64| value.max(f64::MIN_POSITIVE).log(base);
        let (low, high) = (power(low), power(high));
        // Whole decades look right; lengths need none.
        let (low, high) = if base == 10.0 { (low.floor(), high.ceil()) } else { (low, high) };
        let high = if high > low { high } else { low + 1.0 };
        Self { low: base.powf(low), high: base.powf(high), base: Some(base) }
    }

    fn linear(high: f64) -> Self {
        // The next of 1, 2, 5 times a power of ten.
        let unit = 10f64.powf(high.max(f64::MIN_POSITIVE).log10().floor());
        let top = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|times| times * unit)
            .find(|&top| top >= high * (1.0 - 1e-9));
        Self { low: 0.0, high: top.unwrap_or(high), base: None }
    }

    fn place(&self, value: f64) -> f64 {
        let part = match self.base {
            Some(_) => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            None => (value - self.low) / (self.high - self.low),
        };
        part.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.base {
            Some(base) => {
                let powers = self.low.log(base).ceil() as i32..=(self.high.log(base) + 1e-9).floor() as i32;
                powers.map(|power| base.powi(power)).collect()
            }
            None => (0..=5).map(|step| self.high * f64::from(step) / 5.0).collect(),
        }
    }
}

/// `512`, `16K`, `1M`; small numbers as they are.
fn short(value: f64) -> String {
    for (unit, name) in [(1048576.0, "M"), (1024.0, "K")] {
        if value >= unit && value % unit == 0.0 {
            return format!("{}{name}", value / unit);
        }
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
