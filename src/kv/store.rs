//! Keys and values of all layers, and the sequences that they belong to.

use super::pages::{Extension, PageCopy, PageTable};
use super::planes::{Layer, PlaneCopy, Planes};
use super::{KvConfig, SequenceId};
use crate::{Append, Backend, Element, Error, Keys, Result};
use std::fmt::{self, Debug, Formatter};
use std::ops::Range;

/// Keys and values of an engine's sequences, in the memory of one backend: the one that is passed
/// to every call.
///
/// Each layer has a tensor of keys, [`shape`](Self::shape) `[pages, page_len, kv_heads, head_dim]`,
/// and one of values, [`value_shape`](Self::value_shape). In memory heads come before rows, so that
/// the keys of a head are contiguous.
///
/// What a sequence holds is its length alone, the same in all layers; `extend` and `truncate`
/// change it. The rows of new tokens hold anything until they are appended.
///
/// In rows an open sequence has its page from the start: there are as many sequences as pages, and
/// more where they share.
pub struct KvStore<B: Backend, T: Element> {
    config: KvConfig,
    table: PageTable,
    layers: Vec<Layer<B, T>>,
}

impl<B: Backend, T: Element> KvStore<B, T> {
    /// A store without sequences.
    ///
    /// # Errors
    /// As [`KvConfig::validate`]; [`Error::Value`] if there is not so much memory; errors of the
    /// driver.
    pub fn new(backend: &B, config: KvConfig) -> Result<Self> {
        config.validate()?;
        let [pages, page_len, ..] = config.shape();
        let table = PageTable::new(pages, page_len, config.in_rows_mode())?;
        Ok(Self { config, table, layers: allocate(backend, &config)? })
    }

    /// What there is room for.
    pub fn config(&self) -> &KvConfig {
        &self.config
    }

    /// The shape of a layer's keys, `[pages, page_len, kv_heads, head_dim]`: the key shape of a
    /// [`Batch`](crate::Batch).
    pub fn shape(&self) -> [usize; 4] {
        self.config.shape()
    }

    /// The shape of a layer's values, `[pages, page_len, kv_heads, value_dim]`.
    pub fn value_shape(&self) -> [usize; 4] {
        self.config.value_shape()
    }

    /// Bytes of the keys and values of one token, over all layers.
    pub fn row_bytes(&self) -> usize {
        let KvConfig { layers, kv_heads, head_dim, value_dim, .. } = self.config;
        let dims = head_dim.saturating_add(value_dim);
        [layers, kv_heads, T::DTYPE.size()].iter().fold(dims, |n, &x| n.saturating_mul(x))
    }

    /// Pages that no sequence has.
    pub fn free_pages(&self) -> usize {
        self.table.free_pages()
    }

    /// A sequence without tokens.
    ///
    /// # Errors
    /// [`Error::Pages`] in rows, if all pages are in use.
    pub fn open(&mut self) -> Result<SequenceId> {
        self.table.open()
    }

    /// Ends a sequence. Its pages are free once no other sequence has them.
    ///
    /// # Errors
    /// [`Error::Value`], naming `sequence`, for one that is not open.
    pub fn close(&mut self, id: SequenceId) -> Result<()> {
        self.table.close(id)
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        self.table.len(id)
    }

    /// Lengthens a sequence by `rows` tokens. A page that it uses in part and that others have as
    /// well is copied first, in every layer.
    ///
    /// # Errors
    /// [`Error::Pages`] if too few pages are free, [`Error::Capacity`] for a sequence in rows that
    /// has no room; [`Error::Value`], naming `sequence`, for one that is not open; errors of
    /// [`Backend::buffer`] and [`Backend::append`] for the copy, which is refused in a stream that
    /// is being captured. The sequence is then as it was.
    pub fn extend(&mut self, backend: &B, id: SequenceId, rows: usize) -> Result<()> {
        let extension = self.table.extension(id, rows)?;
        self.copy(backend, &extension)?;
        self.table.extend(extension);
        Ok(())
    }

    /// By way of memory of its own: no tensor is read and written in one call.
    fn copy(&mut self, backend: &B, extension: &Extension) -> Result<()> {
        let KvConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let dims = [head_dim, value_dim];
        let Some(PageCopy { from, to, rows, .. }) = extension.copy else { return Ok(()) };
        if rows == 0 {
            return Ok(());
        }
        let [_, len, ..] = self.shape();
        let [from, to] = [from, to].map(|page| Planes { first: page as usize * kv_heads, len });
        let between = Planes { first: 0, len: rows };
        let out = PlaneCopy::new(backend, dims, (from, between), kv_heads, |_| rows)?;
        let back = PlaneCopy::new(backend, dims, (between, to), kv_heads, |_| rows)?;
        let scratch = |dim| backend.buffer(kv_heads * rows * dim);
        let mut scratch = [scratch(head_dim)?, scratch(value_dim)?];
        for layer in &mut self.layers {
            out.run(backend, layer, &mut scratch)?;
            back.run(backend, &scratch, layer)?;
        }
        Ok(())
    }

    /// Shortens a sequence to its first `len` tokens, and gives back the pages behind them.
    ///
    /// # Errors
    /// [`Error::Value`], naming `len`, if it has fewer tokens, or `sequence`, if it is not open.
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.table.truncate(id, len)
    }

    /// A new sequence of the first `len` tokens of another, in the same pages.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn share(&mut self, id: SequenceId, len: usize) -> Result<SequenceId> {
        self.table.share(id, len)
    }

    /// Where the keys of a sequence lie, for a [`Batch`](crate::Batch).
    ///
    /// # Errors
    /// [`Error::Value`], naming `sequence`, for one that is not open.
    pub fn keys(&self, id: SequenceId) -> Result<Keys> {
        self.keys_of(id, self.len(id)?)
    }

    /// The same for its first `len` tokens.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn keys_of(&self, id: SequenceId, len: usize) -> Result<Keys> {
        self.table.keys(id, len)
    }

    /// The places of some of a sequence's tokens, as [`Append`] takes them: the same in all layers,
    /// until the sequence is truncated, shared or extended, or the store grows.
    ///
    /// # Errors
    /// [`Error::Value`], naming `rows`, for tokens that it has not, or `sequence`, if it is not
    /// open.
    pub fn places(
        &self,
        id: SequenceId,
        rows: Range<usize>,
    ) -> Result<impl ExactSizeIterator<Item = u32> + use<'_, B, T>> {
        self.table.places(id, rows)
    }

    /// The keys of a layer, of [`shape`](Self::shape).
    ///
    /// # Errors
    /// [`Error::Value`], naming `layer`, if there is no such layer.
    pub fn key<'a>(&'a self, backend: &'a B, layer: usize) -> Result<B::View<'a, T>> {
        whole::<B, T>(backend, "key", &self.layer(layer)?[0], self.shape())
    }

    /// The values of a layer, of [`value_shape`](Self::value_shape).
    ///
    /// # Errors
    /// As [`key`](Self::key).
    pub fn value<'a>(&'a self, backend: &'a B, layer: usize) -> Result<B::View<'a, T>> {
        whole::<B, T>(backend, "value", &self.layer(layer)?[1], self.value_shape())
    }

    /// Keys `[1, len, kv_heads, head_dim]` and values `[1, len, kv_heads, value_dim]` of a sequence
    /// in rows.
    ///
    /// # Errors
    /// [`Error::Value`], naming `layer` or `sequence`, if there is none, or `store`, if it is in
    /// pages.
    pub fn rows<'a>(&'a self, backend: &'a B, layer: usize, id: SequenceId) -> Result<[B::View<'a, T>; 2]> {
        self.rows_of(backend, layer, id, self.len(id)?)
    }

    /// The same for its first `len` tokens.
    ///
    /// # Errors
    /// As [`rows`](Self::rows) and [`truncate`](Self::truncate).
    pub fn rows_of<'a>(
        &'a self,
        backend: &'a B,
        layer: usize,
        id: SequenceId,
        len: usize,
    ) -> Result<[B::View<'a, T>; 2]> {
        let [key, value] = self.layer(layer)?;
        let Keys::Rows { batch, .. } = self.keys_of(id, len)? else {
            return Err(Error::value("store", "one in rows", "one in pages"));
        };
        let view = |argument, buffer, all @ [_, page_len, kv_heads, dim]: [usize; 4]| {
            let first = batch * kv_heads * page_len * dim;
            B::view(argument, backend.slice(buffer, first..), [1, len, kv_heads, dim], strides(all))
        };
        Ok([view("key", key, self.shape())?, view("value", value, self.value_shape())?])
    }

    /// Stores new rows of any sequences in a layer. A token that sequences share is written for all
    /// of them; [`extend`](Self::extend) keeps new tokens apart.
    ///
    /// # Errors
    /// As [`Backend::append`]; [`Error::Value`], naming `layer`, if there is no such layer.
    pub fn append<S: Element>(
        &mut self,
        backend: &B,
        layer: usize,
        new: Append<B::View<'_, S>, B::Slice<'_, f32>, B::Slice<'_, u32>>,
    ) -> Result<()> {
        self.layer(layer)?;
        let (shape, value_shape) = (self.shape(), self.value_shape());
        let [key, value] = self.layers[layer].each_mut().map(|buffer| backend.slice_mut(buffer, ..));
        backend.append(
            new,
            B::view_mut("cache_key", key, shape, strides(shape))?,
            B::view_mut("cache_value", value, value_shape, strides(value_shape))?,
        )
    }

    /// Stores keys `[1, rows.len(), kv_heads, head_dim]` and values `[1, rows.len(), kv_heads,
    /// value_dim]` as the tokens `rows` of one sequence in a layer.
    ///
    /// The places go to the backend's memory in each call: an engine of many layers makes them
    /// once, for [`append`](Self::append).
    ///
    /// # Errors
    /// As [`append`](Self::append) and [`places`](Self::places).
    pub fn put<'a, S: Element>(
        &mut self,
        backend: &B,
        layer: usize,
        id: SequenceId,
        rows: Range<usize>,
        [key, value]: [B::View<'a, S>; 2],
    ) -> Result<()>
    where
        B: 'a,
    {
        let places: Vec<u32> = self.places(id, rows)?.collect();
        let places = backend.buffer_of(&places)?;
        self.append(backend, layer, Append::new(key, value, backend.slice(&places, ..)))
    }

    /// Makes room for more: more pages, or in rows more sequences or longer ones. All else in
    /// `config` is as it was. Sequences stay as they are, with new places in rows. Memory is taken
    /// for all of `config` before that in use is given back.
    ///
    /// Plans are made anew, for the new shape. A graph that has captured calls on the store must
    /// not be launched any more: it has the addresses of memory that was given back.
    ///
    /// # Errors
    /// [`Error::Value`] for a config that differs in more than room, or has less; as
    /// [`new`](Self::new) and [`Backend::append`]. The store is then as it was.
    pub fn grow(&mut self, backend: &B, config: KvConfig) -> Result<()> {
        let KvConfig { layers, kv_heads, head_dim, value_dim, .. } = self.config;
        let [pages, page_len, ..] = self.shape();
        let [more_pages, longer, ..] = config.shape();
        let in_rows = self.config.in_rows_mode();
        let room = |in_rows| if in_rows { "rows" } else { "pages" };
        if config.in_rows_mode() != in_rows {
            return Err(Error::value("room", room(in_rows), room(!in_rows)));
        }
        let names = if in_rows { ["sequences", "capacity"] } else { ["pages", "page_len"] };
        for (argument, same, before, after) in [
            ("layers", true, layers, config.layers),
            ("kv_heads", true, kv_heads, config.kv_heads),
            ("head_dim", true, head_dim, config.head_dim),
            ("value_dim", true, value_dim, config.value_dim),
            (names[0], false, pages, more_pages),
            (names[1], !in_rows, page_len, longer),
        ] {
            if after < before || (same && after != before) {
                let expected = if same { before.to_string() } else { format!("at least {before}") };
                return Err(Error::value(argument, expected, after));
            }
        }
        config.validate()?;
        self.table.reserve(more_pages)?;
        let mut grown = allocate(backend, &config)?;
        let planes = (Planes { first: 0, len: page_len }, Planes { first: 0, len: longer });
        let used = self.table.used_rows();
        let dims = [head_dim, value_dim];
        let copy = PlaneCopy::new(backend, dims, planes, pages * kv_heads, |plane| used[plane / kv_heads])?;
        for (from, to) in self.layers.iter().zip(&mut grown) {
            copy.run(backend, from, to)?;
        }
        self.layers = grown;
        self.table.grow(more_pages, longer);
        self.config = config;
        Ok(())
    }

    fn layer(&self, layer: usize) -> Result<&Layer<B, T>> {
        let expected = || format!("below {}", self.layers.len());
        self.layers.get(layer).ok_or_else(|| Error::value("layer", expected(), layer))
    }
}

fn whole<'a, B: Backend, T: Element>(
    backend: &'a B,
    argument: &'static str,
    buffer: &'a B::Buffer<T>,
    shape: [usize; 4],
) -> Result<B::View<'a, T>> {
    B::view(argument, backend.slice(buffer, ..), shape, strides(shape))
}

/// Memory for all layers.
fn allocate<B: Backend, T: Element>(backend: &B, config: &KvConfig) -> Result<Vec<Layer<B, T>>> {
    let [keys, values] = [config.shape(), config.value_shape()].map(|shape| shape.iter().product());
    let mut layers = Vec::new();
    if layers.try_reserve_exact(config.layers).is_err() {
        return Err(Error::value("layers", "a count that memory has room for", config.layers));
    }
    for _ in 0..config.layers {
        layers.push([backend.buffer(keys)?, backend.buffer(values)?]);
    }
    Ok(layers)
}

/// Of a tensor `[pages, page_len, kv_heads, dim]` with heads before rows.
fn strides([_, page_len, kv_heads, dim]: [usize; 4]) -> [usize; 4] {
    [kv_heads * page_len * dim, dim, page_len * dim, 1]
}

impl<B: Backend, T: Element> Debug for KvStore<B, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { config, table, .. } = self;
        f.debug_struct("KvStore").field("config", config).field("table", table).finish_non_exhaustive()
    }
}
