//! Tensors, the oracle over them, and a batch of every kind of sequence.

use candle_core::{DType, Device, Tensor};
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, Batch, Error, Inputs, Keys, Mask, Sequence, TensorView};

/// Each dtype, and how far rounding leads outputs of unit values away.
pub const DTYPES: [(DType, f32); 3] = [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)];

pub fn random(shape: [usize; 4]) -> Tensor {
    Tensor::randn(0f32, 1.0, &shape, &Device::Cpu).unwrap()
}

pub fn flat(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn shape(x: &Tensor) -> [usize; 4] {
    x.dims().try_into().unwrap()
}

/// The oracle's output and log-sum-exp.
pub fn oracle(config: &AttentionConfig, q: &Tensor, k: &Tensor, v: &Tensor) -> (Vec<f32>, Vec<f32>) {
    oracle_with_sinks(config, [q, k, v], None)
}

/// The same with a sink for each head, if given.
pub fn oracle_with_sinks(
    config: &AttentionConfig,
    [q, k, v]: [&Tensor; 3],
    sinks: Option<&Tensor>,
) -> (Vec<f32>, Vec<f32>) {
    let sinks = sinks.map(flat);
    let [q, k, v] = [q, k, v].map(|x| (flat(x), shape(x)));
    let view =
        |x: &'static str, y| TensorView::contiguous(x, Vec::leak(<(Vec<f32>, _)>::clone(y).0), y.1).unwrap();
    let mut inputs = Inputs::new(view("q", &q), view("k", &k), view("v", &v));
    inputs.sinks = sinks.as_deref();
    let r = reference::attention_of(config, inputs).unwrap();
    (r.out.iter().map(|&x| x as f32).collect(), r.lse.iter().map(|&x| x as f32).collect())
}

/// Sinks of four heads: none, far above scores, and of their size; with gaps between them.
pub fn sinks(device: &Device) -> Tensor {
    let of = [[f32::NEG_INFINITY, 7.0], [30.0, 7.0], [0.5, 7.0], [-2.0, 7.0]];
    let all = Tensor::new(&of, device).unwrap();
    all.narrow(1, 0, 1).unwrap().squeeze(1).unwrap()
}

pub fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got == expected || (got - expected).abs() <= tolerance;
        assert!(same, "{index}: {got} is not {expected}");
    }
}

/// Heads before tokens in memory, as model code often has it.
pub fn heads_first(x: &Tensor) -> Tensor {
    x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap()
}

/// The error, and its message, which names the argument first.
pub fn refused<T>(result: Result<T, Error>) -> (Error, String) {
    let error = result.err().expect("an error");
    let text = error.to_string();
    (error, text)
}

pub const QUERY: [usize; 4] = [2, 12, 4, 64];
pub const PAGES: [usize; 4] = [9, 16, 2, 64];
pub const ROWS: [usize; 4] = [2, 50, 2, 64];
pub const PREFIX: [usize; 4] = [2, 24, 2, 64];

/// Context encoding, a prefill and two decodes, one of them with a prefix; and rows of no sequence.
pub fn sequences(paged: bool) -> Vec<Sequence> {
    let keys = |len: usize, pages: &[u32], batch: usize, start: usize| match paged {
        true => Keys::pages(len, pages),
        false => Keys::rows(batch, start..start + len),
    };
    let star = Mask::Star { anchor_len: 8, block_len: 16, first_block_len: 16, left: None };
    vec![
        Sequence::new(0, 0..7, keys(40, &[5, 2, 8], 1, 3), star),
        Sequence::new(0, 7..8, keys(20, &[5, 0], 0, 30), Mask::Causal).with_prefix(1, 3..24),
        Sequence::new(1, 2..6, keys(9, &[7], 0, 0), Mask::Causal),
        Sequence::new(1, 6..7, keys(17, &[1, 4], 1, 33), Mask::Full),
    ]
}

pub fn batch(paged: bool) -> Batch {
    let batch = Batch::new(QUERY, if paged { PAGES } else { ROWS }).unwrap();
    let mut batch = batch.with_prefix(PREFIX[0], PREFIX[1]).unwrap();
    sequences(paged).into_iter().for_each(|sequence| batch.push(sequence).unwrap());
    batch
}

/// The rows of a sequence's keys or values, one after another.
fn keys_of(sequence: &Sequence, tensor: &Tensor, prefix: Option<&Tensor>) -> Tensor {
    let rows = |tensor: &Tensor, batch: usize, start: usize, len: usize| {
        tensor.narrow(0, batch, 1).unwrap().narrow(1, start, len).unwrap()
    };
    let mut parts = Vec::new();
    if let Some(of) = &sequence.prefix {
        parts.push(rows(prefix.unwrap(), of.batch, of.rows.start, of.rows.len()));
    }
    match &sequence.keys {
        Keys::Rows { batch, rows: of, .. } => parts.push(rows(tensor, *batch, of.start, of.len())),
        Keys::Pages { len, pages, .. } => {
            let page_len = shape(tensor)[1];
            for (index, &page) in pages.iter().enumerate().take(len.div_ceil(page_len)) {
                let len = page_len.min(len - index * page_len);
                parts.push(rows(tensor, page as usize, 0, len));
            }
        }
        other => panic!("unknown: {other:?}"),
    }
    Tensor::cat(&parts, 1).unwrap()
}

/// Each sequence is what the oracle gives for it alone; rows of none are 0 and -inf.
pub fn assert_batch(
    batch: &Batch,
    inputs: Inputs<&Tensor, &Tensor, &Tensor>,
    (out, lse): &(Tensor, Tensor),
    unit: f32,
) {
    let [batches, seq, heads, _] = batch.query_shape();
    assert_eq!((shape(out), lse.dims()), (batch.out_shape(), [batches, heads, seq].as_slice()));
    let mut padding = vec![vec![true; seq]; batches];
    for sequence in batch.sequences() {
        let (at, start, len) = (sequence.batch, sequence.rows.start, sequence.rows.len());
        padding[at][sequence.rows.clone()].fill(false);
        let of = |x: &Tensor, axis| x.narrow(0, at, 1).unwrap().narrow(axis, start, len).unwrap();
        let [prefix_key, prefix_value] = inputs.prefix.map_or([None; 2], |prefix| prefix.map(Some));
        let key = keys_of(sequence, inputs.key, prefix_key);
        let value = keys_of(sequence, inputs.value, prefix_value);
        let config = AttentionConfig::new(sequence.mask.clone());
        let (expected, expected_lse) =
            oracle_with_sinks(&config, [&of(inputs.query, 1), &key, &value], inputs.sinks);
        assert_close(&flat(&of(out, 1)), &expected, unit);
        assert_close(&flat(&of(lse, 2)), &expected_lse, 1e-4);
    }
    for (at, rows) in padding.iter().enumerate() {
        for row in rows.iter().enumerate().filter(|(_, padding)| **padding).map(|(row, _)| row) {
            let of = |x: &Tensor, axis| flat(&x.narrow(0, at, 1).unwrap().narrow(axis, row, 1).unwrap());
            assert!(of(out, 1).iter().all(|&x| x == 0.0), "row {row} of {at}");
            assert!(of(lse, 2).iter().all(|&x| x == f32::NEG_INFINITY), "row {row} of {at}");
        }
    }
}
