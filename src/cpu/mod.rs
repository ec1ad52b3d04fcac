//! Attention on the CPU: [`flash`], the default backend, and [`mod@reference`], the oracle it is
//! tested against.

mod append;
mod backend;
pub mod flash;
pub mod reference;
pub(crate) mod simd;

pub use append::append;
pub use backend::{Cpu, Plan};
pub use simd::InstructionSet;
