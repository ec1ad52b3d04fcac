//! The tensors of a Hugging Face checkpoint directory: one `model.safetensors`, or shards with an
//! index.

use super::error::{Error, Result};
use super::fields::read_json;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Named tensors as they are stored.
pub struct Weights {
    /// Or the name of a dtype that is not read.
    tensors: HashMap<String, std::result::Result<Tensor, String>>,
    /// What errors name.
    path: PathBuf,
    /// The dtype that weights are rounded to, those of norms excepted.
    pub dtype: DType,
}

impl Weights {
    /// Reads all tensors, to be rounded to `dtype`, by default that of the embeddings.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file, if one is missing, truncated or foreign.
    pub fn read(directory: &Path, dtype: Option<DType>) -> Result<Self> {
        let mut tensors = HashMap::new();
        let (files, map) = files(directory)?;
        for file in files {
            let refuse = |reason: String| Error::input(file.display().to_string(), reason);
            let bytes = std::fs::read(&file).map_err(|error| refuse(error.to_string()))?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
            for (name, view) in parsed.iter() {
                // The index says which file a tensor is taken from.
                if map.get(name).is_some_and(|mapped| directory.join(mapped) != file) {
                    continue;
                }
                let dtype = match view.dtype() {
                    Dtype::F32 => DType::F32,
                    Dtype::F16 => DType::F16,
                    Dtype::BF16 => DType::BF16,
                    other => {
                        tensors.insert(name.to_owned(), Err(format!("{other:?}")));
                        continue;
                    }
                };
                let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?;
                tensors.insert(name.to_owned(), Ok(tensor));
            }
        }
        let embedding = tensors.get("model.embed_tokens.weight").and_then(|tensor| tensor.as_ref().ok());
        let dtype = dtype.or_else(|| embedding.map(Tensor::dtype)).unwrap_or(DType::F32);
        Ok(Self { tensors, path: directory.to_owned(), dtype })
    }

    /// Weights that were read from `path`, to be rounded to `dtype`.
    pub fn new(tensors: HashMap<String, Tensor>, path: &Path, dtype: DType) -> Self {
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, Ok(tensor))).collect();
        Self { tensors, path: path.to_owned(), dtype }
    }

    /// Whether there is a tensor of a name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes out one tensor, widened to f32: candle's matrix product has no bf16 on the CPU. All
    /// but the weights of norms are rounded to the weights' dtype before.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not there, has another shape, or is neither f32, f16 nor bf16.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let refuse = |reason| Error::input(self.path.display().to_string(), reason);
        let tensor =
            self.tensors.remove(name).ok_or_else(|| refuse(format!("no tensor {name} in the checkpoint")))?;
        let tensor =
            tensor.map_err(|other| refuse(format!("{name}: expected f32, f16 or bf16, got {other}")))?;
        if tensor.dims() != shape {
            return Err(refuse(format!("{name}: expected shape {shape:?}, got {:?}", tensor.dims())));
        }
        let is_norm = name.ends_with("norm.weight");
        let rounded = if is_norm { tensor } else { tensor.to_dtype(self.dtype)? };
        Ok(rounded.to_dtype(DType::F32)?)
    }
}

/// The files of the checkpoint, each once, and which of them the index maps a tensor to.
fn files(directory: &Path) -> Result<(Vec<PathBuf>, HashMap<String, String>)> {
    let index = directory.join("model.safetensors.index.json");
    let whole = directory.join("model.safetensors");
    if !index.exists() {
        return Ok((vec![whole], HashMap::new()));
    }
    let refuse = |reason: &str| Error::input(index.display().to_string(), reason);
    let json = read_json(&index)?;
    let map = json["weight_map"].as_object().ok_or_else(|| refuse("weight_map: missing"))?;
    let file_of = |(name, file): (&String, &Value)| Some((name.clone(), file.as_str()?.to_owned()));
    let map: Option<HashMap<String, String>> = map.iter().map(file_of).collect();
    let map = map.ok_or_else(|| refuse("weight_map: expected the names of files"))?;
    let names: BTreeSet<&String> = map.values().collect();
    // A name with a path in it could lead out of the checkpoint.
    if names.iter().any(|name| name.contains(['/', '\\'])) {
        return Err(refuse("weight_map: expected names of files beside it"));
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| directory.join(name)).collect();
    if whole.exists() && files.iter().any(|file| !file.exists()) {
        let reason = format!(
            "weight_map names {} files, not all of which are there, and model.safetensors is: \
             the index does not describe this directory",
            files.len()
        );
        return Err(refuse(&reason));
    }
    Ok((files, map))
}
