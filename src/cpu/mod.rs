//! Attention on the CPU: [`flash`], the default backend, and [`mod@reference`], the oracle it is tested against.

pub mod flash;
pub mod reference;
