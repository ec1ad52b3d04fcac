//! The KV rows a rank keeps for one layer: preallocated, append only.

use crate::config::check_rows;
use crate::{Element, Error, Result, TensorView};

/// Keys and values of one layer on one rank, of a fixed capacity.
///
/// Rows are stored `[batch, kv_heads, capacity, head_dim]`, so that a head's keys stream from contiguous memory; the views
/// are `[batch, len, kv_heads, head_dim]`, as everywhere. The anchor's rows are dropped by never appending them:
/// append `narrow(1, kept.start, kept.len())` of the layer's keys and values.
#[derive(Clone, Debug)]
pub struct KvShard<T> {
    keys: Vec<T>,
    values: Vec<T>,
    batch: usize,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
}

impl<T: Element> KvShard<T> {
    /// An empty shard with room for `capacity` tokens of each of `batch` sequences.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent but the capacity is 0, or memory has no room for so many tokens.
    pub fn new(batch: usize, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Self> {
        for (argument, extent) in [("batch", batch), ("kv_heads", kv_heads), ("head_dim", head_dim)] {
            if extent == 0 {
                return Err(Error::value(argument, "at least 1", extent));
            }
        }
        let elements = [batch, kv_heads, head_dim]
            .iter()
            .try_fold(capacity, |n, &extent| n.checked_mul(extent))
            .ok_or_else(|| Error::value("capacity", "a size that can be addressed", capacity))?;
        let buffer = || {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(elements).map(|()| {
                buffer.resize(elements, T::default());
                buffer
            })
        };
        let (Ok(keys), Ok(values)) = (buffer(), buffer()) else {
            return Err(Error::value("capacity", "a size that memory has room for", capacity));
        };
        Ok(Self { keys, values, batch, kv_heads, head_dim, capacity, len: 0 })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of the keys and values held.
    pub fn bytes(&self) -> usize {
        2 * self.batch * self.kv_heads * self.len * self.head_dim * T::DTYPE.size()
    }

    /// Forgets all tokens past the first `len`; keeps the memory.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends `n` tokens, `key` and `value` both `[batch, n, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] (the last axis must be contiguous) or [`Error::Capacity`]; the shard is then as it was.
    pub fn append(&mut self, key: TensorView<'_, T>, value: TensorView<'_, T>) -> Result<()> {
        let tokens = key.shape()[1];
        let expected = [self.batch, tokens, self.kv_heads, self.head_dim];
        check_rows("key", expected, key.shape(), key.strides())?;
        check_rows("value", expected, value.shape(), value.strides())?;
        if tokens > self.capacity - self.len {
            return Err(Error::Capacity { capacity: self.capacity, len: self.len, requested: tokens });
        }
        for (to, from) in [(&mut self.keys, key), (&mut self.values, value)] {
            let [batch_stride, seq_stride, head_stride, _] = from.strides();
            for (plane, rows) in to.chunks_exact_mut(self.capacity.max(1) * self.head_dim).enumerate() {
                let (batch, head) = (plane / self.kv_heads, plane % self.kv_heads);
                let rows = &mut rows[self.len * self.head_dim..][..tokens * self.head_dim];
                for (token, row) in rows.chunks_exact_mut(self.head_dim).enumerate() {
                    let start = batch * batch_stride + token * seq_stride + head * head_stride;
                    row.copy_from_slice(&from.data()[start..start + self.head_dim]);
                }
            }
        }
        self.len += tokens;
        Ok(())
    }

    /// The keys held, `[batch, len, kv_heads, head_dim]`.
    pub fn keys(&self) -> TensorView<'_, T> {
        self.view(&self.keys)
    }

    /// The values held, `[batch, len, kv_heads, head_dim]`.
    pub fn values(&self) -> TensorView<'_, T> {
        self.view(&self.values)
    }

    fn view<'a>(&self, data: &'a [T]) -> TensorView<'a, T> {
        let shape = [self.batch, self.kv_heads, self.capacity, self.head_dim];
        TensorView::contiguous("shard", data, shape)
            .and_then(|view| view.swap_seq_heads().narrow(1, 0, self.len))
            .expect("the shard's buffers have its shape, and len is at most capacity")
    }
}
