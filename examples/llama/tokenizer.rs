//! A checkpoint's `tokenizer.json`: text to token ids and back.

use super::error::{Error, Result};
use std::path::{Path, PathBuf};
use tokenizers::{Encoding, Token};

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    path: PathBuf,
    /// The special tokens that stand before a text: mostly one that begins a sequence, or none.
    start: Vec<u32>,
}

impl Tokenizer {
    /// Reads the `tokenizer.json` of a checkpoint directory.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file, if it is missing or not understood.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("tokenizer.json");
        let refuse = |error: tokenizers::Error| Error::input(path.display().to_string(), error);
        let bytes = std::fs::read(&path).map_err(|error| refuse(error.into()))?;
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(refuse)?;
        // Files keep the settings of the last training; a context is never cut.
        tokenizer.with_truncation(None).map_err(refuse)?;
        tokenizer.with_padding(None);
        // What is put before any one token.
        let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
        let framed = tokenizer.post_process(text, None, true).map_err(refuse)?;
        let special = framed.get_ids().iter().zip(framed.get_special_tokens_mask());
        let start = special.take_while(|&(_, &special)| special == 1).map(|(&id, _)| id).collect();
        Ok(Self { tokenizer, path, start })
    }

    /// The ids of a text that begins a sequence: the special tokens that the tokenizer puts before
    /// a text, and the text. None follow it.
    ///
    /// # Errors
    /// [`Error::Input`] for a text that the tokenizer has no tokens for.
    pub fn context(&self, text: &str) -> Result<Vec<u32>> {
        Ok([self.start.clone(), self.query(text)?].concat())
    }

    /// The ids of a text that goes on a sequence: no special tokens are added.
    ///
    /// # Errors
    /// [`Error::Input`] for a text that the tokenizer has no tokens for.
    pub fn query(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| self.error(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, with or without special tokens; unknown ids have none.
    ///
    /// # Errors
    /// [`Error::Input`] for ids that the tokenizer cannot put together.
    pub fn text(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special).map_err(|error| self.error(error))
    }

    /// The token of one id as the vocabulary writes it, if it is known.
    pub fn word(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    fn error(&self, error: tokenizers::Error) -> Error {
        Error::input(self.path.display().to_string(), error)
    }
}
