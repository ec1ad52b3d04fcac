//! The keys and values that an engine keeps, in the memory of any backend.
//!
//! A [`KvStore`] holds sequences of tokens, each with a key and a value in every layer. Layers
//! share one page table: a token's row is at the same place in all of them. Room is in pages of
//! equal length, which sequences take as they grow, or in rows: one page for each sequence, as long
//! as the longest may become. Dense calls such as
//! [`cpu::flash::attention`](crate::cpu::flash::attention) take the rows of a sequence as they are.
//!
//! A step of an engine:
//!
//! 1. [`extend`](KvStore::extend) each sequence by its new tokens;
//! 2. [`update`](Backend::update) the plan with a batch of [`keys`](KvStore::keys), and write the
//!    [`places`](KvStore::places) of all new rows to one buffer;
//! 3. in each layer, [`append`](KvStore::append) the new rows to these places, and attend to
//!    [`key`](KvStore::key) and [`value`](KvStore::value).
//!
//! A step of phase 2 over ranks begins with [`begin_step`](KvStore::begin_step) instead.
//!
//! ```
//! use star_attention::{Append, Backend, Batch, Capacity, Inputs, KvConfig, KvStore, Mask, PlanConfig, Sequence};
//!
//! /// Encodes 40 tokens in two layers; any backend.
//! fn encode<B: Backend>(backend: &B) -> star_attention::Result<Vec<f32>> {
//!     let (query_shape, new_shape) = ([1, 40, 4, 64], [1, 40, 2, 64]);
//!     let config = KvConfig::new(2, 64).with_layers(2).in_pages(8, 16);
//!     let mut store = KvStore::<B, f32>::new(backend, config)?;
//!     let capacity = Capacity::new(query_shape, store.shape(), 1, 40).with_pages(8);
//!     let mut plan = backend.plan(&PlanConfig::new(), &capacity)?;
//!     let mut workspace = backend.buffer(backend.workspace_bytes(&plan))?;
//!     let rows = backend.buffer_of(&[0.25f32; 40 * 4 * 64])?;
//!     let mut out = backend.buffer::<f32>(40 * 4 * 64)?;
//!
//!     let sequence = store.open()?;
//!     store.extend(backend, sequence, 40)?;
//!     let mut batch = Batch::new(query_shape, store.shape())?;
//!     batch.push(Sequence::new(0, 0..40, store.keys(sequence)?, Mask::Causal))?;
//!     backend.update(&mut plan, &batch)?;
//!     let places: Vec<u32> = store.places(sequence, 0..40)?.collect();
//!     let places = backend.buffer_of(&places)?;
//!     for layer in 0..2 {
//!         let new = backend.whole("key", &rows, new_shape)?;
//!         let new = Append::new(new, backend.whole("value", &rows, new_shape)?, backend.slice(&places, ..));
//!         store.append(backend, layer, new)?;
//!         let query = backend.whole("query", &rows, query_shape)?;
//!         let inputs = Inputs::new(query, store.key(backend, layer)?, store.value(backend, layer)?);
//!         let to = backend.whole_mut("out", &mut out, query_shape)?;
//!         backend.attend(&mut plan, inputs, to, None, backend.slice_mut(&mut workspace, ..))?;
//!     }
//!     backend.read(&out)
//! }
//!
//! let out = encode(&star_attention::cpu::Cpu::new())?;
//! assert!(out.iter().all(|&x| (x - 0.25).abs() < 1e-6));
//! # star_attention::Result::Ok(())
//! ```
//!
//! # What sequences share
//!
//! [`KvStore::share`] opens a sequence that begins as another one does. Their common pages are
//! counted, not copied. A page that both use in part is copied, in every layer, when one of them
//! grows into it.
//!
//! A prefix that all sequences of a call have in common, or an anchor that came from another rank,
//! can also lie in a store of its own, in rows. Its tensors are the call's prefix tensors, and each
//! sequence names its rows of them:
//!
//! ```
//! use star_attention::{Backend, Batch, Inputs, Keys, KvConfig, KvStore, Mask, PlanConfig, Sequence, cpu::Cpu};
//!
//! # fn main() -> star_attention::Result<()> {
//! let cpu = Cpu::new();
//! let heads = KvConfig::new(2, 64);
//! let mut prefixes = KvStore::<_, f32>::new(&cpu, heads.in_rows(1, 100))?;
//! let mut store = KvStore::<_, f32>::new(&cpu, heads.in_pages(8, 16))?;
//! let (prefix, sequence) = (prefixes.open()?, store.open()?);
//! prefixes.extend(&cpu, prefix, 70)?;
//! store.extend(&cpu, sequence, 3)?;
//!
//! let [prefix_batch, prefix_seq, ..] = prefixes.shape();
//! let mut batch = Batch::new([1, 1, 4, 64], store.shape())?.with_prefix(prefix_batch, prefix_seq)?;
//! let mut decode = Sequence::new(0, 0..1, store.keys(sequence)?, Mask::Causal);
//! if let Keys::Rows { batch, rows, .. } = prefixes.keys(prefix)? {
//!     decode = decode.with_prefix(batch, rows);
//! }
//! assert_eq!(decode.key_len(), 73);
//! batch.push(decode)?;
//!
//! let mut plan = cpu.plan_for(&PlanConfig::new(), &batch)?;
//! let (query, mut out) = ([0.5f32; 256], vec![0f32; 256]);
//! let inputs = Inputs::new(
//!     Cpu::view("query", &query, [1, 1, 4, 64], [256, 256, 64, 1])?,
//!     store.key(&cpu, 0)?,
//!     store.value(&cpu, 0)?,
//! );
//! let inputs = inputs.with_prefix(prefixes.key(&cpu, 0)?, prefixes.value(&cpu, 0)?);
//! let mut workspace = vec![0; cpu.workspace_bytes(&plan)];
//! cpu.attend(&mut plan, inputs, cpu.whole_mut("out", &mut out, [1, 1, 4, 64])?, None, &mut workspace)?;
//! # Ok(())
//! # }
//! ```

mod pages;
mod planes;
mod step;
mod store;

pub use pages::SequenceId;
pub use step::StepRows;
pub use store::KvStore;

#[cfg(doc)]
use crate::Backend;
use crate::batch::with_dim;
use crate::config::check_addressable;
use crate::{Error, Result};

/// What a [`KvStore`] has room for.
///
/// ```
/// use star_attention::KvConfig;
///
/// // 8 KV heads of 128 in each of 32 layers, in 1000 pages of 16 tokens.
/// let pages = KvConfig::new(8, 128).with_layers(32).in_pages(1000, 16);
/// // The same for 4 sequences of up to 4096 tokens each.
/// let rows = KvConfig::new(8, 128).with_layers(32).in_rows(4, 4096);
/// # assert_ne!(pages, rows);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvConfig {
    /// Layers; at least 1.
    pub layers: usize,
    /// Heads of keys and values; at least 1.
    pub kv_heads: usize,
    /// Elements of a head of keys; at least 1.
    pub head_dim: usize,
    /// Elements of a head of values; at least 1.
    pub value_dim: usize,
    /// How many tokens there is room for.
    pub room: KvRoom,
}

/// How many tokens a [`KvStore`] has room for, and how they are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvRoom {
    /// Sequences take pages as they grow.
    Pages {
        /// Pages of all sequences.
        pages: usize,
        /// Tokens of a page; at least 1.
        page_len: usize,
    },
    /// Each sequence has consecutive rows of its own: a page of `capacity` tokens.
    Rows {
        /// Sequences.
        sequences: usize,
        /// Tokens of each at most.
        capacity: usize,
    },
}

impl KvConfig {
    /// One layer of `kv_heads` heads of `head_dim` elements, of keys and of values. Its room is for
    /// the caller to say, by [`in_pages`](Self::in_pages) or [`in_rows`](Self::in_rows).
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        let room = KvRoom::Pages { pages: 0, page_len: 0 };
        Self { layers: 1, kv_heads, head_dim, value_dim: head_dim, room }
    }

    /// The same with heads of `value_dim` elements of values.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim, ..self }
    }

    /// The same for so many layers.
    #[must_use]
    pub fn with_layers(self, layers: usize) -> Self {
        Self { layers, ..self }
    }

    /// The same with `pages` pages of `page_len` tokens.
    #[must_use]
    pub fn in_pages(self, pages: usize, page_len: usize) -> Self {
        Self { room: KvRoom::Pages { pages, page_len }, ..self }
    }

    /// The same with rows for `sequences` sequences, of up to `capacity` tokens each.
    #[must_use]
    pub fn in_rows(self, sequences: usize, capacity: usize) -> Self {
        Self { room: KvRoom::Rows { sequences, capacity }, ..self }
    }

    /// The shape of a layer's keys, `[pages, page_len, kv_heads, head_dim]`; in rows `[sequences,
    /// capacity, kv_heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        let (pages, page_len) = match self.room {
            KvRoom::Pages { pages, page_len } => (pages, page_len),
            KvRoom::Rows { sequences, capacity } => (sequences, capacity),
        };
        [pages, page_len, self.kv_heads, self.head_dim]
    }

    /// The shape of a layer's values, the same with `value_dim`.
    pub fn value_shape(&self) -> [usize; 4] {
        with_dim(self.shape(), self.value_dim)
    }

    /// Whether room is in rows.
    fn in_rows_mode(&self) -> bool {
        matches!(self.room, KvRoom::Rows { .. })
    }

    /// # Errors
    /// [`Error::Value`] for an extent of 0 that must not be, or 2³² tokens and more, whose places
    /// would not be numbers of 32 bits; [`Error::Shape`] for what could not be addressed.
    pub fn validate(&self) -> Result<()> {
        let shape @ [pages, page_len, ..] = self.shape();
        let page_len_at_least = if self.in_rows_mode() { 0 } else { 1 };
        for (argument, least, got) in [
            ("layers", 1, self.layers),
            ("kv_heads", 1, self.kv_heads),
            ("head_dim", 1, self.head_dim),
            ("value_dim", 1, self.value_dim),
            ("page_len", page_len_at_least, page_len),
        ] {
            if got < least {
                return Err(Error::value(argument, format!("at least {least}"), got));
            }
        }
        // Pages are numbers of 32 bits as well.
        if pages.checked_mul(page_len.max(1)).is_none_or(|rows| u32::try_from(rows).is_err()) {
            let argument = match self.in_rows_mode() {
                true if u32::try_from(page_len).is_err() => "capacity",
                true => "sequences",
                false => "pages",
            };
            let got = format!("{pages} of {page_len}");
            return Err(Error::value(argument, "fewer than 2³² tokens in all", got));
        }
        check_addressable("key", shape)?;
        check_addressable("value", self.value_shape())
    }
}
