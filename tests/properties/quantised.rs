//! Keys and values in fp8, and their scales: in attention, on their way to a cache, and in one.

use super::backend::{On, Stored, read_store};
use super::batches::{BatchCase, each_sequence_of_a_batch_stands_alone};
use super::cases::{Inputs, RUBBISH};
use crate::common::{Layout, Rng, Tensor, extents, indices, named, scale_of};
use proptest::prelude::*;
use star_attention::{
    Append, AttentionShape, Backend, Batch, DType, Element, Error, F8E4M3, Keys, KvConfig, KvStore, Mask,
    PlanConfig, Rotation, Scales, Sequence,
};

/// Plans that split keys by themselves, at given places, and for any number of rows.
pub fn plans() -> impl Strategy<Value = PlanConfig> {
    let plain = PlanConfig::new();
    prop::sample::select(vec![
        plain,
        plain.with_split_keys(64),
        plain.with_split_keys(192),
        plain.with_row_invariant(),
        plain.with_row_invariant().with_split_keys(96),
    ])
}

/// Each sequence of a batch gets what the definition gives for its codes and scales.
pub fn attention_equals_the_oracle<B: Backend, Q: Element, O: Element>(
    by: &On<B>,
    case: &BatchCase,
    config: &PlanConfig,
) -> Result<(), TestCaseError> {
    each_sequence_of_a_batch_stands_alone::<Q, F8E4M3, O>(case, |batch, score, inputs, out, lse| {
        let (sinks, scales) = (case.sinks(), case.scales::<F8E4M3>());
        let call = inputs.call(sinks.as_deref(), &scales);
        by.run_call(&config.with_score(*score), batch, call, out, lse).unwrap();
    })
}

const QUERY_HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// No scales, one for all heads, and one for each.
fn scales_of_each_kind() -> [Option<Scales<Vec<f32>>>; 3] {
    [None, Some(Scales::new(vec![0.03], vec![1.7])), Some(Scales::new(vec![0.002, 0.5], vec![40.0, 0.007]))]
}

/// The scales of a head's keys and values.
fn of_head(scales: &Option<Scales<Vec<f32>>>, kv_head: usize) -> [f64; 2] {
    let of = |scales: &Scales<Vec<f32>>| [&scales.key, &scales.value].map(|s| scale_of(s, kv_head).into());
    scales.as_ref().map_or([1.0; 2], of)
}

/// What rounding to a type may change.
fn rounding<O: Element>(exact: f64) -> f64 {
    match O::DTYPE {
        DType::F16 => exact.abs() / 2048.0 + 3e-8,
        DType::BF16 => exact.abs() / 256.0,
        _ => 0.0,
    }
}

/// Rows that see one key have its score for a log-sum-exp and its value for an output, for each of
/// the 256 codes in the key and in the value: to a few units of f32's roundoff, as nothing else is
/// summed. NaN in the key makes NaN of the row, and in the value of its column.
pub fn every_code_counts_for_what_it_says<B: Backend, Q: Element, O: Element>(
    by: &On<B>,
    [head_dim, value_dim]: [usize; 2],
    rows: usize,
) {
    let shape = extents([256, rows, 1], [QUERY_HEADS, KV_HEADS], [head_dim, value_dim]);
    let code = |code: usize| F8E4M3::from_bits(code as u8);
    // One element of a key is not 0.
    let place = |code: usize, head: usize| (7 * code + head) % head_dim;
    let key_code = |[b, _, head, d]: [usize; 4]| match place(b, head) == d {
        true => code(b),
        false => code((d % 2) << 7),
    };
    let value_code = |[b, _, head, d]: [usize; 4]| code((b + 5 * d + 131 * head) & 255);
    let mut rng = Rng::new(1);
    let inputs = Inputs::<Q, F8E4M3> {
        query: Tensor::normal("query", shape.query_shape(), &mut rng),
        key: Tensor::contiguous("key", shape.key_shape(), |at| key_code(at).to_f32()),
        value: Tensor::contiguous("value", shape.value_shape(), |at| value_code(at).to_f32()),
    };
    let batch = Batch::uniform(&shape, &Mask::Full).unwrap();
    for scales in scales_of_each_kind() {
        let mut out = Tensor::<O>::contiguous("out", shape.out_shape(), |_| RUBBISH);
        let mut lse = vec![RUBBISH; shape.lse_len()];
        by.run_call(&PlanConfig::new(), &batch, inputs.call(None, &scales), &mut out, Some(&mut lse))
            .unwrap();
        let near = |got: f32, exact: f64, more: f64| {
            (got.is_nan() && exact.is_nan()) || (f64::from(got) - exact).abs() <= 1e-6 * exact.abs() + more
        };
        for [b, row, head, d] in indices(shape.out_shape()) {
            let kv_head = head / shape.group();
            let [key_scale, value_scale] = of_head(&scales, kv_head);
            let of_query = f64::from(inputs.query.get([b, row, head, place(b, kv_head)]).to_f32());
            let score = of_query * key_scale * f64::from(code(b).to_f32()) / (head_dim as f64).sqrt();
            let lse = lse[(b * QUERY_HEADS + head) * rows + row];
            assert!(near(lse, score, 1e-30), "code {b:#x} as a key: lse {lse:e} for {score:e}, {scales:?}");
            let value = value_code([b, 0, kv_head, d]);
            let exact = match score.is_nan() {
                true => f64::NAN,
                false => value_scale * f64::from(value.to_f32()),
            };
            let got = out.get([b, row, head, d]).to_f32();
            assert!(
                near(got, exact, rounding::<O>(exact)),
                "code {:#x} as a value of key {b:#x}, d {d}: {got:e} for {exact:e}, {scales:?}",
                value.to_bits()
            );
        }
    }
}

/// Under a causal mask, and where each row is a sequence over the same keys, of which those of a
/// head lie apart or side by side, a NaN in a key makes NaN of the rows that see it, and one in a
/// value of its column in these rows; all else keeps its bits. `keys_keep_bits`: also the other
/// rows of the mask where the NaN is in a key, which may move the base of their scores.
pub fn nan_reaches_the_rows_that_see_it<B: Backend, Q: Element, O: Element>(
    by: &On<B>,
    [head_dim, value_dim]: [usize; 2],
    (rows, keys, at): (usize, usize, usize),
    keys_keep_bits: bool,
) {
    let shape = extents([1, rows, keys], [QUERY_HEADS, KV_HEADS], [head_dim, value_dim]);
    let mut rng = Rng::new(2);
    let query = Tensor::<Q>::normal("query", shape.query_shape(), &mut rng);
    let [key, value] =
        [shape.key_shape(), shape.value_shape()].map(|s| Tensor::<F8E4M3>::normal("rows", s, &mut rng));
    let inputs_in = |layout: &Layout| {
        let [key, value] = [&key, &value].map(|rows| {
            Tensor::new("rows", rows.shape(), layout, f32::NAN, |index| rows.get(index).to_f32())
        });
        Inputs { query: query.clone(), key, value }
    };
    let [_, _, scales] = scales_of_each_kind();
    let together = Batch::uniform(&shape, &Mask::Causal).unwrap();
    let mut alone = Batch::new(shape.query_shape(), shape.key_shape()).unwrap();
    alone = alone.with_value_dim(value_dim).unwrap();
    for row in 0..rows {
        let keys = Keys::rows(0, 0..keys - rows + row + 1);
        alone.push(Sequence::new(0, row..row + 1, keys, Mask::Full)).unwrap();
    }
    let run = |batch: &Batch, inputs: &Inputs<Q, F8E4M3>| {
        let mut out = Tensor::<O>::contiguous("out", shape.out_shape(), |_| RUBBISH);
        let mut lse = vec![RUBBISH; shape.lse_len()];
        by.run_call(&PlanConfig::new(), batch, inputs.call(None, &scales), &mut out, Some(&mut lse)).unwrap();
        (out, lse)
    };
    let heads_first = Layout { order: [0, 2, 1], ..Layout::CONTIGUOUS };
    let forms = [
        (&together, Layout::CONTIGUOUS, keys_keep_bits),
        (&alone, Layout::CONTIGUOUS, true),
        (&alone, heads_first, true),
    ];
    // In the second KV head.
    let spots = [(true, 0, 0x7f), (true, head_dim - 1, 0xff), (false, 0, 0xff), (false, value_dim - 1, 0x7f)];
    let sees = |row: usize, head: usize| head / shape.group() == 1 && at <= keys - rows + row;
    // Single rows of many would be long on the emulator, and show no more.
    for (batch, layout, keys_keep_bits) in forms.into_iter().take(if rows > 16 { 1 } else { 3 }) {
        let mut inputs = inputs_in(&layout);
        let (clean, clean_lse) = run(batch, &inputs);
        assert!(clean.values().chain(clean_lse.iter().copied()).all(f32::is_finite));
        for (in_key, d, code) in spots {
            let place = [0, at, 1, d];
            let exchange = |inputs: &mut Inputs<Q, F8E4M3>, code| {
                let tensor = if in_key { &mut inputs.key } else { &mut inputs.value };
                let before = tensor.get(place);
                tensor.set(place, code);
                before
            };
            let before = exchange(&mut inputs, F8E4M3::from_bits(code));
            let (out, lse) = run(batch, &inputs);
            exchange(&mut inputs, before);
            let kept = |got: f32, clean: f32| {
                got.to_bits() == clean.to_bits() || (in_key && !keys_keep_bits && got.is_finite())
            };
            for [_, row, head, column] in indices(shape.out_shape()) {
                let hit = sees(row, head) && (in_key || column == d);
                let [got, clean] = [&out, &clean].map(|out| out.get([0, row, head, column]).to_f32());
                let what = if in_key { "key" } else { "value" };
                assert!(
                    if hit { got.is_nan() } else { kept(got, clean) },
                    "{got} for {clean} in row {row} of {rows}, head {head}, column {column}; {code:#x} in {what} {at} of {keys}"
                );
            }
            for (row, head) in (0..rows).flat_map(|row| (0..QUERY_HEADS).map(move |head| (row, head))) {
                let [got, clean] = [&lse, &clean_lse].map(|lse| lse[head * rows + row]);
                let right = if in_key && sees(row, head) { got.is_nan() } else { kept(got, clean) };
                assert!(right, "lse {got} for {clean} in row {row} of {rows}, head {head}");
            }
        }
    }
}

/// New rows become the codes of their quotients by the scales, keys after their rotation. `exact`:
/// a turned key is rounded as a plain loop in f32 does it; else it may be off by what rounding f32
/// otherwise changes.
pub fn appended_codes_are_those_of_the_quotients<B: Backend, T: Element>(backend: &B, exact: bool) {
    const ROWS: usize = 60;
    const DIM: usize = 48;
    const VALUE_DIM: usize = 32;
    const ROTATED: usize = 32;
    // Beyond the largest, among the smallest, and what is no number.
    const SPECIAL: [f32; 10] =
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 464.0, -449.0, 6e4, 1.0 / 1024.0, -1e-3];
    let mut rng = Rng::new(3);
    let shape = |dim| [1, ROWS, KV_HEADS, dim];
    let value = Tensor::<T>::contiguous("value", shape(VALUE_DIM), |[_, row, _, d]| {
        let sizes = 10f32.powf(8.0 * rng.uniform() - 4.0);
        if row < 10 && d == 0 { SPECIAL[row] } else { sizes * rng.normal() }
    });
    let key = Tensor::<T>::contiguous("key", shape(DIM), |[_, row, _, d]| {
        let sizes = 10f32.powf(8.0 * rng.uniform() - 4.0);
        if row < 10 && d == DIM - 1 { SPECIAL[row] } else { sizes * rng.normal() }
    });
    let table = |f: fn(f32) -> f32| (0..ROWS * ROTATED / 2).map(|i| f(0.37 * i as f32)).collect::<Vec<f32>>();
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let places: Vec<u32> = (0..ROWS as u32).rev().collect();
    let positions: Vec<u32> = (0..ROWS as u32).collect();
    let stored = [&key, &value].map(|rows| Stored::of(backend, rows));
    let [cos_memory, sin_memory] = [&cos, &sin].map(|table| backend.buffer_of(table).unwrap());
    let [places_memory, positions_memory] = [&places, &positions].map(|n| backend.buffer_of(n).unwrap());
    let with_scales = scales_of_each_kind().into_iter().flatten();
    for (scales, interleaved) in
        with_scales.flat_map(|scales| [None, Some(false), Some(true)].map(|i| (scales.clone(), i)))
    {
        let mut caches =
            [DIM, VALUE_DIM].map(|dim| Tensor::<F8E4M3>::contiguous("cache", shape(dim), |_| 1.0));
        let [mut to_key, mut to_value] = caches.each_ref().map(|cache| Stored::of(backend, cache));
        let [key_scales, value_scales] = [&scales.key, &scales.value].map(|s| backend.buffer_of(s).unwrap());
        let mut new = Append::new(
            stored[0].view(backend, "key"),
            stored[1].view(backend, "value"),
            backend.slice(&places_memory, ..),
        )
        .with_scales(Scales::new(backend.slice(&key_scales, ..), backend.slice(&value_scales, ..)));
        if let Some(interleaved) = interleaved {
            new = new.with_rotation(Rotation {
                cos: backend.slice(&cos_memory, ..),
                sin: backend.slice(&sin_memory, ..),
                positions: backend.slice(&positions_memory, ..),
                rotated: ROTATED,
                interleaved,
            });
        }
        backend.append(new, to_key.view_mut(backend, "key"), to_value.view_mut(backend, "value")).unwrap();
        let [cached_key, cached_value] = &mut caches;
        to_key.read_to(backend, cached_key);
        to_value.read_to(backend, cached_value);

        for at @ [b, row, head, d] in indices(shape(VALUE_DIM)) {
            let quotient = value.get(at).to_f32() / scale_of(&scales.value, head);
            let got = cached_value.get([b, ROWS - 1 - row, head, d]);
            assert_eq!(got.to_bits(), F8E4M3::from_f32(quotient).to_bits(), "{got} for {quotient:e}");
        }
        for at @ [b, row, head, d] in indices(shape(DIM)) {
            let own = |d: usize| key.get([b, row, head, d]).to_f32();
            let half = ROTATED / 2;
            let (terms, turned) = match interleaved {
                Some(interleaved) if d < ROTATED => {
                    let (pair, x, y) = if interleaved {
                        (d / 2, d & !1, d | 1)
                    } else {
                        (d % half, d % half, d % half + half)
                    };
                    let (cos, sin) = (cos[row * half + pair], sin[row * half + pair]);
                    let terms =
                        if d == x { [own(x) * cos, -(own(y) * sin)] } else { [own(x) * sin, own(y) * cos] };
                    (terms, true)
                }
                _ => ([own(d), 0.0], false),
            };
            let scale = scale_of(&scales.key, head);
            let got = cached_key.get([b, ROWS - 1 - row, head, d]);
            let sum = if turned { terms[0] + terms[1] } else { terms[0] };
            if turned && !exact {
                let error = 2e-7 * (terms[0].abs() + terms[1].abs());
                let [low, high] = [sum - error, sum + error].map(|x| F8E4M3::from_f32(x / scale).to_f32());
                assert!((low..=high).contains(&got.to_f32()), "{got} for {} at {at:?}", sum / scale);
            } else {
                let code = F8E4M3::from_f32(sum / scale);
                assert_eq!(got.to_bits(), code.to_bits(), "{got} for {} at {at:?}", sum / scale);
            }
        }
    }
}

/// An fp8 store keeps all codes bit for bit where sequences share pages, where one of them is
/// copied, and where the store grows; so does one in rows.
pub fn a_store_keeps_its_codes<B: Backend>(backend: &B) {
    const DIM: usize = 16;
    const VALUE_DIM: usize = 32;
    const ROWS: usize = 11;
    let code = |number: usize| F8E4M3::from_bits(number as u8);
    // Of row `row` as the sequence of `seed` wrote it.
    let rows = |seed: usize, rows: std::ops::Range<usize>| {
        [DIM, VALUE_DIM].map(|dim| {
            let shape = [1, rows.len(), KV_HEADS, dim];
            Tensor::<F8E4M3>::contiguous("rows", shape, |[_, row, head, d]| {
                code(seed + 37 * (rows.start + row) + 19 * head + 7 * d).to_f32()
            })
        })
    };
    let heads = KvConfig::new(KV_HEADS, DIM).with_value_dim(VALUE_DIM);
    for (before, after) in
        [(heads.in_pages(6, 4), heads.in_pages(9, 4)), (heads.in_rows(2, 20), heads.in_rows(3, 30))]
    {
        let mut store = KvStore::<B, F8E4M3>::new(backend, before).unwrap();
        let put = |store: &mut KvStore<B, F8E4M3>, id, seed, range: std::ops::Range<usize>| {
            store.extend(backend, id, range.len()).unwrap();
            let new = rows(seed, range.clone());
            let new = new.each_ref().map(|rows| Stored::of(backend, rows));
            store.put(backend, 0, id, range, new.each_ref().map(|rows| rows.view(backend, "rows"))).unwrap();
        };
        let first = store.open().unwrap();
        put(&mut store, first, 0, 0..ROWS);
        // Their last common page, or row, is copied when one of them grows.
        let second = store.share(first, ROWS - 2).unwrap();
        put(&mut store, second, 101, ROWS - 2..ROWS + 3);
        put(&mut store, first, 5, ROWS..ROWS + 1);
        let check = |store: &KvStore<B, F8E4M3>| {
            let [_, page_len, ..] = store.shape();
            let stored = read_store(backend, store, 0);
            for (id, parts) in [
                (first, [rows(0, 0..ROWS), rows(5, ROWS..ROWS + 1)]),
                (second, [rows(0, 0..ROWS - 2), rows(101, ROWS - 2..ROWS + 3)]),
            ] {
                let len = store.len(id).unwrap();
                let places: Vec<usize> =
                    store.places(id, 0..len).unwrap().map(|place| place as usize).collect();
                for (which, stored) in stored.iter().enumerate() {
                    let mut token = 0;
                    for part in &parts {
                        let part = &part[which];
                        for [_, row, head, d] in indices(part.shape()) {
                            let place = places[token + row];
                            let got = stored.get([place / page_len, place % page_len, head, d]);
                            let bits = [got, part.get([0, row, head, d])].map(F8E4M3::to_bits);
                            assert_eq!(bits[0], bits[1], "row {} of {id:?}, d {d}", token + row);
                        }
                        token += part.shape()[1];
                    }
                    assert_eq!(token, len);
                }
            }
        };
        check(&store);
        store.grow(backend, after).unwrap();
        check(&store);
    }
}

/// Scales of another count or out of range, and of keys that are not fp8, are refused by name,
/// in attention and in appends; nothing is written. Numbers are looked at where they lie in CPU
/// memory.
pub fn what_does_not_fit_is_named<B: Backend, Q: Element>(by: &On<B>, in_cpu_memory: bool) {
    const HEADS: usize = 4;
    const SHAPE: [usize; 4] = [1, 2, HEADS, 64];
    fn of<B: Backend, Q: Element, K: Element>(by: &On<B>, key: &[f32], value: &[f32]) -> [Error; 2] {
        let backend = &by.0;
        let inputs = Inputs::<Q, K> {
            query: Tensor::contiguous("query", SHAPE, |_| 0.5),
            key: Tensor::contiguous("key", SHAPE, |_| 0.5),
            value: Tensor::contiguous("value", SHAPE, |_| 0.5),
        };
        let shape =
            AttentionShape::of(&inputs.query.view(), &inputs.key.view(), &inputs.value.view()).unwrap();
        let batch = Batch::uniform(&shape, &Mask::Full).unwrap();
        let scales = Some(Scales::new(key.to_vec(), value.to_vec()));
        let mut out = Tensor::<Q>::contiguous("out", SHAPE, |_| RUBBISH);
        let mut lse = vec![RUBBISH; shape.lse_len()];
        let call = inputs.call(None, &scales);
        let attended = by.run_call(&PlanConfig::new(), &batch, call, &mut out, Some(&mut lse));

        let places = backend.buffer_of(&[1u32, 0]).unwrap();
        let new = Stored::of(backend, &inputs.query);
        let mut cache = Tensor::<K>::contiguous("cache", SHAPE, |_| 1.5);
        let [mut to_key, mut to_value] = [&cache, &cache].map(|cache| Stored::of(backend, cache));
        let [key, value] = [key, value].map(|scales| backend.buffer_of(scales).unwrap());
        let scales = Scales::new(backend.slice(&key, ..), backend.slice(&value, ..));
        let (key, value) = (new.view(backend, "key"), new.view(backend, "value"));
        let new = Append::new(key, value, backend.slice(&places, ..)).with_scales(scales);
        let appended =
            backend.append(new, to_key.view_mut(backend, "key"), to_value.view_mut(backend, "value"));
        for stored in [&to_key, &to_value] {
            stored.read_to(backend, &mut cache);
            assert!(cache.values().all(|x| x == 1.5), "wrote in spite of the error");
        }
        [attended.unwrap_err(), appended.unwrap_err()]
    }
    let good = &[1.0f32; HEADS][..];
    let refused = |key: &[f32], value: &[f32]| of::<B, Q, F8E4M3>(by, key, value);
    for wrong in [&[][..], &[1.0; HEADS - 1], &[1.0; HEADS + 1]] {
        assert_eq!(refused(wrong, good).map(named), [("shape", "key scales"); 2]);
        assert_eq!(refused(&[1.0], wrong).map(named), [("shape", "value scales"); 2]);
    }
    // Keys of the queries' type.
    assert_eq!(of::<B, Q, Q>(by, good, good).map(named), [("dtype", "key"); 2]);
    if in_cpu_memory {
        for value in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let wrong = [1.0, 2.0, value, value];
            for (argument, errors) in
                [("key scales", refused(&wrong, good)), ("value scales", refused(good, &wrong))]
            {
                for error in errors {
                    let Error::Value { argument: got, expected, .. } = error else { panic!("{error}") };
                    assert!(got == argument && expected.ends_with("head 2"), "{got}: {expected}");
                }
            }
        }
    }
}
