//! Rows as lines of text.

use serde_json::Value;

/// Over the lines.
pub fn heading() -> String {
    let [row, ms, spread, tflops, rate] = ["", "ms", "± %", "TFLOP/s", "GB/s"];
    format!("{row:60} {ms:>10} {spread:>5} {tflops:>8} {rate:>6}  of matmul  of copy")
}

/// A row as printed: its figures, or its error.
pub fn line(row: &Value) -> String {
    let label = row["label"].as_str().unwrap_or_default();
    if let Some(error) = row["error"].as_str() {
        return format!("{label:60}  {error}");
    }
    let number = |value: &Value, width: usize, decimals: usize| match value.as_f64() {
        Some(number) => format!("{number:width$.decimals$}"),
        None => format!("{:>width$}", "-"),
    };
    let ms = &row["ms"];
    let range = |end: &str| ms[end].as_f64().unwrap_or(f64::NAN);
    let spread = 50.0 * (range("most") - range("least")) / range("median");
    format!(
        "{label:60} {} {spread:5.1} {} {} {} {}",
        number(&ms["median"], 10, 4),
        number(&row["tflops"], 8, 1),
        number(&row["gb_per_s"], 6, 0),
        number(&row["of_matmul"], 10, 2),
        number(&row["of_copy"], 8, 2),
    )
}
