//! Attention on the CPU: [`flash`], the default backend, and [`mod@reference`], the oracle it is
//! tested against.

mod append;
mod backend;
pub mod flash;
pub mod reference;

pub use crate::simd::InstructionSet;
pub use append::append;
pub use backend::{Cpu, Plan};
