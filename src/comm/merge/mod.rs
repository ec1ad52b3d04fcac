mod cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
mod device;

#[cfg(any(feature = "cuda", feature = "simt"))]
use cpu::check_extents;
pub use cpu::{MergePlan, merge};
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use device::{PreparedMerge, RanksMerge};
