//! The file of results: one JSON object whose `rows` grow. `scripts/gpu-suite/results.py` is the
//! other writer; they take turns.

use serde_json::{Value, json};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A file of results, or none.
pub struct Results(Option<PathBuf>);

impl Results {
    /// Goes on in a file, or begins one, on this chip.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is no file of results.
    pub fn open(path: Option<PathBuf>, chip: &str) -> io::Result<Self> {
        if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
            write(path, &json!({ "chip": chip, "rows": [] }))?;
        }
        let results = Self(path);
        let mut all = results.load()?;
        // Where nvidia-smi is missing, run.sh does not know it.
        if let Some(path) = results.0.as_ref().filter(|_| all["chip"].is_null()) {
            all["chip"] = json!(chip);
            write(path, &all)?;
        }
        Ok(results)
    }

    /// Adds a row. Whenever the process ends, the file holds the earlier rows, or these and this
    /// one.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn append(&self, row: &Value) -> io::Result<()> {
        let Some(path) = &self.0 else { return Ok(()) };
        let mut all = self.load()?;
        all["rows"].as_array_mut().ok_or_else(|| no_rows(path))?.push(row.clone());
        write(path, &all)
    }

    /// A number of the last row of this kind and label.
    pub fn figure(&self, kind: &str, label: &str, figure: &str) -> Option<f64> {
        let all = self.load().ok()?;
        let mut rows = all["rows"].as_array()?.iter().rev();
        rows.find(|row| row["kind"] == kind && row["label"] == label)?[figure].as_f64()
    }

    fn load(&self) -> io::Result<Value> {
        let Some(path) = &self.0 else { return Ok(json!({ "rows": [] })) };
        let all: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        if all["rows"].is_array() { Ok(all) } else { Err(no_rows(path)) }
    }
}

fn no_rows(path: &Path) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("{}: expected an object with `rows`", path.display()))
}

/// By a rename, so that the file is whole at every moment.
fn write(path: &Path, all: &Value) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    std::fs::write(&beside, serde_json::to_string_pretty(all)? + "\n")?;
    std::fs::rename(beside, path)
}
