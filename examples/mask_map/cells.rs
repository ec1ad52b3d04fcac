//! Cells of a picture, and what is drawn of them.

use std::fmt::Write as _;

/// A rectangle of cells: column, row, columns, rows.
pub type Rectangle = [usize; 4];

pub fn area(rectangles: &[Rectangle]) -> usize {
    rectangles.iter().map(|[_, _, columns, rows]| columns * rows).sum()
}

/// Joins cells, given as rows of ascending columns, into runs, and runs of following rows that are
/// the same.
pub fn rectangles(rows: impl Iterator<Item = (usize, Vec<usize>)>) -> Vec<Rectangle> {
    let mut all: Vec<Rectangle> = Vec::new();
    let mut open: Vec<usize> = Vec::new(); // rectangles of the row before
    for (row, columns) in rows {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for column in columns {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == column => *len += 1,
                _ => runs.push((column, 1)),
            }
        }
        open = runs
            .into_iter()
            .map(|(start, len)| {
                let above = |&i: &usize| {
                    let [x, y, columns, rows] = all[i];
                    (x, y + rows, columns) == (start, row, len)
                };
                if let Some(i) = open.iter().copied().find(above) {
                    all[i][3] += 1;
                    i
                } else {
                    all.push([start, row, len, 1]);
                    all.len() - 1
                }
            })
            .collect();
    }
    all
}

/// The outline of rectangles.
pub fn path(rectangles: &[Rectangle]) -> String {
    let mut path = String::new();
    for [x, y, columns, rows] in rectangles {
        let _ = write!(path, "M{x} {y}h{columns}v{rows}h-{columns}z");
    }
    path
}

/// The white lines between some columns and some rows.
pub fn lines(
    columns: impl Iterator<Item = usize>,
    rows: impl Iterator<Item = usize>,
    size: [usize; 2],
) -> String {
    let [width, height] = size;
    let mut path = String::new();
    for x in columns {
        let _ = write!(path, "M{x} 0v{height}");
    }
    for y in rows {
        let _ = write!(path, "M0 {y}h{width}");
    }
    path
}

pub fn text(svg: &mut String, (x, y): (f64, f64), style: &str, words: &str) {
    if !words.is_empty() {
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" {style}>{words}</text>"#);
    }
}
