//! Charts of accuracy: over the context's length, or over the one extent that a sweep is of.

use super::chart::{Chart, Point, Series};
use super::report::Row;
use super::setting::{Setting, Star};

/// Accuracy of all tasks together (of the task, if there is one), as SVG: over lengths, a line for
/// each setting; or for one length over the blocks or anchors of `settings`, with dense attention
/// and star without an anchor as lines across. `None` without points.
pub fn accuracy(rows: &[Row], settings: &[Setting]) -> Option<String> {
    let one = rows.iter().all(|row| row.task.is_some());
    let rows: Vec<&Row> = rows.iter().filter(|row| one || row.task.is_none()).collect();
    let (x, series) = match rows.first().and_then(|row| swept(settings, row.len)) {
        Some((name, places)) if rows.iter().all(|row| row.len == rows[0].len) => {
            (name, sweep(&rows, &places))
        }
        _ => ("tokens", over_lengths(&rows)),
    };
    Chart { title: if one { "Accuracy" } else { "Accuracy, all tasks" }, x, y: "%", log_y: false, series }
        .svg()
}

/// What settings differ in, if it is the blocks or the anchors alone; and each one's tokens of it.
fn swept(settings: &[Setting], len: usize) -> Option<(&'static str, Vec<(String, usize)>)> {
    let stars = settings.iter().filter_map(|setting| match setting {
        Setting::Star(star) => Some((setting.to_string(), *star)),
        Setting::Dense => None,
    });
    let stars: Vec<(String, Star)> = stars.collect();
    let first = stars.first()?.1;
    let same = |part: fn(&Star, &Star) -> bool| stars.iter().all(|(_, star)| part(star, &first));
    if stars.len() < 2
        || !same(|star, first| (star.ranks, star.anchor_block) == (first.ranks, first.anchor_block))
    {
        return None;
    }
    let same_block = same(|star, first| star.block == first.block);
    let same_anchor = same(|star, first| star.anchor == first.anchor);
    let name = match (same_block, same_anchor) {
        (true, false) => "tokens of the anchor",
        (false, true) => "tokens of a block",
        _ => return None,
    };
    let tokens = |star: &Star| {
        let block = star.block.of(len);
        if same_block { star.anchor.of(block) } else { block }
    };
    Some((name, stars.iter().map(|(name, star)| (name.clone(), tokens(star))).collect()))
}

fn point(row: &Row, x: f64) -> Point {
    let [y, low, high] = [row.accuracy.value, row.accuracy.low, row.accuracy.high].map(|share| 100.0 * share);
    Point { x, y, low, high }
}

fn over_lengths(rows: &[&Row]) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let point = point(row, row.len as f64);
        match series.iter_mut().find(|series| series.name == row.setting) {
            Some(series) => series.points.push(point),
            None => {
                let dashed = row.setting == "dense";
                series.push(Series { name: row.setting.clone(), points: vec![point], dashed });
            }
        }
    }
    series
}

fn sweep(rows: &[&Row], places: &[(String, usize)]) -> Vec<Series> {
    let place =
        |row: &Row| places.iter().find(|(name, _)| *name == row.setting).map_or(0, |(_, tokens)| *tokens);
    // Zero tokens have no place on a logarithmic axis.
    let (points, across): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| place(row) > 0);
    let mut points: Vec<Point> = points.iter().map(|row| point(row, place(row) as f64)).collect();
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    let lines = across.iter().map(|row| Series {
        name: row.setting.clone(),
        points: points.iter().map(|at| point(row, at.x)).collect(),
        dashed: true,
    });
    let mut series: Vec<Series> = lines.collect();
    series.push(Series { name: "star".to_owned(), points, dashed: false });
    series
}
