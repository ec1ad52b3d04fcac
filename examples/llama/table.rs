//! Aligned text tables.

/// Lines with every column as wide as its widest cell, the first row being the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| Some(row.get(column)?.chars().count())).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    let (heading, rest) = rows.split_at(rows.len().min(1));
    heading.iter().chain(std::iter::once(&rule)).chain(rest).map(line).collect()
}

/// Bytes with a binary unit.
pub fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..4).find(|&power| count < 1024f64.powi(power + 1)).unwrap_or(4);
    let value = count / 1024f64.powi(power);
    if power == 0 { format!("{value:.0} B") } else { format!("{value:.2} {}", units[power as usize]) }
}

/// A time with a unit that suits it.
pub fn time(seconds: f64) -> String {
    if seconds < 1e-3 {
        format!("{:.0} µs", seconds * 1e6)
    } else if seconds < 1.0 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{seconds:.2} s")
    }
}
