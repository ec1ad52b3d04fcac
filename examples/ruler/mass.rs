//! How much attention the starts of blocks draw in phase 1.
//!
//! The paper explains what anchors do by attention sinks: without an anchor every block has a sink
//! of its own at its start, which the query then meets once for each block. The share of a row's
//! softmax that some keys have is `exp(lse_some - lse_all)`, both of which the attention gives.

use super::llama::error::{Error, Result};
use super::llama::model::Llama;
use super::llama::rank::{attention, shape};
use super::llama::table::table;
use candle_core::{Device, Tensor};
use star_attention::candle::Borrowed;
use star_attention::cpu::flash::Plan;
use star_attention::{Inputs, Mask, StarLayout, TensorView, TensorViewMut};
use std::ops::{Add, Mul, Range};

/// The mean share, over heads and over the rows of all blocks but the first, that a layer's
/// attention gives to the first tokens of the anchor, and to those of the rows' own block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mass {
    pub anchor: f64,
    pub block: f64,
}

impl Add for Mass {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { anchor: self.anchor + other.anchor, block: self.block + other.block }
    }
}

impl Mul<f64> for Mass {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { anchor: self.anchor * factor, block: self.block * factor }
    }
}

/// Each layer's masses on the first `width` tokens; `layout` has one block for each rank, blocks
/// longer than that, and the model is in f32.
///
/// # Errors
/// Those of the model and the attention.
pub fn masses(model: &Llama, layout: &StarLayout, context: &[u32], width: usize) -> Result<Vec<Mass>> {
    if model.config.windowed.is_some() {
        return Err(Error::input("--model", "expected one without a window of attention"));
    }
    let mut sums = vec![Mass::default(); model.config.layers];
    let mut rows = 0;
    for rank in 1..layout.blocks() {
        let local = layout.rank(rank)?;
        let own = local.kept();
        // Rows behind all of the tokens in question see all of them.
        let seeing = own.start + width..own.end;
        if seeing.is_empty() {
            continue;
        }
        rows += seeing.len();
        let positions: Vec<usize> = local.positions().collect();
        let tokens: Vec<u32> = positions.iter().map(|&index| context[index]).collect();
        let plan = Plan::new(&attention(model, local.mask()), &shape(model, tokens.len(), tokens.len()))?;
        model.forward(&tokens, &positions, 0, &mut |layer, [q, k, v]| {
            let (q, k, v) =
                (Borrowed::new("query", &q)?, Borrowed::new("key", &k)?, Borrowed::new("value", &v)?);
            let (q, k, v) = (q.view::<f32>()?, k.view::<f32>()?, v.view::<f32>()?);
            let (out, lse) = attend(&plan, q, k, v)?;
            let anchor = 0..width.min(own.start);
            let share = |keys| mass(model, q, k, v, &lse, seeing.clone(), keys);
            let own = own.start..own.start + width;
            sums[layer] = sums[layer] + Mass { anchor: share(anchor)?, block: share(own)? };
            Ok(Tensor::from_vec(out, q.shape().as_slice(), &Device::Cpu)?)
        })?;
    }
    let heads_rows = (model.config.heads * rows.max(1)) as f64;
    Ok(sums.into_iter().map(|sum| sum * heads_rows.recip()).collect())
}

fn attend(
    plan: &Plan,
    q: TensorView<'_, f32>,
    k: TensorView<'_, f32>,
    v: TensorView<'_, f32>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let [batch, rows, heads, _] = q.shape();
    let (mut out, mut lse) = (vec![0f32; q.shape().iter().product()], vec![0f32; batch * rows * heads]);
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    let view = TensorViewMut::contiguous("out", &mut out, q.shape())?;
    plan.run(Inputs::new(q, k, v), view, Some(&mut lse), &mut workspace)?;
    Ok((out, lse))
}

/// The sum over heads and `rows` of the share that `keys`, seen by all of these rows, have of the
/// softmax whose log-sum-exp is `lse`.
fn mass(
    model: &Llama,
    q: TensorView<'_, f32>,
    k: TensorView<'_, f32>,
    v: TensorView<'_, f32>,
    lse: &[f32],
    rows: Range<usize>,
    keys: Range<usize>,
) -> Result<f64> {
    if keys.is_empty() {
        return Ok(0.0);
    }
    let plan = Plan::new(&attention(model, Mask::Full), &shape(model, rows.len(), keys.len()))?;
    let (_, some) = attend(
        &plan,
        q.narrow(1, rows.start, rows.len())?,
        k.narrow(1, keys.start, keys.len())?,
        v.narrow(1, keys.start, keys.len())?,
    )?;
    let len = q.shape()[1];
    let mut sum = 0.0;
    for (some, all) in some.chunks_exact(rows.len()).zip(lse.chunks_exact(len)) {
        sum +=
            some.iter().zip(&all[rows.clone()]).map(|(some, all)| f64::from(some - all).exp()).sum::<f64>();
    }
    Ok(sum)
}

/// A row for each layer: blocks of `block` tokens without an anchor, and with one of as many.
pub fn text(without: &[Mass], with: &[Mass], width: usize, block: usize) -> String {
    let percent = |share: f64| format!("{:.2}", 100.0 * share);
    let heading =
        ["layer", "no anchor: block's start, %", "anchor: block's start, %", "anchor: anchor's start, %"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(without.iter().zip(with).enumerate().map(|(layer, (without, with))| {
        vec![layer.to_string(), percent(without.block), percent(with.block), percent(with.anchor)]
    }));
    // A row sees the anchor, and its block up to itself.
    let alike = |anchor: usize| {
        (width + 1..=block).map(|seen| width as f64 / (anchor + seen) as f64).sum::<f64>()
            / (block - width) as f64
    };
    rows.push(vec![
        "were all keys alike".into(),
        percent(alike(0)),
        percent(alike(block)),
        percent(alike(block)),
    ]);
    table(&rows)
}
