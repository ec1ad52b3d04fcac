//! What all ranks say, and whether it is right.

use crate::Sizes;
use crate::check::{Errors, Visible};
use crate::rank::Outcome;
use crate::table::{bytes, table, time};
use star_attention::comm::{Collective, Traffic};
use star_attention::{Element, Result};

/// Query rows that are compared with the oracle, over all heads.
const CHECKED_ROWS: usize = 4;

/// FNV-1a, a word at a time.
pub fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let fold = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    words.into_iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

/// Gathers all ranks' figures; on rank 0 prints them. Whether this rank found everything right.
pub fn report<T: Element>(group: &dyn Collective, sizes: &Sizes, outcome: &Outcome) -> Result<bool> {
    const WORDS: usize = 7;
    let times = [outcome.attention, outcome.message, outcome.merge].map(|time| time.as_nanos() as u64);
    let sent = [outcome.traffic.collectives, outcome.traffic.messages, outcome.traffic.bytes];
    let bits = outcome.out.iter().chain(&outcome.lse);
    let checksum = checksum(bits.map(|x| u64::from(x.to_bits())));
    let mine: Vec<u8> =
        [&times[..], &sent, &[checksum]].concat().iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut all = vec![0; group.size() * mine.len()];
    group.all_gather(&mine, &mut all)?;
    let words: Vec<u64> =
        all.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
    let same = words.chunks_exact(WORDS).all(|rank| rank[6] == checksum);
    // An engine may send a long message in pieces.
    let counted = |traffic: &Traffic| (traffic.collectives, traffic.bytes);
    let as_planned = counted(&outcome.traffic) == counted(&outcome.planned);
    if group.rank() != 0 {
        return Ok(same && as_planned);
    }

    let seconds = |nanoseconds: u64| nanoseconds as f64 * 1e-9;
    let headings = ["rank", "keys", "attention", "message", "merge", "sent", "messages", "merged outputs"];
    let mut rows = vec![headings.map(String::from).to_vec()];
    for (rank, words) in words.chunks_exact(WORDS).enumerate() {
        rows.push(vec![
            rank.to_string(),
            sizes.shards[rank % sizes.shards.len()].to_string(),
            time(seconds(words[0])),
            time(seconds(words[1])),
            time(seconds(words[2])),
            bytes(words[5] as f64),
            words[4].to_string(),
            format!("{:016x}", words[6]),
        ]);
    }
    print!("{}", table(&rows));
    println!(
        "a layer, median of {}; {}; {} bytes in {} messages by the formula, {} sent",
        sizes.layers,
        outcome.way,
        outcome.planned.bytes,
        outcome.planned.messages,
        if as_planned { "as many" } else { "OTHERS" },
    );
    println!(
        "merged outputs: {}",
        if same { "the same bits on every rank" } else { "OTHER BITS ON OTHER RANKS" }
    );
    let errors = errors::<T>(group.size(), sizes, outcome)?;
    println!(
        "{} rows of heads compared with one attention over all keys: error {:.1e} of {:.1e}, log-sum-exp {:.1e}: {}",
        errors.rows,
        errors.out,
        errors.bound(),
        errors.lse,
        if errors.within() { "within the bound" } else { "ABOVE THE BOUND" }
    );
    Ok(same && as_planned && errors.within())
}

/// Rows from first to last against the oracle.
fn errors<T: Element>(ranks: usize, sizes: &Sizes, outcome: &Outcome) -> Result<Errors> {
    let query = sizes.query::<T>();
    let shards: Vec<_> = (0..ranks).map(|rank| sizes.shard::<T>(rank)).collect();
    let mut errors = Errors::default();
    let count = CHECKED_ROWS.min(sizes.query_len);
    for head in 0..sizes.heads {
        let kv_head = head / (sizes.heads / sizes.kv_heads);
        let visible = Visible {
            keys: shards.iter().flat_map(|shard| shard.key.head(kv_head)).collect(),
            values: shards.iter().flat_map(|shard| shard.value.head(kv_head)).collect(),
        };
        for row in (0..count).map(|i| i * (sizes.query_len - 1) / (count - 1).max(1)) {
            let out = &outcome.out[(row * sizes.heads + head) * sizes.head_dim..][..sizes.head_dim];
            errors.see(query.row(row, head), &visible, out, outcome.lse[head * sizes.query_len + row])?;
        }
    }
    Ok(errors)
}
