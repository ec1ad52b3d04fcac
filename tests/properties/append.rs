//! New rows go to their places in a cache and nowhere else, keys turned by their positions, and
//! both divided by their scales where there are any.

use super::backend::Stored;
use super::cases::RUBBISH;
use crate::common::{Layout, Rng, Tensor, aligned, as_slices, indices, layouts, scale_of, scales};
use proptest::prelude::*;
use star_attention::{Append, Backend, DType, Element, LEFT_OUT, Rotation, Scales};

/// New rows `[batch, seq]` for pages, some of them to be left out.
#[derive(Clone, Debug)]
pub struct AppendCase {
    /// Of keys, values, and the cache's.
    layouts: [Layout; 4],
    /// Of keys.
    shape: [usize; 4],
    value_dim: usize,
    pages: usize,
    page_len: usize,
    /// Dims that are rotated; 0 for none.
    rotated: usize,
    interleaved: bool,
    pub seed: u64,
}

pub fn appends() -> impl Strategy<Value = AppendCase> {
    let eighths = prop_oneof![2 => (1..=32usize).prop_map(|n| (n, n)), 1 => (1..=32usize, 1..=32usize)];
    let shape = (1..=3usize, 0..=40usize, 1..=4usize, eighths);
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    (shape, (0..=9usize, 1..=33usize), any::<prop::sample::Index>(), any::<bool>(), layouts, any::<u64>())
        .prop_map(
            |((batch, seq, kv_heads, eighths), (pages, page_len), rotated, interleaved, layouts, seed)| {
                let dim = 8 * eighths.0;
                AppendCase {
                    layouts: layouts.map(|layout| aligned(&layout)),
                    shape: [batch, seq, kv_heads, dim],
                    value_dim: 8 * eighths.1,
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

impl AppendCase {
    /// A row's place and position; a tenth of them, and those that find no room, have none.
    fn places(&self, rng: &mut Rng) -> Vec<[u32; 2]> {
        let mut free: Vec<u32> = (0..(self.pages * self.page_len) as u32).collect();
        (0..self.shape[0] * self.shape[1])
            .map(|_| {
                let place = if free.is_empty() || rng.below(10) == 0 {
                    LEFT_OUT
                } else {
                    free.swap_remove(rng.below(free.len()))
                };
                [place, rng.below(POSITIONS) as u32]
            })
            .collect()
    }

    /// The element of a turned key over its scale, and what rounding may change; `angle` gives
    /// cosine and sine of a pair.
    fn turned<T: Element, C: Element>(
        &self,
        key: &Tensor<T>,
        [b, s, h, d]: [usize; 4],
        scale: f32,
        angle: impl Fn(usize) -> [f32; 2],
    ) -> (f64, f64) {
        let at = |d: usize| f64::from(key.get([b, s, h, d]).to_f32());
        if d >= self.rotated {
            return (f64::from(C::from_f32(at(d) as f32 / scale).to_f32()), 0.0);
        }
        let half = self.rotated / 2;
        let (pair, first, x, y) = if self.interleaved {
            (d / 2, d % 2 == 0, d & !1, d | 1)
        } else {
            (d % half, d < half, d % half, d % half + half)
        };
        let [cos, sin] = angle(pair).map(f64::from);
        let terms = if first { [at(x) * cos, -at(y) * sin] } else { [at(x) * sin, at(y) * cos] };
        let terms = terms.map(|term| term / f64::from(scale));
        let exact = terms[0] + terms[1];
        // Half a step, of normal numbers and below these.
        let (unit, least) = match C::DTYPE {
            DType::F16 => (1.0 / 2048.0, 6e-8),
            DType::BF16 => (1.0 / 256.0, 6e-8),
            DType::F8E4M3 => (1.0 / 16.0, 1.0 / 1024.0),
            _ => (0.0, 6e-8),
        };
        let rounding = unit * exact.abs() + 2e-7 * (terms[0].abs() + terms[1].abs()) + least;
        (if C::DTYPE == DType::F8E4M3 { exact.clamp(-448.0, 448.0) } else { exact }, rounding)
    }
}

pub fn each_row_is_in_its_place<B: Backend, T: Element, C: Element>(
    backend: &B,
    case: &AppendCase,
) -> Result<(), TestCaseError> {
    let [_, seq, kv_heads, dim] = case.shape;
    let scales = scales::<C>(kv_heads, case.seed);
    let scales = as_slices(&scales);
    let mut rng = Rng::new(case.seed);
    let [key_layout, value_layout, to_key_layout, to_value_layout] = &case.layouts;
    let value_shape = |[batch, seq, heads, _]: [usize; 4]| [batch, seq, heads, case.value_dim];
    let mut new = |name, shape, layout| Tensor::<T>::new(name, shape, layout, f32::NAN, |_| rng.normal());
    let key = new("key", case.shape, key_layout);
    let value = new("value", value_shape(case.shape), value_layout);
    let places = case.places(&mut rng);
    let half = case.rotated / 2;
    let angles: Vec<f32> =
        (0..POSITIONS * half).map(|i| (i / half) as f32 * 0.7f32.powi((i % half) as i32)).collect();
    let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().copied().map(f).collect::<Vec<f32>>());

    let stored_shape = [case.pages, case.page_len, kv_heads, dim];
    let mut stored = [(stored_shape, to_key_layout), (value_shape(stored_shape), to_value_layout)]
        .map(|(shape, layout)| Tensor::<C>::new("cache", shape, layout, RUBBISH, |_| RUBBISH));
    {
        let [key, value] = [&key, &value].map(|rows| Stored::of(backend, rows));
        let [mut to_key, mut to_value] = stored.each_ref().map(|rows| Stored::of(backend, rows));
        let numbers = |i: usize| places.iter().map(|place| place[i]).collect::<Vec<u32>>();
        let [places, positions] = [0, 1].map(|i| backend.buffer_of(&numbers(i)).unwrap());
        let [cos, sin] = [&cos, &sin].map(|table| backend.buffer_of(table).unwrap());
        let in_memory =
            scales.map(|Scales { key, value, .. }| [key, value].map(|s| backend.buffer_of(s).unwrap()));
        let mut rows =
            Append::new(key.view(backend, "key"), value.view(backend, "value"), backend.slice(&places, ..));
        if case.rotated > 0 {
            rows = rows.with_rotation(Rotation {
                cos: backend.slice(&cos, ..),
                sin: backend.slice(&sin, ..),
                positions: backend.slice(&positions, ..),
                rotated: case.rotated,
                interleaved: case.interleaved,
            });
        }
        if let Some([key, value]) = &in_memory {
            rows = rows.with_scales(Scales::new(backend.slice(key, ..), backend.slice(value, ..)));
        }
        let (cache_key, cache_value) = (to_key.view_mut(backend, "key"), to_value.view_mut(backend, "value"));
        backend.append(rows, cache_key, cache_value).unwrap();
        for (tensor, memory) in stored.iter_mut().zip([&to_key, &to_value]) {
            memory.read_to(backend, tensor);
        }
    }

    let [to_key, to_value] = &stored;
    prop_assert!(to_key.padding_is(RUBBISH) && to_value.padding_is(RUBBISH), "wrote between rows");
    let mut owners = vec![None; case.pages * case.page_len];
    for (row, &[place, position]) in places.iter().enumerate() {
        if let Some(owner) = owners.get_mut(place as usize) {
            *owner = Some((row, position as usize));
        }
    }
    let rubbish = C::from_f32(RUBBISH).to_f32();
    for [page, row, head, d] in indices(to_key.shape()) {
        let got = to_key.get([page, row, head, d]).to_f32();
        let Some((from, position)) = owners[page * case.page_len + row] else {
            prop_assert_eq!(got, rubbish, "wrote a key to a place of no row");
            continue;
        };
        let from = [from / seq, from % seq, head, d];
        let scale = scales.map_or(1.0, |scales| scale_of(scales.key, head));
        let angle = |pair: usize| [cos[position * half + pair], sin[position * half + pair]];
        let (exact, bound) = case.turned::<T, C>(&key, from, scale, angle);
        prop_assert!((f64::from(got) - exact).abs() <= bound, "key {from:?}: {got} for {exact}");
    }
    for [page, row, head, d] in indices(to_value.shape()) {
        let got = to_value.get([page, row, head, d]).to_f32();
        let expected = owners[page * case.page_len + row].map_or(rubbish, |(from, _)| {
            let scale = scales.map_or(1.0, |scales| scale_of(scales.value, head));
            C::from_f32(value.get([from / seq, from % seq, head, d]).to_f32() / scale).to_f32()
        });
        prop_assert_eq!(got.to_bits(), expected.to_bits(), "value {} of page {}", row, page);
    }
    Ok(())
}
