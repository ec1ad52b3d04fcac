//! Into how many parts the keys of tiles are split.
//!
//! Keys are split where there are too few tiles for the multiprocessors. With `w(s) = tiles · s /
//! places` waves of blocks for `s` splits, the GPU is busy for `w / ⌈w⌉` of the time: the smallest
//! count within 85% of the best is taken (FlashAttention's rule), from one up to as many as leave
//! four tiles of keys for each.

use super::Plan;
use crate::Sequence;
use crate::cuda::Properties;
use crate::cuda::params::StarTile;

/// Tiles of keys below which a split costs more than it saves.
const SPLIT_TILES: usize = 4;
/// More splits than this, and the merge begins to count.
const MAX_SPLITS: usize = 128;

impl Plan {
    /// Splits the keys of every tile into as many parts as fill the device.
    pub(super) fn split(&mut self, properties: &Properties, sequences: &[Sequence]) {
        let unit = self.policy.keys * self.policy.key_warps;
        let longest = self.tiles.iter().map(|tile| tile.end as usize).max().unwrap_or(0);
        let mut most = (longest / (unit * SPLIT_TILES)).min(MAX_SPLITS);
        // The merge counts the tensor's rows in 32 bits.
        if i32::try_from(self.lse_len()).is_err() {
            most = 1;
        }
        // A multiprocessor keeps a KB of each block's shared memory for itself, and has registers
        // for two blocks of these kernels.
        let resident = (properties.shared_bytes / (self.policy.shared_bytes() + 1024)).clamp(1, 2);
        let places = properties.multiprocessors.max(1) * resident;
        self.splits = split_count(self.tiles.len() * self.heads(), places, most);
        if self.splits > 1 {
            let whole = std::mem::take(&mut self.tiles);
            for tile in whole {
                let each = (tile.end as usize).div_ceil(self.splits).next_multiple_of(unit) as u32;
                self.tiles.extend((0..self.splits as u32).map(|split| StarTile {
                    begin: (split * each).min(tile.end),
                    end: ((split + 1) * each).min(tile.end),
                    split,
                    ..tile
                }));
            }
            self.list_merged(sequences);
        }
    }

    /// Lists the rows that the merge of the splits is for, if they are not all there are: partials
    /// of padding hold nothing.
    fn list_merged(&mut self, sequences: &[Sequence]) {
        let seq = self.query[1];
        if sequences.iter().map(|sequence| sequence.rows.len()).sum::<usize>() < self.query[0] * seq {
            let rows = |s: &Sequence| s.rows.start + s.batch * seq..s.rows.end + s.batch * seq;
            self.merged = sequences.iter().flat_map(rows).map(|row| row as u32).collect();
        }
    }
}

/// The number of splits, at most `most`, that keeps `places` busy with `blocks` blocks for each.
fn split_count(blocks: usize, places: usize, most: usize) -> usize {
    // Nearly full, or nothing to split.
    if blocks == 0 || blocks * 5 >= places * 4 || most <= 1 {
        return 1;
    }
    let busy = |splits: usize| {
        let waves = (blocks * splits) as f64 / places as f64;
        waves / waves.ceil()
    };
    let best = (1..=most).map(busy).fold(0.0, f64::max);
    (1..=most).find(|&splits| busy(splits) >= 0.85 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_device() {
        assert_eq!(split_count(8, 264, 1000), 29);
        assert_eq!(split_count(8, 132, 1000), 15);
        // Full, nearly full, nothing to split, no blocks.
        assert_eq!(split_count(264, 264, 64), 1);
        assert_eq!(split_count(212, 264, 64), 1);
        assert_eq!(split_count(8, 264, 1), 1);
        assert_eq!(split_count(0, 264, 64), 1);
        // At most as many as asked for.
        assert_eq!(split_count(1, 264, 16), 14);
    }
}
