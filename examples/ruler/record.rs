//! What came of one sample under one setting, kept as a line of JSON: a run that was interrupted
//! goes on where it stopped.

use super::llama::error::{Error, Result};
use super::task::Task;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One sample under one setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub key: Key,
    /// Tokens of the context.
    pub context_len: usize,
    /// Share of what was expected that the answer has in it.
    pub score: f64,
    /// Seconds of phase 1, and of phase 2.
    pub encode: f64,
    pub query: f64,
    pub answer: String,
}

/// What was run.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The checkpoint's fingerprint.
    pub model: String,
    pub setting: String,
    /// Tokens asked for.
    pub len: usize,
    pub task: Task,
    pub seed: u64,
}

impl Record {
    fn json(&self) -> Value {
        let Key { model, setting, len, task, seed } = &self.key;
        json!({
            "model": model, "setting": setting, "len": len, "task": task.name(), "seed": seed, "context_len": self.context_len,
            "score": self.score, "encode_s": self.encode, "query_s": self.query, "answer": self.answer
        })
    }

    fn parse(line: &str) -> Option<Self> {
        let json: Value = serde_json::from_str(line).ok()?;
        let text = |name: &str| json[name].as_str().map(str::to_owned);
        Some(Self {
            key: Key {
                model: text("model")?,
                setting: text("setting")?,
                len: json["len"].as_u64()? as usize,
                task: Task::from_str(json["task"].as_str()?, false).ok()?,
                seed: json["seed"].as_u64()?,
            },
            context_len: json["context_len"].as_u64()? as usize,
            score: json["score"].as_f64()?,
            encode: json["encode_s"].as_f64()?,
            query: json["query_s"].as_f64()?,
            answer: text("answer")?,
        })
    }
}

/// A file of records, to which more are appended.
pub struct Log {
    path: PathBuf,
    file: File,
    pub records: Vec<Record>,
    done: HashSet<Key>,
}

impl Log {
    /// Opens a file, or creates it, and reads what it holds. A last line that was not written to
    /// its end is dropped.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read or written, or with a line that is no
    /// record.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |reason: String| Error::input("--out", format!("{}: {reason}", path.display()));
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| refuse(error.to_string()))?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(|error| refuse(error.to_string()))?;
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        let whole = text.rfind('\n').map_or(0, |last| last + 1);
        let mut records = Vec::new();
        for (index, line) in text[..whole].lines().enumerate() {
            let record =
                Record::parse(line).ok_or_else(|| refuse(format!("line {} is no record", index + 1)))?;
            records.push(record);
        }
        file.set_len(whole as u64).map_err(|error| refuse(error.to_string()))?;
        file.seek(SeekFrom::End(0)).map_err(|error| refuse(error.to_string()))?;
        let done = records.iter().map(|record| record.key.clone()).collect();
        Ok(Self { path: path.to_owned(), file, records, done })
    }

    /// Whether this was run before.
    pub fn has(&self, key: &Key) -> bool {
        self.done.contains(key)
    }

    /// Appends a record: a whole line at a time.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be written.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let line = format!("{}\n", record.json());
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|error| Error::input("--out", format!("{}: {error}", self.path.display())))?;
        self.done.insert(record.key.clone());
        self.records.push(record);
        Ok(())
    }
}
