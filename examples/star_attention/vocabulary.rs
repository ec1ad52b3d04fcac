//! The words of a word-level `tokenizer.json`, to show answers.

use super::llama::config::read_json;
use super::llama::error::Result;
use std::collections::HashMap;
use std::path::Path;

/// Words by id; without any, ids are shown as numbers.
#[derive(Debug, Default)]
pub struct Vocabulary(HashMap<u32, String>);

impl Vocabulary {
    /// Reads the checkpoint's `tokenizer.json`, if there is one and it is of words.
    ///
    /// # Errors
    /// [`Error::Input`](super::error::Error::Input) if it is no JSON.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join("tokenizer.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        let model = read_json(&path)?["model"].take();
        let words = model["vocab"].as_object().filter(|_| model["type"] == "WordLevel");
        let words = words.into_iter().flatten();
        Ok(Self(words.filter_map(|(word, id)| Some((id.as_u64()?.try_into().ok()?, word.clone()))).collect()))
    }

    /// The word of one id, if it is known.
    pub fn word(&self, id: u32) -> Option<&str> {
        self.0.get(&id).map(String::as_str)
    }

    /// The words of `ids`, with spaces between them.
    pub fn text(&self, ids: &[u32]) -> String {
        let words = ids.iter().map(|&id| self.word(id).map_or_else(|| format!("#{id}"), str::to_owned));
        words.collect::<Vec<_>>().join(" ")
    }
}
