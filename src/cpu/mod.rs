//! Attention on the CPU: [`flash`], the default backend, and [`mod@reference`], the oracle it is tested against.

pub mod flash;
pub mod reference;
pub(crate) mod simd;

pub use simd::InstructionSet;
