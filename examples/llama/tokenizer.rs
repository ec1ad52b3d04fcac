//! A checkpoint's `tokenizer.json`: text to token ids and back.

use super::error::{Error, Result};
use super::fields::read_json;
use serde_json::Value;
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
        let bytes = std::fs::read(&path).map_err(|error| Error::input(path.display().to_string(), error))?;
        let mut tokenizer = Self::of(&path, &bytes)?;
        if tokenizer.start.is_empty() {
            tokenizer.start.extend(told_start(directory, &tokenizer.tokenizer)?);
        }
        Ok(tokenizer)
    }

    /// A tokenizer of the content of a `tokenizer.json`, `path` being what errors name.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not understood.
    pub fn of(path: &Path, bytes: &[u8]) -> Result<Self> {
        let refuse = |error: tokenizers::Error| Error::input(path.display().to_string(), error);
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(refuse)?;
        // Files keep the settings of the last training; a context is never cut.
        tokenizer.with_truncation(None).map_err(refuse)?;
        tokenizer.with_padding(None);
        // What is put before any one token.
        let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
        let framed = tokenizer.post_process(text, None, true).map_err(refuse)?;
        let special = framed.get_ids().iter().zip(framed.get_special_tokens_mask());
        let start = special.take_while(|&(_, &special)| special == 1).map(|(&id, _)| id).collect();
        Ok(Self { tokenizer, path: path.to_owned(), start })
    }

    /// The ids of a text that begins a sequence: the special tokens that the tokenizer puts before
    /// a text, unless it begins with them, and the text. None follow it.
    ///
    /// # Errors
    /// [`Error::Input`] for a text that the tokenizer has no tokens for.
    pub fn context(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.query(text)?;
        Ok(if ids.starts_with(&self.start) { ids } else { [self.start.clone(), ids].concat() })
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

    /// The id of a token, if there is one that is written so.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The token of one id as the vocabulary writes it, if it is known.
    pub fn word(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    fn error(&self, error: tokenizers::Error) -> Error {
        Error::input(self.path.display().to_string(), error)
    }
}

/// The token that `tokenizer_config.json` puts before a text (`add_bos_token`), if it does.
fn told_start(directory: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let path = directory.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(None);
    }
    let json = read_json(&path)?;
    if json["add_bos_token"] != true {
        return Ok(None);
    }
    let token = match &json["bos_token"] {
        Value::Object(token) => token.get("content").unwrap_or(&Value::Null),
        token => token,
    };
    let id = token.as_str().and_then(|token| tokenizer.token_to_id(token));
    let reason = || format!("bos_token: expected a token of the vocabulary, got {token}");
    id.map(Some).ok_or_else(|| Error::input(path.display().to_string(), reason()))
}
