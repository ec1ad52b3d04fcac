//! The element types of tensors, and their run-time names.

mod float8;

pub use float8::F8E4M3;

use half::{bf16, f16};
use std::mem::MaybeUninit;

/// The element types of queries, keys, values and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: binary32 cut to 16 bits.
    BF16,
    /// 8 bits: a sign, 4 of exponent and 3 of mantissa ([`F8E4M3`]).
    F8E4M3,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 => 1,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
        })
    }
}

pub(crate) mod sealed {
    use super::F8E4M3;
    use half::{bf16, f16};

    /// A slice of any element type.
    #[derive(Clone, Copy, Debug)]
    pub enum AnySlice<'a> {
        F32(&'a [f32]),
        F16(&'a [f16]),
        BF16(&'a [bf16]),
        F8E4M3(&'a [F8E4M3]),
    }

    /// Elements and memory for them.
    pub trait Memory: Sized {}

    pub trait Sealed: Sized {
        fn erase(data: &[Self]) -> AnySlice<'_>;
    }

    impl Sealed for f32 {
        fn erase(data: &[Self]) -> AnySlice<'_> {
            AnySlice::F32(data)
        }
    }

    impl Sealed for f16 {
        fn erase(data: &[Self]) -> AnySlice<'_> {
            AnySlice::F16(data)
        }
    }

    impl Sealed for bf16 {
        fn erase(data: &[Self]) -> AnySlice<'_> {
            AnySlice::BF16(data)
        }
    }

    impl Sealed for F8E4M3 {
        fn erase(data: &[Self]) -> AnySlice<'_> {
            AnySlice::F8E4M3(data)
        }
    }
}

/// An element of a tensor: [`f32`], [`struct@f16`], [`bf16`] or [`F8E4M3`].
pub trait Element: sealed::Sealed + bytemuck::Pod + Default + Send + Sync + std::fmt::Debug {
    /// The run-time name of the type.
    const DTYPE: DType;
    /// The same value in f32; exact.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even. An [`F8E4M3`] stays finite.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Element for F8E4M3 {
    const DTYPE: DType = DType::F8E4M3;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        F8E4M3::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        F8E4M3::from_f32(value)
    }
}

/// What outputs are made of: an [`Element`], or memory for one that may be uninitialised.
pub trait Output: sealed::Memory + Send {
    /// The type of the elements that are written.
    type Element: Element;
    /// The nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl<T: Element> sealed::Memory for T {}
impl<T: Element> sealed::Memory for MaybeUninit<T> {}

impl<T: Element> Output for T {
    type Element = T;
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        <T as Element>::from_f32(value)
    }
}

impl<T: Element> Output for MaybeUninit<T> {
    type Element = T;
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::new(T::from_f32(value))
    }
}
