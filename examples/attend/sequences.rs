//! The batch that a file's tensors describe.

use crate::Result;
use crate::file::{File, Numbers};
use star_attention::{Batch, Keys, Mask, Sequence};
use std::ops::Range;

/// The sequences of a file, without their masks.
pub struct Sequences {
    /// The shapes of q and k.
    query: [usize; 4],
    key: [usize; 4],
    /// The last axis of v.
    value_dim: usize,
    /// Index on the batch axis and query rows of each.
    rows: Vec<(usize, Range<usize>)>,
    keys: Vec<Keys>,
}

impl Sequences {
    pub fn of(file: &File<'_>) -> Result<Self> {
        let [query, key, value] = file.inputs.each_ref().map(|input| input.shape);
        let value_dim = value[3];
        if key[..3] != value[..3] {
            return Err(format!(
                "v: expected shape {:?} as k has, got {value:?}",
                [key[0], key[1], key[2], value_dim]
            ));
        }
        if value_dim == 0 {
            return Err(format!("v: expected a last axis of at least 1, got {value:?}"));
        }
        let rows = match &file.numbers("query_offsets")? {
            Some(offsets) => packed(offsets, "q", query)?,
            None => (0..query[0]).map(|batch| (batch, 0..query[1])).collect(),
        };
        let [offsets, lens, page_table] =
            ["key_offsets", "key_lens", "page_table"].map(|name| file.numbers(name));
        let keys = keys(rows.len(), key, offsets?, lens?, page_table?)?;
        Ok(Self { query, key, value_dim, rows, keys })
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The batch of these sequences, each with its mask.
    pub fn batch(&self, masks: Vec<Mask>) -> Result<Batch> {
        let batch = Batch::new(self.query, self.key).and_then(|batch| batch.with_value_dim(self.value_dim));
        let mut batch = batch.map_err(|e| e.to_string())?;
        for (((index, rows), keys), mask) in self.rows.iter().zip(&self.keys).zip(masks) {
            let sequence = Sequence::new(*index, rows.clone(), keys.clone(), mask);
            batch.push(sequence).map_err(|e| e.to_string())?;
        }
        Ok(batch)
    }
}

/// Rows `[batch, seq]` of each sequence, packed on the seq axis of a batch of 1.
fn packed(offsets: &Numbers, tensor: &str, shape: [usize; 4]) -> Result<Vec<(usize, Range<usize>)>> {
    let name = offsets.name;
    if shape[0] != 1 {
        return Err(format!("{tensor}: expected batch 1 with {name}, got {}", shape[0]));
    }
    let ends = offsets.lengths()?;
    if offsets.shape.len() != 1 || ends.is_empty() {
        return Err(format!("{name}: expected shape [sequences + 1], got {:?}", offsets.shape));
    }
    if ends[0] != 0 || !ends.is_sorted() || ends[ends.len() - 1] > shape[1] {
        return Err(format!(
            "{name}: expected offsets that ascend from 0 to at most {}, got {ends:?}",
            shape[1]
        ));
    }
    Ok(ends.windows(2).map(|ends| (0, ends[0]..ends[1])).collect())
}

/// The keys of each of `count` sequences.
fn keys(
    count: usize,
    shape: [usize; 4],
    offsets: Option<Numbers>,
    lens: Option<Numbers>,
    page_table: Option<Numbers>,
) -> Result<Vec<Keys>> {
    let lens = match &lens {
        Some(lens) => {
            lens.check_shape(&[count])?;
            Some(lens.lengths()?)
        }
        None => None,
    };
    if let Some(table) = page_table {
        if offsets.is_some() {
            return Err("key_offsets: not with page_table".into());
        }
        let lens = lens.ok_or("key_lens: needed with page_table")?;
        let width = table.shape.get(1).copied().unwrap_or(0);
        table.check_shape(&[count, width])?;
        let pages = |index: usize| {
            let row = &table.data[index * width..][..width];
            // Unused slots end a row, and whatever is negative is one.
            row.iter().map_while(|&page| u32::try_from(page).ok()).collect::<Vec<u32>>()
        };
        return Ok(lens.iter().enumerate().map(|(index, &len)| Keys::pages(len, pages(index))).collect());
    }
    let rows = match &offsets {
        Some(offsets) => packed(offsets, "k", shape)?,
        None => (0..shape[0]).map(|batch| (batch, 0..shape[1])).collect(),
    };
    if rows.len() != count {
        let (name, got) = if offsets.is_some() { ("key_offsets", rows.len()) } else { ("k", shape[0]) };
        return Err(format!("{name}: expected {count} sequences as q has, got {got}"));
    }
    let lens = lens.unwrap_or_else(|| rows.iter().map(|(_, rows)| rows.len()).collect());
    let mut keys = Vec::with_capacity(count);
    for (index, ((batch, rows), len)) in rows.into_iter().zip(lens).enumerate() {
        if len > rows.len() {
            return Err(format!("key_lens: sequence {index}: expected at most {}, got {len}", rows.len()));
        }
        keys.push(Keys::rows(batch, rows.start..rows.start + len));
    }
    Ok(keys)
}
