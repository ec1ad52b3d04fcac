//! Keys and values in pages: the same as keys and values one after another.

use crate::backend::Backend;
use crate::call::{kernel_dims, on_each_device, run_plan};
use crate::common::{Rng, Tensor, aligned};
use crate::properties::cases::{Inputs, RUBBISH};
use crate::properties::packed::{Packed, packed};
use proptest::prelude::*;
use star_attention::bf16;
use star_attention::cuda::flash::{PageTable, Plan};
use star_attention::cuda::{Device, HalfElement};

/// Any pages for the sequences' keys, some pages of no one, and now and then more pages than a
/// sequence needs.
pub fn page_table(lens: &[(usize, usize)], page_len: usize, seed: u64) -> PageTable {
    let mut rng = Rng::new(seed);
    let counts: Vec<usize> =
        lens.iter().map(|(_, keys)| keys.div_ceil(page_len) + usize::from(rng.below(4) == 0)).collect();
    let pages = counts.iter().sum::<usize>() + rng.below(3);
    let mut free: Vec<u32> = (0..pages as u32).collect();
    (1..pages).rev().for_each(|i| free.swap(i, rng.below(i + 1)));
    let sequences = lens
        .iter()
        .zip(counts)
        .map(|(&(_, keys), count)| (keys, free.drain(..count).collect::<Vec<u32>>()))
        .collect();
    PageTable { pages, page_len, sequences }
}

/// The rows of packed sequences in their pages; NaN in what holds none.
fn scattered<T: HalfElement>(packed: &Packed, table: &PageTable, rows: &Tensor<T>) -> Tensor<T> {
    let [_, _, kv_heads, dim] = rows.shape();
    let shape = [table.pages, table.page_len, kv_heads, dim];
    let mut paged = Tensor::new("paged", shape, &packed.layouts[1], f32::NAN, |_| f32::NAN);
    for (start, (keys, pages)) in packed.key_offsets().into_iter().zip(&table.sequences) {
        for key in 0..*keys {
            let page = pages[key / table.page_len] as usize;
            for (head, d) in (0..kv_heads).flat_map(|head| (0..dim).map(move |d| (head, d))) {
                paged.set([page, key % table.page_len, head, d], rows.get([0, start + key, head, d]));
            }
        }
    }
    paged
}

/// Every key and value of one of the sequences is NaN: it reaches no other's rows.
pub fn pages_change_nothing<B: Backend, T: HalfElement>(
    packed: &Packed,
    table: &PageTable,
    poisoned: prop::sample::Index,
) -> Result<(), TestCaseError> {
    let backend = B::open(table.pages as u64);
    let (config, shape, properties) = (&packed.config, packed.shape(), backend.device().properties());
    let (query_offsets, key_offsets) = (packed.query_offsets(), packed.key_offsets());
    let mut inputs = packed.inputs::<T>();
    if !packed.lens.is_empty() {
        let sequence = poisoned.index(packed.lens.len());
        inputs.poison(key_offsets[sequence]..key_offsets[sequence + 1], f32::NAN);
    }
    let results = [true, false].map(|paged| {
        let mut out = packed.output::<f32>();
        let mut lse = vec![RUBBISH; shape.lse_len()];
        let (plan, inputs) = if paged {
            let Inputs { query, key, value } = &inputs;
            let [key, value] = [key, value].map(|rows| scattered(packed, table, rows));
            let plan = Plan::paged(&properties, config, &shape, &query_offsets, table);
            (plan, &Inputs { query: query.clone(), key, value })
        } else {
            (Plan::packed(&properties, config, &shape, &query_offsets, &key_offsets), &inputs)
        };
        run_plan(&backend, &plan.unwrap(), inputs, &mut out, Some(&mut lse)).unwrap();
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
    });
    prop_assert!(results[0] == results[1], "other bits from pages");
    Ok(())
}

on_each_device! {
    fn pages_change_no_bit(
        packed in packed(kernel_dims()),
        page_len in 1..=128usize,
        seed in any::<u64>(),
        poisoned in any::<prop::sample::Index>(),
    ) {
        let mut packed = packed;
        packed.layouts = packed.layouts.map(|layout| aligned(&layout));
        let table = page_table(&packed.lens, page_len, seed);
        pages_change_nothing::<B, bf16>(&packed, &table, poisoned)?;
    }
}
