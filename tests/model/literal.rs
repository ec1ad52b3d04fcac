//! Star Attention to the letter: a Llama in f64 with naive loops, run on one (anchor, block) pair
//! after another.
//!
//! It knows nothing of ranks, masks, shards or merges, and shares no code with the crate or the
//! example.

use candle_core::{DType, Tensor};
use serde_json::Value;
use std::collections::HashMap;

type Row = Vec<f64>;
/// Tokens of an anchor, and their positions.
pub type Anchor = (Vec<u32>, Vec<usize>);

/// Keys and values of one layer, a row for each token.
#[derive(Clone, Default)]
struct Cache {
    keys: Vec<Row>,
    values: Vec<Row>,
    positions: Vec<usize>,
}

pub struct Literal {
    weights: HashMap<String, Vec<f64>>,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    eps: f64,
    /// Tokens that a token sees in each layer, itself included.
    window: usize,
    frequencies: Vec<f64>,
}

impl Literal {
    pub fn new(config: &Value, tensors: &HashMap<String, Tensor>) -> Self {
        let flat =
            |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let get = |name: &str| config[name].as_u64().map(|extent| extent as usize);
        let (hidden, heads) = (get("hidden_size").unwrap(), get("num_attention_heads").unwrap());
        let dim = get("head_dim").unwrap_or(hidden / heads);
        let theta = config["rope_theta"].as_f64().unwrap_or(1e4);
        let plain = (0..dim / 2).map(|pair| 1.0 / theta.powf(2.0 * pair as f64 / dim as f64));
        Self {
            weights: tensors.iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect(),
            layers: get("num_hidden_layers").unwrap(),
            hidden,
            heads,
            kv_heads: get("num_key_value_heads").unwrap_or(heads),
            dim,
            eps: config["rms_norm_eps"].as_f64().unwrap(),
            window: get("sliding_window").filter(|_| config["model_type"] == "mistral").unwrap_or(usize::MAX),
            frequencies: plain.map(|frequency| scaled(frequency, &config["rope_scaling"])).collect(),
        }
    }

    /// Logits of `inputs` behind a context that is encoded block by block, each with the anchor
    /// before it.
    pub fn star(&self, context: &[u32], block: usize, anchor: usize, inputs: &[u32]) -> Vec<Row> {
        let first = || (context[..anchor].to_vec(), (0..anchor).collect());
        let anchors: Vec<Anchor> = (1..context.len().div_ceil(block)).map(|_| first()).collect();
        self.star_with(context, block, &anchors, inputs)
    }

    /// The same with an anchor of its own before each block after the first.
    pub fn star_with(&self, context: &[u32], block: usize, anchors: &[Anchor], inputs: &[u32]) -> Vec<Row> {
        let mut kept = vec![Cache::default(); self.layers];
        for (index, own) in context.chunks(block).enumerate() {
            let (mut tokens, mut positions) =
                if index == 0 { Anchor::default() } else { anchors[index - 1].clone() };
            let prefix = tokens.len();
            tokens.extend(own);
            positions.extend(index * block..index * block + own.len());
            let sinks = anchors.first().map_or(0, |(tokens, _)| tokens.len());
            let (caches, _) = self.run(&tokens, &positions, &vec![Cache::default(); self.layers], sinks);
            for (kept, cache) in kept.iter_mut().zip(caches) {
                kept.keys.extend_from_slice(&cache.keys[prefix..]);
                kept.values.extend_from_slice(&cache.values[prefix..]);
                kept.positions.extend_from_slice(&cache.positions[prefix..]);
            }
        }
        let positions: Vec<usize> = (context.len()..context.len() + inputs.len()).collect();
        self.logits(&self.run(inputs, &positions, &kept, 0).1)
    }

    /// Logits of `inputs` behind a context, all in one causal sequence.
    pub fn dense(&self, context: &[u32], inputs: &[u32]) -> Vec<Row> {
        let tokens = [context, inputs].concat();
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let (_, hidden) = self.run(&tokens, &positions, &vec![Cache::default(); self.layers], 0);
        self.logits(&hidden[context.len()..])
    }

    /// Runs a causal sequence that also sees all of `past`, as far as its window reaches, and in
    /// any case its own first `anchor` tokens; returns its keys and values, and the last layer's
    /// outputs.
    fn run(
        &self,
        tokens: &[u32],
        positions: &[usize],
        past: &[Cache],
        anchor: usize,
    ) -> (Vec<Cache>, Vec<Row>) {
        let embedding = &self.weights["model.embed_tokens.weight"];
        let embed = |&token: &u32| embedding[token as usize * self.hidden..][..self.hidden].to_vec();
        let mut hidden: Vec<Row> = tokens.iter().map(embed).collect();
        let mut caches = Vec::new();
        for (layer, past) in past.iter().enumerate() {
            let weight = |name: &str| &self.weights[&format!("model.layers.{layer}.{name}.weight")];
            let normed: Vec<Row> = hidden.iter().map(|x| self.norm(x, weight("input_layernorm"))).collect();
            let linear = |name: &str, x: &Row| {
                let mut y = product(weight(name), x);
                if let Some(bias) = self.weights.get(&format!("model.layers.{layer}.{name}.bias")) {
                    add(&mut y, bias);
                }
                y
            };
            let project = |name: &str| normed.iter().map(|x| linear(name, x)).collect::<Vec<Row>>();
            let (mut queries, mut keys) = (project("self_attn.q_proj"), project("self_attn.k_proj"));
            for (row, &position) in positions.iter().enumerate() {
                self.rotate(&mut queries[row], position);
                self.rotate(&mut keys[row], position);
            }
            let own = Cache { keys, values: project("self_attn.v_proj"), positions: positions.to_vec() };
            for (row, x) in hidden.iter_mut().enumerate() {
                let is_seen = |position: usize| positions[row] - position < self.window;
                let seen_past = (0..past.keys.len()).filter(|&key| is_seen(past.positions[key]));
                let seen_own = (0..=row).filter(|&key| key < anchor || is_seen(positions[key]));
                let seen = seen_past.map(|key| (&past.keys[key], &past.values[key]));
                let seen = seen.chain(seen_own.map(|key| (&own.keys[key], &own.values[key])));
                let (keys, values): (Vec<&Row>, Vec<&Row>) = seen.unzip();
                let attended = self.attend(&queries[row], &keys, &values);
                add(x, &linear("self_attn.o_proj", &attended));
                let normed = self.norm(x, weight("post_attention_layernorm"));
                let (gate, up) =
                    (product(weight("mlp.gate_proj"), &normed), product(weight("mlp.up_proj"), &normed));
                let inner: Row = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(x, &product(weight("mlp.down_proj"), &inner));
            }
            caches.push(own);
        }
        (caches, hidden)
    }

    fn attend(&self, query: &Row, keys: &[&Row], values: &[&Row]) -> Row {
        let mut out = Vec::new();
        for head in 0..self.heads {
            let kv = head / (self.heads / self.kv_heads) * self.dim;
            let query = &query[head * self.dim..][..self.dim];
            let scores: Vec<f64> = keys
                .iter()
                .map(|key| dot(query, &key[kv..kv + self.dim]) / (self.dim as f64).sqrt())
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((kv..kv + self.dim).map(|d| {
                weights.iter().zip(values).map(|(weight, value)| weight / sum * value[d]).sum::<f64>()
            }));
        }
        out
    }

    fn logits(&self, hidden: &[Row]) -> Vec<Row> {
        let head = self.weights.get("lm_head.weight").unwrap_or(&self.weights["model.embed_tokens.weight"]);
        hidden.iter().map(|x| product(head, &self.norm(x, &self.weights["model.norm.weight"]))).collect()
    }

    fn norm(&self, x: &Row, weight: &Row) -> Row {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + self.eps).sqrt();
        x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
    }

    fn rotate(&self, x: &mut Row, position: usize) {
        let half = self.dim / 2;
        for head in x.chunks_mut(self.dim) {
            for (pair, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (a, b) = (head[pair], head[pair + half]);
                (head[pair], head[pair + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
}

/// The linear rule, or Llama 3.1's, by wavelength, as `transformers` writes it.
fn scaled(frequency: f64, scaling: &Value) -> f64 {
    if scaling.is_null() {
        return frequency;
    }
    let get = |name: &str| scaling[name].as_f64().unwrap();
    if scaling["type"] == "linear" || scaling["rope_type"] == "linear" {
        return frequency / get("factor");
    }
    let (factor, old) = (get("factor"), get("original_max_position_embeddings"));
    let (low, high) = (get("low_freq_factor"), get("high_freq_factor"));
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength < old / high {
        frequency
    } else if wavelength > old / low {
        frequency / factor
    } else {
        let smooth = (old / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A matrix `[out, x.len()]` times `x`.
fn product(matrix: &[f64], x: &Row) -> Row {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn add(x: &mut Row, y: &Row) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
