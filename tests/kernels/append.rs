//! Rows go to their places and nowhere else, keys turned by their positions.

use crate::backend::Backend;
use crate::call::{Memory, on_each_device};
use crate::common::{Layout, Rng, Tensor, aligned, indices, layouts};
use crate::properties::cases::RUBBISH;
use proptest::prelude::*;
use star_attention::cuda::{HalfElement, Rotation, ShardMut, append};
use star_attention::{DType, Element, bf16, f16};

/// New rows `[batch, seq]` for pages, some of them to be left out.
#[derive(Clone, Debug)]
struct Append {
    /// Of keys, values, and the shard's.
    layouts: [Layout; 4],
    shape: [usize; 4],
    pages: usize,
    page_len: usize,
    /// Dims that are rotated; 0 for none.
    rotated: usize,
    interleaved: bool,
    seed: u64,
}

fn appends() -> impl Strategy<Value = Append> {
    let shape = (1..=3usize, 0..=40usize, 1..=4usize, 1..=32usize);
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    (shape, (0..=9usize, 1..=33usize), any::<prop::sample::Index>(), any::<bool>(), layouts, any::<u64>())
        .prop_map(
            |((batch, seq, kv_heads, eighths), (pages, page_len), rotated, interleaved, layouts, seed)| {
                let dim = 8 * eighths;
                Append {
                    layouts: layouts.map(|layout| aligned(&layout)),
                    shape: [batch, seq, kv_heads, dim],
                    pages,
                    page_len,
                    rotated: 16 * rotated.index(dim / 16 + 1),
                    interleaved,
                    seed,
                }
            },
        )
}

/// Positions that the table of angles has.
const POSITIONS: usize = 50;

impl Append {
    /// A row's place and position; a fifth of them have none, or one that is out of range.
    fn places(&self, rng: &mut Rng) -> Vec<[u32; 2]> {
        let rows = self.pages * self.page_len;
        let mut free: Vec<u32> = (0..rows as u32).collect();
        (0..self.shape[0] * self.shape[1])
            .map(|_| {
                let out_of_range = [u32::MAX, rows as u32][rng.below(2)];
                let place = if free.is_empty() || rng.below(10) == 0 {
                    out_of_range
                } else {
                    free.swap_remove(rng.below(free.len()))
                };
                let late = [POSITIONS as u32, u32::MAX][rng.below(2)];
                [place, if rng.below(10) == 0 { late } else { rng.below(POSITIONS) as u32 }]
            })
            .collect()
    }

    /// The element of a turned key, and what rounding may change; `angle` gives cosine and sine of a pair.
    fn turned<T: Element>(
        &self,
        key: &Tensor<T>,
        [b, s, h, d]: [usize; 4],
        angle: impl Fn(usize) -> [f32; 2],
    ) -> (f64, f64) {
        let at = |d: usize| f64::from(key.get([b, s, h, d]).to_f32());
        if d >= self.rotated {
            return (at(d), 0.0);
        }
        let half = self.rotated / 2;
        let (pair, first, x, y) = if self.interleaved {
            (d / 2, d % 2 == 0, d & !1, d | 1)
        } else {
            (d % half, d < half, d % half, d % half + half)
        };
        let [cos, sin] = angle(pair).map(f64::from);
        let terms = if first { [at(x) * cos, -at(y) * sin] } else { [at(x) * sin, at(y) * cos] };
        let exact = terms[0] + terms[1];
        let unit = if T::DTYPE == DType::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 };
        (exact, unit * exact.abs() + 2e-7 * (terms[0].abs() + terms[1].abs()) + 6e-8)
    }
}

fn each_row_is_in_its_place<B: Backend, T: HalfElement>(case: &Append) -> Result<(), TestCaseError> {
    let backend = B::open(case.seed);
    let [_, seq, kv_heads, dim] = case.shape;
    let mut rng = Rng::new(case.seed);
    let [key_layout, value_layout, to_key_layout, to_value_layout] = &case.layouts;
    let mut new = |name, layout| Tensor::<T>::new(name, case.shape, layout, f32::NAN, |_| rng.normal());
    let (key, value) = (new("key", key_layout), new("value", value_layout));
    let places = case.places(&mut rng);
    let half = case.rotated / 2;
    let angles: Vec<f32> =
        (0..POSITIONS * half).map(|i| (i / half) as f32 * 0.7f32.powi((i % half) as i32)).collect();
    let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().copied().map(f).collect::<Vec<f32>>());

    let stored_shape = [case.pages, case.page_len, kv_heads, dim];
    let mut stored = [to_key_layout, to_value_layout]
        .map(|layout| Tensor::<T>::new("shard", stored_shape, layout, RUBBISH, |_| RUBBISH));
    {
        let [key, value] = [&key, &value].map(|rows| Memory::of(&backend, rows));
        let [mut to_key, mut to_value] = stored.each_ref().map(|rows| Memory::of(&backend, rows));
        let [places, positions] =
            [0, 1].map(|i| backend.memory(&places.iter().map(|place| place[i]).collect::<Vec<u32>>()));
        let [cos, sin] = [&cos, &sin].map(|table| backend.memory(table));
        let rotation = (case.rotated > 0).then(|| Rotation {
            cos: backend.span(&cos),
            sin: backend.span(&sin),
            positions: backend.span(&positions),
            rotated: case.rotated,
            interleaved: case.interleaved,
        });
        append(
            backend.device(),
            backend.stream(),
            &key.view(&backend, "key"),
            &value.view(&backend, "value"),
            &backend.span(&places),
            rotation.as_ref(),
            &mut ShardMut {
                key: to_key.view_mut(&backend, "shard"),
                value: to_value.view_mut(&backend, "shard"),
            },
        )
        .unwrap();
        for (tensor, memory) in stored.iter_mut().zip([&to_key, &to_value]) {
            tensor.buffer_mut().copy_from_slice(&backend.read(&memory.memory));
        }
    }

    let [to_key, to_value] = &stored;
    prop_assert!(to_key.padding_is(RUBBISH) && to_value.padding_is(RUBBISH), "wrote between rows");
    let mut owners = vec![None; case.pages * case.page_len];
    for (row, &[place, position]) in places.iter().enumerate() {
        let known = case.rotated == 0 || (position as usize) < POSITIONS;
        if let Some(owner) = owners.get_mut(place as usize).filter(|_| known) {
            *owner = Some((row, position as usize));
        }
    }
    for [page, row, head, d] in indices(stored_shape) {
        let got = [to_key, to_value].map(|rows| f64::from(rows.get([page, row, head, d]).to_f32()));
        let Some((from, position)) = owners[page * case.page_len + row] else {
            let rubbish = f64::from(T::from_f32(RUBBISH).to_f32());
            prop_assert_eq!(got, [rubbish; 2], "wrote to a place of no row");
            continue;
        };
        let from = [from / seq, from % seq, head, d];
        prop_assert_eq!(got[1], f64::from(value.get(from).to_f32()));
        let angle = |pair: usize| [cos[position * half + pair], sin[position * half + pair]];
        let (exact, bound) = case.turned(&key, from, angle);
        prop_assert!((got[0] - exact).abs() <= bound, "key {from:?}: {} for {exact}", got[0]);
    }
    Ok(())
}

on_each_device! {
    fn rows_go_to_their_places(case in appends(), bf in any::<bool>()) {
        if bf {
            each_row_is_in_its_place::<B, bf16>(&case)?;
        } else {
            each_row_is_in_its_place::<B, f16>(&case)?;
        }
    }
}
