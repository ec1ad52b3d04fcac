//! GGUF files, told in the terms of Hugging Face checkpoints: the metadata as `config.json` and
//! `tokenizer.json`, the tensors by the names and in the layout of transformers.

mod checked;
mod config;
mod metadata;
mod tensors;
mod tokenizer;

use super::config::Config;
use super::error::{Error, Result, without_backtrace};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use checked::Checked;
use metadata::Metadata;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// A GGUF file whose header was read.
pub struct Gguf {
    path: PathBuf,
    content: Content,
}

impl Gguf {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, is truncated, or is not GGUF.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |reason: String| Error::input(path.display().to_string(), reason);
        let file = File::open(path).map_err(|error| refuse(error.to_string()))?;
        let content = Content::read(&mut Checked::new(BufReader::new(file)))
            .map_err(|error| refuse(without_backtrace(&error)))?;
        Ok(Self { path: path.to_owned(), content })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a `config.json` of the same model says.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field.
    pub fn config(&self) -> Result<Value> {
        let shapes = self.content.tensor_infos.iter();
        let shapes = shapes.map(|(name, info)| (name.as_str(), info.shape.dims())).collect();
        config::config(&self.metadata(), &shapes)
    }

    /// What a `tokenizer.json` of the same model says; none without a vocabulary.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field.
    pub fn tokenizer(&self) -> Result<Option<Value>> {
        let embedding = self.content.tensor_infos.get(tensors::EMBEDDING);
        let rows = embedding.and_then(|info| info.shape.dims().first().copied());
        tokenizer::tokenizer(&self.metadata(), rows)
    }

    /// The tokens that end an answer.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field.
    pub fn eos_ids(&self) -> Result<Vec<u32>> {
        tokenizer::eos_ids(&self.metadata())
    }

    /// The tensors that a model is made of, dequantised to f32, by the names of transformers.
    ///
    /// # Errors
    /// [`Error::Input`] naming a tensor that is not what the header says.
    pub fn tensors(&self, config: &Config) -> Result<HashMap<String, Tensor>> {
        let mut file = BufReader::new(File::open(&self.path).map_err(|error| self.error(error))?);
        let mut read = HashMap::new();
        for (name, info) in &self.content.tensor_infos {
            let Some(known_as) = tensors::name_in_transformers(name) else { continue };
            let refuse =
                |error: candle_core::Error| self.error(format!("{name}: {}", without_backtrace(&error)));
            // Candle multiplies the extents without a look at their size, and takes none for empty.
            let extents = info.shape.dims();
            let bytes = extents.iter().try_fold(4usize, |bytes, &extent| bytes.checked_mul(extent));
            if bytes.is_none_or(|bytes| bytes == 0) {
                return Err(
                    self.error(format!("{name}: expected a shape that a tensor has, got {extents:?}"))
                );
            }
            let quantised =
                info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu).map_err(refuse)?;
            let tensor = quantised.dequantize(&Device::Cpu).map_err(refuse)?;
            let tensor = match self.permuted_heads(name, config) {
                Some(heads) => tensors::unpermuted(&tensor, heads).map_err(refuse)?,
                None => tensor,
            };
            read.insert(known_as, tensor);
        }
        Ok(read)
    }

    /// The heads whose rows a tensor holds in the order of llama.cpp, if it does.
    fn permuted_heads(&self, name: &str, config: &Config) -> Option<usize> {
        let heads = [("attn_q.", config.heads), ("attn_k.", config.kv_heads)];
        let heads = heads.into_iter().find_map(|(part, heads)| name.contains(part).then_some(heads));
        heads.filter(|_| self.metadata().architecture().is_ok_and(|name| name == "llama"))
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata { path: &self.path, values: &self.content.metadata }
    }

    fn error(&self, reason: impl ToString) -> Error {
        Error::input(self.path.display().to_string(), reason)
    }
}
