//! The tensors of a Hugging Face checkpoint directory: one `model.safetensors`, or shards with an
//! index.

use super::config::read_json;
use super::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Named tensors, all of one dtype.
pub struct Weights {
    tensors: HashMap<String, Tensor>,
    directory: PathBuf,
    /// The dtype the weights have, or were rounded to.
    pub dtype: DType,
}

impl Weights {
    /// Reads all tensors and rounds them to `dtype`, by default that of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file, if one is missing, truncated, foreign, or holds other
    /// than f32, f16 or bf16.
    pub fn read(directory: &Path, dtype: Option<DType>) -> Result<Self> {
        let mut stored = HashMap::new();
        for file in files(directory)? {
            let refuse = |reason: String| Error::input(file.display().to_string(), reason);
            let bytes = std::fs::read(&file).map_err(|error| refuse(error.to_string()))?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
            for (name, view) in parsed.iter() {
                let dtype = match view.dtype() {
                    Dtype::F32 => DType::F32,
                    Dtype::F16 => DType::F16,
                    Dtype::BF16 => DType::BF16,
                    other => return Err(refuse(format!("{name}: expected f32, f16 or bf16, got {other:?}"))),
                };
                let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?;
                stored.insert(name.to_owned(), tensor);
            }
        }
        let dtype = dtype.or_else(|| stored.get("model.embed_tokens.weight").map(Tensor::dtype));
        let dtype = dtype.unwrap_or(DType::F32);
        let rounded = stored.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)));
        Ok(Self { tensors: rounded.collect::<Result<_>>()?, directory: directory.to_owned(), dtype })
    }

    /// Takes out one tensor, widened to f32: candle's matrix product has no bf16 on the CPU.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not there or has another shape.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let refuse = |reason| Error::input(self.directory.display().to_string(), reason);
        let tensor =
            self.tensors.remove(name).ok_or_else(|| refuse(format!("no tensor {name} in the checkpoint")))?;
        if tensor.dims() != shape {
            return Err(refuse(format!("{name}: expected shape {shape:?}, got {:?}", tensor.dims())));
        }
        Ok(tensor.to_dtype(DType::F32)?)
    }
}

/// The files of the checkpoint, each once.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let index = directory.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![directory.join("model.safetensors")]);
    }
    let refuse = |reason: &str| Error::input(index.display().to_string(), reason);
    let json = read_json(&index)?;
    let map = json["weight_map"].as_object().ok_or_else(|| refuse("weight_map: missing"))?;
    let names: Option<BTreeSet<&str>> = map.values().map(|name| name.as_str()).collect();
    let names = names.ok_or_else(|| refuse("weight_map: expected the names of files"))?;
    // A name with a path in it could lead out of the checkpoint.
    if names.iter().any(|name| name.contains(['/', '\\'])) {
        return Err(refuse("weight_map: expected names of files beside it"));
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}
