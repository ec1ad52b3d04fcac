//! What batches cost on the CPU, as ratios: each row's two sides take turns in one run.
//!
//! - Ragged: sequences of different lengths in one call, over the sum of calls for its parts alone.
//! - Paged: keys in pages of 16, over the same keys in rows.
//! - Tokens first: keys in `[seq, heads, dim]`, over the same keys in `[heads, seq, dim]`.
//! - Row-invariant: decodes whose bits do not depend on the rows of a call, over plain ones.
//! - Schedule: the time of plans of 256 decodes, and per tile of a long prefill.
//!
//! `cargo bench --bench batches`, and `-- TEXT` for the rows whose name holds a text.

#[path = "common/call.rs"]
mod call;
#[path = "common/random.rs"]
mod random;
#[path = "common/turns.rs"]
mod turns;

use call::Call;
use star_attention::cpu::flash::Plan;
use star_attention::cuda::{self, Properties};
use star_attention::{Batch, Element, Keys, Mask, PlanConfig, Sequence, bf16};
use std::hint::black_box;
use turns::{Turns, median, seconds};

const QUERY_HEADS: usize = 16;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 128;

/// Sequences of so many query rows and keys each, causal, packed one after another; with `page_len`
/// their keys lie in pages, in an order that is not that of memory.
fn call<T: Element>(config: &PlanConfig, lens: &[[usize; 2]], page_len: Option<usize>) -> Call<T> {
    let rows = lens.iter().map(|[rows, _]| rows).sum();
    let keys: usize = lens.iter().map(|[_, keys]| keys).sum();
    let pages = page_len.map(|len| lens.iter().map(|[_, keys]| keys.div_ceil(len)).sum::<usize>());
    let key = match (pages, page_len) {
        (Some(pages), Some(len)) => [pages, len, KV_HEADS, HEAD_DIM],
        _ => [1, keys, KV_HEADS, HEAD_DIM],
    };
    let mut batch = Batch::new([1, rows, QUERY_HEADS, HEAD_DIM], key).unwrap();
    let (mut row, mut first, mut page) = (0, 0, 0);
    for &[rows, keys] in lens {
        let keys_at = match (pages, page_len) {
            (Some(pages), Some(len)) => {
                // A step that is coprime with the pages visits each of them once.
                let step = (pages / 2..).find(|&step| gcd(step, pages) == 1).unwrap_or(1);
                let own = (page..page + keys.div_ceil(len)).map(|page| (page * step % pages) as u32);
                Keys::pages(keys, own.collect::<Vec<u32>>())
            }
            _ => Keys::rows(0, first..first + keys),
        };
        batch.push(Sequence::new(0, row..row + rows, keys_at, Mask::Causal)).unwrap();
        (row, first) = (row + rows, first + keys);
        page += page_len.map_or(0, |len| keys.div_ceil(len));
    }
    Call::of(Plan::for_batch(config, batch).unwrap())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

struct Bench(Turns);

impl Bench {
    /// One call with all sequences, over one call for each of two parts.
    fn ragged<T: Element>(&mut self, name: &str, parts: [Vec<[usize; 2]>; 2]) {
        let name = format!("{name}, {}", T::DTYPE);
        if !self.0.wants(&name) {
            return;
        }
        let config = PlanConfig::new();
        let mut all = call::<T>(&config, &parts.concat(), None);
        let [mut one, mut other] = parts.map(|lens| call::<T>(&config, &lens, None));
        let mut parts = || {
            one.run();
            other.run();
        };
        self.0.compare(&name, &mut || all.run(), &mut parts, 1.0);
    }

    fn paged<T: Element>(&mut self, lens: &[[usize; 2]], page_len: usize) {
        let name =
            format!("decode of {} x {} keys, pages of {page_len}, {}", lens.len(), lens[0][1], T::DTYPE);
        if !self.0.wants(&name) {
            return;
        }
        let mut pages = call::<T>(&PlanConfig::new(), lens, Some(page_len));
        let mut rows = call::<T>(&PlanConfig::new(), lens, None);
        self.0.compare(&name, &mut || pages.run(), &mut || rows.run(), 1.0);
    }

    fn tokens_first<T: Element>(&mut self, lens: &[[usize; 2]]) {
        let name = format!("decode of {} x {} keys, tokens first, {}", lens.len(), lens[0][1], T::DTYPE);
        if !self.0.wants(&name) {
            return;
        }
        let mut tokens_first = call::<T>(&PlanConfig::new(), lens, None);
        tokens_first.key_place = call::TOKENS;
        let mut heads_first = call::<T>(&PlanConfig::new(), lens, None);
        self.0.compare(&name, &mut || tokens_first.run(), &mut || heads_first.run(), 1.0);
    }

    fn row_invariant<T: Element>(&mut self, lens: &[[usize; 2]]) {
        let name = format!("decode of {} x {} keys, row-invariant, {}", lens.len(), lens[0][1], T::DTYPE);
        if !self.0.wants(&name) {
            return;
        }
        let mut invariant = call::<T>(&PlanConfig::new().with_row_invariant(), lens, None);
        let mut plain = call::<T>(&PlanConfig::new(), lens, None);
        self.0.compare(&name, &mut || invariant.run(), &mut || plain.run(), 1.0);
    }
}

/// Sequences of so many query rows and keys each, packed one after another.
fn packed(lens: &[[usize; 2]]) -> Batch {
    let [rows, keys] = [0, 1].map(|i| lens.iter().map(|len| len[i]).sum::<usize>());
    let mut batch = Batch::new([1, rows, QUERY_HEADS, HEAD_DIM], [1, keys, KV_HEADS, HEAD_DIM]).unwrap();
    let (mut row, mut key) = (0, 0);
    for &[rows, keys] in lens {
        let keys_at = Keys::rows(0, key..key + keys);
        batch.push(Sequence::new(0, row..row + rows, keys_at, Mask::Causal)).unwrap();
        (row, key) = (row + rows, key + keys);
    }
    batch
}

/// Prints the time of plans alone, of the CPU and of a GPU (which need not be there), and of their
/// batch.
fn schedule(bench: &Bench) {
    if !bench.0.wants("schedule") {
        return;
    }
    let time = |lens: &[[usize; 2]], work: &dyn Fn(Batch)| {
        let samples = (0..20 * bench.0.pairs).map(|_| {
            let mut batch = Some(packed(lens));
            seconds(&mut || batch.take().into_iter().for_each(work))
        });
        median(samples.collect())
    };
    let config = PlanConfig::new();
    let h100 = Properties::new(132, 228 * 1024, 50 << 20);
    let cpu = |batch: Batch| drop(black_box(Plan::for_batch(&config, batch).unwrap()));
    let cuda = |batch: Batch| drop(black_box(cuda::flash::Plan::for_batch(&h100, &config, &batch).unwrap()));

    let decodes = vec![[1, 4096]; 256];
    let rows = 1 << 20;
    let prefill = [[rows, rows]];
    let batch = time(&decodes, &|_| drop(black_box(packed(&decodes))));
    println!("\nA batch of 256 decodes takes {:.1} µs.", batch * 1e6);
    // Tiles are 128 rows: of the query heads of a KV head on the CPU, of one head on a GPU.
    for (name, plan, tiles) in [
        ("the CPU", &cpu as &dyn Fn(Batch), rows * QUERY_HEADS / KV_HEADS / 128),
        ("a GPU", &cuda, rows / 128),
    ] {
        println!(
            "A plan of them for {name} takes {:.1} µs, one of a prefill of {rows} rows {:.1} ns for each of \
             {tiles} tiles.",
            time(&decodes, plan) * 1e6,
            time(&prefill, plan) * 1e9 / tiles as f64
        );
    }
}

fn main() {
    let turns = Turns::from_args();
    let quick = turns.quick;
    let mut bench = Bench(turns);
    let scale = if quick { 64 } else { 1 };
    let many = |count: usize, rows: usize, keys: usize| vec![[rows, keys / scale]; count];

    bench.ragged::<bf16>("decode, 1 x 64K keys beside 64 x 256", [many(1, 1, 65_536), many(64, 1, 256)]);
    bench.ragged::<f32>("decode, 1 x 64K keys beside 64 x 256", [many(1, 1, 65_536), many(64, 1, 256)]);
    bench.ragged::<bf16>(
        "prefill of 4K beside 31 decodes over 8K keys",
        [many(1, 4096 / scale, 4096), many(31, 1, 8192)],
    );
    bench.ragged::<bf16>(
        "prefill of 4K beside 31 decodes over 32K keys",
        [many(1, 4096 / scale, 4096), many(31, 1, 32_768)],
    );
    bench.ragged::<bf16>("decode, 1 x 1M keys beside 128 x 128", [many(1, 1, 1 << 20), many(128, 1, 128)]);
    for lens in [many(1, 1, 65_536), many(16, 1, 4096)] {
        bench.paged::<f32>(&lens, 16);
        bench.paged::<bf16>(&lens, 16);
        bench.tokens_first::<f32>(&lens);
        bench.tokens_first::<bf16>(&lens);
    }
    for lens in [many(1, 1, 65_536), many(16, 1, 4096)] {
        bench.row_invariant::<f32>(&lens);
        bench.row_invariant::<bf16>(&lens);
    }

    bench.0.print(["one call, pages, tokens first or row-invariant", "parts, rows, heads first or plain"]);
    schedule(&bench);
}
