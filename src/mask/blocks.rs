//! A block-sparse mask of any kind.

use crate::{Error, Result};
use std::ops::Range;

/// The ranges of keys that each tile of query rows sees, as sparse methods choose them (MInference,
/// XAttention, FlexPrefill, MoBA): a list in CSR form.
///
/// Tile `t` is the sequence's rows `t * tile_rows..(t + 1) * tile_rows` of the call, the last
/// perhaps fewer. A row sees the keys of its tile's ranges; of a [`causal`](Self::causal) list only
/// those up to its position.
///
/// ```
/// use star_attention::{BlockList, Mask};
///
/// # fn main() -> star_attention::Result<()> {
/// // 256 rows in two tiles: both see the first 64 keys, and each the diagonal.
/// let blocks = BlockList::new(128, &[0, 1, 3], &[0..128, 0..64, 128..256])?.causal();
/// let mask = Mask::from(blocks);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockList {
    tile_rows: usize,
    causal: bool,
    /// Ranges `offsets[t]..offsets[t + 1]` are those of tile `t`.
    offsets: Vec<usize>,
    ranges: Vec<Range<usize>>,
    /// For each range, the keys in those before it of its tile.
    before: Vec<usize>,
    /// The end of the last key of any range.
    key_end: usize,
}

impl BlockList {
    /// Tiles of `tile_rows` rows, of which tile `t` sees the keys of
    /// `ranges[offsets[t]..offsets[t + 1]]`. Ranges ascend within a tile and do not overlap; a tile
    /// may have none.
    ///
    /// # Errors
    /// [`Error::Value`], naming the place: for tiles of no rows, offsets that do not ascend from 0
    /// to the number of ranges, and ranges that are empty, overlap or do not ascend.
    pub fn new(tile_rows: usize, offsets: &[usize], ranges: &[Range<usize>]) -> Result<Self> {
        if tile_rows == 0 {
            return Err(Error::value("tile_rows", "at least 1", tile_rows));
        }
        let bounds = offsets.first() == Some(&0) && offsets.last() == Some(&ranges.len());
        if let Some(tile) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
            let expected = format!("offsets that ascend (tile {tile})");
            return Err(Error::value("row_offsets", expected, format!("{:?}", &offsets[tile..tile + 2])));
        }
        if !bounds {
            let expected = format!("offsets from 0 to {}, the number of ranges", ranges.len());
            let got = format!("{:?} to {:?}", offsets.first(), offsets.last());
            return Err(Error::value("row_offsets", expected, got));
        }
        let mut before = Vec::with_capacity(ranges.len());
        for (tile, pair) in offsets.windows(2).enumerate() {
            let (mut keys, mut end) = (0, 0);
            for (index, range) in ranges[pair[0]..pair[1]].iter().enumerate() {
                if range.start < end || range.is_empty() {
                    let expected = format!("a range of keys from {end} on (tile {tile}, range {index})");
                    return Err(Error::value("row_ranges", expected, format!("{range:?}")));
                }
                before.push(keys);
                keys += range.len();
                end = range.end;
            }
        }
        let key_end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        Ok(Self {
            tile_rows,
            causal: false,
            offsets: offsets.to_vec(),
            ranges: ranges.to_vec(),
            before,
            key_end,
        })
    }

    /// The same list, of whose ranges a row sees the keys up to its position.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// Whether rows see keys up to their position only.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// Rows of a tile.
    pub fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// How many tiles there are.
    pub fn tiles(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The ranges of a tile; none if there is no such tile.
    pub fn ranges(&self, tile: usize) -> &[Range<usize>] {
        match self.offsets.get(tile..tile.saturating_add(2)) {
            Some(&[start, end]) => &self.ranges[start..end],
            _ => &[],
        }
    }

    /// Ranges of all tiles.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Keys in all ranges of a tile: the length of its list.
    pub(crate) fn len(&self, tile: usize) -> usize {
        let end = self.offsets[tile + 1];
        if end == self.offsets[tile] { 0 } else { self.before[end - 1] + self.ranges[end - 1].len() }
    }

    /// The ranges of a tile, each with the entry of the tile's list that its first key is.
    pub(crate) fn entries(&self, tile: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let own = self.offsets[tile]..self.offsets[tile + 1];
        self.before[own.clone()].iter().copied().zip(self.ranges[own].iter().cloned())
    }

    /// The key of an entry of a tile's list, and how many entries from it on are keys in a row.
    pub(crate) fn key(&self, tile: usize, entry: usize) -> (usize, usize) {
        let own = self.offsets[tile]..self.offsets[tile + 1];
        let index = own.start + self.before[own].partition_point(|&before| before <= entry) - 1;
        let key = self.ranges[index].start + (entry - self.before[index]);
        (key, self.ranges[index].end - key)
    }

    pub(super) fn check(&self, query_len: usize, key_len: usize) -> Result<()> {
        if self.tiles() != query_len.div_ceil(self.tile_rows) {
            let tiles = query_len.div_ceil(self.tile_rows);
            let expected = format!("{tiles} tiles of {} rows for {query_len} rows", self.tile_rows);
            return Err(Error::value("row_offsets", expected, self.tiles()));
        }
        if self.key_end > key_len {
            let tile =
                (0..self.tiles()).find(|&tile| self.ranges(tile).last().is_some_and(|r| r.end > key_len));
            let expected = format!("keys below {key_len} (tile {})", tile.unwrap_or(0));
            return Err(Error::value("row_ranges", expected, self.key_end));
        }
        Ok(())
    }
}
