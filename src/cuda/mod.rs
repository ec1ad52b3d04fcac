//! The GPU backend: hand-written kernels for compute capability 8.0 and up, under plans made on the
//! CPU.
//!
//! - [`flash`]: context encoding and query attention, under every mask of the crate;
//! - [`merge()`]: n partials to one, of the splits of one call or of many ranks;
//! - [`append()`]: new keys and values to a cache, in rows or pages;
//! - [`Staging`]: tables that change from step to step, copied without waiting.
//!
//! Kernels run on a [`Device`]: a GPU (`driver`, feature `cuda`), or the SIMT emulator, slowly and
//! with every access checked (`simt`, feature `simt`). Memory comes as a [`Span`], for work on one
//! stream: of the device's own buffers safely, of other frameworks' by [`Span::from_raw`].

mod append;
mod backend;
mod device;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod flash;
#[cfg(any(test, feature = "cuda"))]
mod functions;
mod merge;
#[allow(missing_docs, clippy::all)]
#[rustfmt::skip] // bindgen's output
mod params;
mod policy;
mod scales;
#[cfg(feature = "simt")]
pub mod simt;
mod staging;

pub use append::append;
pub use backend::{Buffer, Cuda};
pub(crate) use device::{ALIGNMENT, check_not_capturing};
pub use device::{Device, DeviceTensor, DeviceTensorMut, HalfElement, Launch, Properties, Span, SpanMut};
pub use merge::{DevicePartial, MOST_PARTIALS, Partials, merge, merge_separate};
pub(crate) use merge::{RowSinks, check_len, check_merged_types, merge_stacked};
pub use policy::HEAD_DIMS;
use policy::{APPEND_THREADS, MERGE_THREADS};
pub use staging::Staging;
