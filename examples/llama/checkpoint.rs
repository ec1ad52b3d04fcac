//! A checkpoint as it lies on disk: a Hugging Face directory or a GGUF file.

use super::config::{Config, eos_ids};
use super::error::{Error, Result};
use super::gguf::Gguf;
use super::tokenizer::Tokenizer;
use super::weights::Weights;
use candle_core::DType;
use std::path::{Path, PathBuf};

/// Where a model's config, weights and tokenizer are read from.
pub enum Checkpoint {
    /// A Hugging Face directory: `config.json`, safetensors, `tokenizer.json`.
    Directory(PathBuf),
    /// A GGUF file, which holds all of it.
    Gguf(Box<Gguf>),
}

impl Checkpoint {
    /// Opens a directory, or reads the header of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Input`] for a path where there is neither.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if path.is_file() {
            return Ok(Self::Gguf(Box::new(Gguf::open(path)?)));
        }
        Err(Error::input("--model", format!("no directory or GGUF file {}", path.display())))
    }

    /// # Errors
    /// [`Error::Input`] naming the file and the field.
    pub fn config(&self) -> Result<Config> {
        match self {
            Self::Directory(directory) => Config::read(&directory.join("config.json")),
            Self::Gguf(gguf) => Config::of(gguf.path(), &gguf.config()?),
        }
    }

    /// The weights of a model of `config`, to be rounded to `dtype`. By default a directory's have
    /// the dtype of its embeddings, and a GGUF file's, quantised or not, are f32.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the tensor.
    pub fn weights(&self, config: &Config, dtype: Option<DType>) -> Result<Weights> {
        match self {
            Self::Directory(directory) => Weights::read(directory, dtype),
            Self::Gguf(gguf) => {
                Ok(Weights::new(gguf.tensors(config)?, gguf.path(), dtype.unwrap_or(DType::F32)))
            }
        }
    }

    /// The tokenizer, if the checkpoint has one.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        match self {
            Self::Directory(directory) => {
                let there = directory.join("tokenizer.json").exists();
                there.then(|| Tokenizer::read(directory)).transpose()
            }
            Self::Gguf(gguf) => {
                let of = |json: serde_json::Value| Tokenizer::of(gguf.path(), json.to_string().as_bytes());
                gguf.tokenizer()?.map(of).transpose()
            }
        }
    }

    /// The tokens that end an answer; none if the checkpoint names none.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field.
    pub fn eos_ids(&self) -> Result<Vec<u32>> {
        match self {
            Self::Directory(directory) => eos_ids(directory),
            Self::Gguf(gguf) => gguf.eos_ids(),
        }
    }
}
