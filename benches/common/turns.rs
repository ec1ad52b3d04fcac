//! Two sides that take turns in one run, and the table of their ratios.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Instant;

/// Turns of each side.
const PAIRS: usize = 15;

pub fn seconds(run: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// A line of the table: the two sides' medians, and the median of their ratios.
struct Line {
    name: String,
    seconds: [f64; 2],
    ratio: f64,
}

pub struct Turns {
    /// Whether it is only tried whether everything runs.
    pub quick: bool,
    pub pairs: usize,
    /// The rows to run: those whose name holds one of these, or all.
    filters: Vec<String>,
    lines: Vec<Line>,
}

impl Turns {
    pub fn from_args() -> Self {
        // `cargo test --benches` passes `--test`, `cargo bench` passes `--bench`.
        let (options, filters): (Vec<String>, _) =
            std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
        let quick = options.iter().any(|option| option == "--test");
        Self { quick, pairs: if quick { 1 } else { PAIRS }, filters, lines: Vec::new() }
    }

    /// Whether a row is asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter))
    }

    /// Prints the table, with the names of the two sides.
    pub fn print(&self, [one, other]: [&str; 2]) {
        println!("\n{} threads, {} pairs in turn\n", rayon::current_num_threads(), self.pairs);
        println!("| case | {one} | {other} | ratio |");
        println!("|---|---:|---:|---:|");
        for Line { name, seconds: [one, other], ratio } in &self.lines {
            println!("| {name} | {:.2} ms | {:.2} ms | {ratio:.2} |", one * 1e3, other * 1e3);
        }
    }

    /// Runs `one`, which does `work` times what `other` does, and `other` in turn. The ratio is of
    /// their times for as much work.
    pub fn compare(&mut self, name: &str, one: &mut dyn FnMut(), other: &mut dyn FnMut(), work: f64) {
        let style = ProgressStyle::with_template("{msg:48} {wide_bar} {pos}/{len}");
        let bar = ProgressBar::new(self.pairs as u64 + 1).with_style(style.unwrap());
        bar.set_message(name.to_string());
        one();
        other();
        bar.inc(1);
        let (mut ones, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.pairs {
            let pair = [seconds(one), seconds(other)];
            ones.push(pair[0]);
            others.push(pair[1]);
            ratios.push(pair[0] / pair[1] / work);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let (seconds, ratio) = ([median(ones), median(others)], median(ratios));
        self.lines.push(Line { name: name.into(), seconds, ratio });
    }
}
