//! The tensors of a safetensors file, and the file that is written.

use crate::Result;
use safetensors::tensor::{Dtype, SafeTensors, TensorView as Stored};
use star_attention::{Element, F8E4M3, Scales, bf16, f16};

/// A tensor `[batch, seq, heads, dim]` of a file.
pub struct Input<'a> {
    pub shape: [usize; 4],
    pub data: Stored<'a>,
}

/// A file with a call's tensors.
pub struct File<'a> {
    tensors: SafeTensors<'a>,
    /// q, k and v.
    pub inputs: [Input<'a>; 3],
}

impl<'a> File<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let inputs = [input(&tensors, "q")?, input(&tensors, "k")?, input(&tensors, "v")?];
        let [query, key, value] = inputs.each_ref().map(|tensor| tensor.data.dtype());
        if key != value {
            let (name, expected, like, got) =
                if key == query { ("v", key, "k", value) } else { ("k", value, "v", key) };
            return Err(format!("{name}: expected dtype {expected:?} as {like} has, got {got:?}"));
        }
        Ok(Self { tensors, inputs })
    }

    /// The attention sinks, if the file has them.
    pub fn sinks(&self) -> Result<Option<Vec<f32>>> {
        let Some((shape, sinks)) = self.floats("sinks")? else { return Ok(None) };
        let heads = self.inputs[0].shape[2];
        if shape != [heads] {
            return Err(format!("sinks: expected shape [{heads}], got {shape:?}"));
        }
        match sinks.iter().position(|sink| sink.is_nan() || *sink == f32::INFINITY) {
            Some(head) => {
                Err(format!("sinks: expected a number below +inf for head {head}, got {}", sinks[head]))
            }
            None => Ok(Some(sinks)),
        }
    }

    /// The scales of k and v, if the file has either; one that is missing is 1.
    pub fn scales(&self) -> Result<Option<Scales<Vec<f32>>>> {
        Ok(match (self.scales_of("k_scale")?, self.scales_of("v_scale")?) {
            (None, None) => None,
            (key, value) => Some(Scales::new(key.unwrap_or(vec![1.0]), value.unwrap_or(vec![1.0]))),
        })
    }

    fn scales_of(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some((shape, scales)) = self.floats(name)? else { return Ok(None) };
        let key = &self.inputs[1];
        if key.data.dtype() != Dtype::F8_E4M3 {
            return Err(format!("{name}: expected k and v of dtype F8_E4M3, got {:?}", key.data.dtype()));
        }
        let heads = key.shape[2];
        if !shape.is_empty() && shape != [1] && shape != [heads] {
            return Err(format!("{name}: expected shape [1] or [{heads}], got {shape:?}"));
        }
        match scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
            Some(head) => {
                Err(format!("{name}: expected a finite number above 0 for head {head}, got {}", scales[head]))
            }
            None => Ok(Some(scales)),
        }
    }

    /// Shape and elements of an f32 tensor, if the file has one of this name.
    fn floats(&self, name: &str) -> Result<Option<(Vec<usize>, Vec<f32>)>> {
        let Ok(data) = self.tensors.tensor(name) else { return Ok(None) };
        if data.dtype() != Dtype::F32 {
            return Err(format!("{name}: expected dtype F32, got {:?}", data.dtype()));
        }
        Ok(Some((data.shape().to_vec(), f32::read(data.data()))))
    }

    /// An i32 tensor, if the file has one of this name.
    pub fn numbers(&self, name: &'static str) -> Result<Option<Numbers>> {
        let Ok(data) = self.tensors.tensor(name) else { return Ok(None) };
        if data.dtype() != Dtype::I32 {
            return Err(format!("{name}: expected dtype I32, got {:?}", data.dtype()));
        }
        let numbers = data.data().as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes));
        Ok(Some(Numbers { name, shape: data.shape().to_vec(), data: numbers.collect() }))
    }
}

fn input<'a>(file: &SafeTensors<'a>, name: &'static str) -> Result<Input<'a>> {
    let data = file.tensor(name).map_err(|_| format!("no tensor {name}"))?;
    let shape = data
        .shape()
        .try_into()
        .map_err(|_| format!("{name}: expected 4 axes [batch, seq, heads, dim], got {:?}", data.shape()))?;
    Ok(Input { shape, data })
}

/// An i32 tensor.
pub struct Numbers {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<i32>,
}

impl Numbers {
    /// The numbers as lengths or offsets.
    pub fn lengths(&self) -> Result<Vec<usize>> {
        let length = |&x: &i32| {
            usize::try_from(x).map_err(|_| format!("{}: expected no negative number, got {x}", self.name))
        };
        self.data.iter().map(length).collect()
    }

    /// Refuses another shape.
    pub fn check_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(format!("{}: expected shape {expected:?}, got {:?}", self.name, self.shape))
    }
}

/// An element as it lies in a file: little-endian, at any address.
pub trait FileElement: Element {
    const STORED: Dtype;
    fn read(bytes: &[u8]) -> Vec<Self>;
    fn write(values: &[Self]) -> Vec<u8>;
}

macro_rules! file_element {
    ($type:ty, $stored:expr) => {
        impl FileElement for $type {
            const STORED: Dtype = $stored;
            fn read(bytes: &[u8]) -> Vec<Self> {
                bytes.as_chunks().0.iter().map(|&bytes| Self::from_le_bytes(bytes)).collect()
            }
            fn write(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
        }
    };
}
file_element!(f32, Dtype::F32);
file_element!(f16, Dtype::F16);
file_element!(bf16, Dtype::BF16);

impl FileElement for F8E4M3 {
    const STORED: Dtype = Dtype::F8_E4M3;
    fn read(bytes: &[u8]) -> Vec<Self> {
        bytes.iter().copied().map(Self::from_bits).collect()
    }
    fn write(values: &[Self]) -> Vec<u8> {
        values.iter().copied().map(Self::to_bits).collect()
    }
}

/// A file with `out`, of the given shape, and `lse`.
pub fn outputs<T: FileElement>(shape: [usize; 4], out: &[T], lse: &[f32]) -> Result<Vec<u8>> {
    let [batch, seq, heads, _] = shape;
    let (out, lse) = (T::write(out), f32::write(lse));
    let out = Stored::new(T::STORED, shape.to_vec(), &out).map_err(|e| e.to_string())?;
    let lse = Stored::new(Dtype::F32, vec![batch, heads, seq], &lse).map_err(|e| e.to_string())?;
    safetensors::serialize([("out", out), ("lse", lse)], None).map_err(|e| e.to_string())
}
