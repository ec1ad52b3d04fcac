//! Continuous batching over a paged cache: requests arrive, are encoded in chunks under star masks
//! beside others' decodes, grow, fork and leave. One loop serves every backend, and caches of any
//! element type.

use super::backend::{Stored, read_store};
use super::cases::{RUBBISH, divided};
use super::expected::Expected;
use crate::common::{Call, Layout, Rng, Tensor, as_slices, scales};
use proptest::prelude::*;
use star_attention::{
    Append, AttentionConfig, Backend, Batch, Capacity, Element, Error, Inputs, KvConfig, KvStore, LEFT_OUT,
    Mask, PlanConfig, Rotation, Scales, Sequence, SequenceId,
};

/// Query rows of a step, and so many of one request.
const ROWS: usize = 64;
const CHUNK: usize = 24;
const REQUESTS: usize = 5;
/// Keys that the cache has room for.
const CACHE_KEYS: usize = 384;

/// What an engine's life follows from.
#[derive(Clone, Debug)]
pub struct History {
    pub steps: usize,
    pub page_len: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub config: PlanConfig,
    pub rope: Option<Rope>,
    pub seed: u64,
}

/// The rotation of keys by quarter turns, which no rounding changes.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    rotated: usize,
    interleaved: bool,
}

impl Rope {
    /// Cosine and sine of a pair at a position.
    fn of(position: usize, pair: usize) -> [f32; 2] {
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]][position * (pair + 1) % 4]
    }

    /// The table of cosines or of sines, for as many positions as there may be keys.
    fn table(&self, which: usize) -> Vec<f32> {
        let half = self.rotated / 2;
        (0..CACHE_KEYS * half).map(|i| Self::of(i / half, i % half)[which]).collect()
    }

    /// The keys of a sequence from its first on, rotated.
    fn rotate<T: Element>(&self, keys: &Tensor<T>) -> Tensor<T> {
        let half = self.rotated / 2;
        Tensor::contiguous("keys", keys.shape(), |[batch, position, head, d]| {
            let at = |d: usize| keys.get([batch, position, head, d]).to_f32();
            if d >= self.rotated {
                return at(d);
            }
            let (pair, x, y) =
                if self.interleaved { (d / 2, d & !1, d | 1) } else { (d % half, d % half, d % half + half) };
            let [cos, sin] = Self::of(position, pair);
            if d == x { at(x) * cos - at(y) * sin } else { at(x) * sin + at(y) * cos }
        })
    }
}

pub fn histories(
    steps: usize,
    dims: impl Strategy<Value = (usize, usize)>,
) -> impl Strategy<Value = History> {
    let heads = (1..=2usize, 1..=4usize, dims);
    let page_len = prop::sample::select(vec![1, 8, 16, 48]);
    let plain = PlanConfig::new();
    let configs = vec![plain, plain.with_split_keys(64), plain.with_row_invariant()];
    let interleaved = prop::option::of(any::<bool>());
    (1..=steps, page_len, heads, prop::sample::select(configs), interleaved, any::<u64>()).prop_map(
        |(steps, page_len, (kv_heads, group, (head_dim, value_dim)), config, interleaved, seed)| {
            // Kernels rotate multiples of 16 dims.
            let rotated = head_dim / 16 * 16;
            let interleaved = interleaved.filter(|_| rotated > 0);
            let rope = interleaved.map(|interleaved| Rope { rotated, interleaved });
            History { steps, page_len, kv_heads, group, head_dim, value_dim, config, rope, seed }
        },
    )
}

struct Request {
    /// Of its context, and of generated tokens.
    masks: [Mask; 2],
    context_len: usize,
    total_len: usize,
    /// What each token's query, key and value are drawn from.
    tokens: Vec<u64>,
    sequence: SequenceId,
}

impl Request {
    fn new(sequence: SequenceId, rng: &mut Rng) -> Self {
        let block_len = 1 + rng.below(20);
        let star = Mask::Star {
            anchor_len: rng.below(block_len + 1),
            block_len,
            first_block_len: block_len,
            left: None,
        };
        // Every third request is of a model with a sliding window.
        let masks = match rng.below(3) {
            0 => {
                let window = 1 + rng.below(30);
                [star, Mask::Causal].map(|mask| mask.with_sliding_window(window).unwrap())
            }
            _ => [star, Mask::Causal],
        };
        let context_len = 1 + rng.below(60);
        let total_len = context_len + rng.below(6);
        Self { masks, context_len, total_len, tokens: Vec::new(), sequence }
    }

    /// A request that begins as this one does, up to any token.
    fn fork<B: Backend, T: Element>(&self, store: &mut KvStore<B, T>, rng: &mut Rng) -> Self {
        let len = rng.below(self.tokens.len() + 1);
        let mut fork = Self::new(store.share(self.sequence, len).unwrap(), rng);
        fork.tokens = self.tokens[..len].to_vec();
        fork.total_len = fork.total_len.max(fork.tokens.len() + 1);
        fork
    }

    /// How many tokens come next, and what they see.
    fn next(&self, rng: &mut Rng) -> (usize, Mask) {
        let left = self.context_len.saturating_sub(self.tokens.len());
        let [context, generated] = self.masks.clone();
        if left > 0 { ((1 + rng.below(CHUNK)).min(left), context) } else { (1, generated) }
    }
}

/// The rows of one tensor for tokens that are drawn from these seeds.
fn rows<T: Element>(which: u64, tokens: &[u64], heads: usize, dim: usize) -> Tensor<T> {
    let mut rngs: Vec<Rng> = tokens.iter().map(|&seed| Rng::new(seed.wrapping_add(which))).collect();
    Tensor::contiguous("rows", [1, tokens.len(), heads, dim], |[_, token, ..]| rngs[token].normal())
}

/// Rows as a cache holds them.
fn cached<Q: Element, K: Element>(rows: &Tensor<Q>, scales: Option<&[f32]>) -> Tensor<K> {
    let wide = Tensor::<f32>::contiguous("rows", rows.shape(), |index| rows.get(index).to_f32());
    divided("rows", &wide, scales, &Layout::CONTIGUOUS)
}

/// Nothing that no request wrote may be seen.
fn fill_with_nan<B: Backend, T: Element>(backend: &B, store: &mut KvStore<B, T>) {
    let [pages, page_len, kv_heads, head_dim] = store.shape();
    let [.., value_dim] = store.value_shape();
    let rows = pages * page_len;
    let nan = [head_dim, value_dim].map(|dim| {
        Stored::of(backend, &Tensor::<T>::contiguous("nan", [1, rows, kv_heads, dim], |_| f32::NAN))
    });
    let sequence = store.open().unwrap();
    store.extend(backend, sequence, rows).unwrap();
    let views = nan.each_ref().map(|nan| nan.view(backend, "nan"));
    store.put(backend, 0, sequence, 0..rows, views).unwrap();
    store.close(sequence).unwrap();
    assert!(read_store(backend, store, 0).iter().all(|all| all.values().all(f32::is_nan)));
}

/// What a step works on: the request, its first query row, and how many tokens there are.
struct Turn {
    request: usize,
    start: usize,
    len: usize,
    mask: Mask,
}

/// Every row of every step is the oracle's for its sequence alone, and padding is left alone.
pub fn an_engine_serves_requests<B: Backend, Q: Element, K: Element>(
    backend: &B,
    history: &History,
) -> Result<(), TestCaseError> {
    let History { steps, page_len, kv_heads, group, head_dim, value_dim, config, rope, seed } = *history;
    let heads = kv_heads * group;
    let mut rng = Rng::new(seed);
    let (query_shape, out_shape) = ([1, ROWS, heads, head_dim], [1, ROWS, heads, value_dim]);
    let dims = [head_dim, value_dim];
    let new_shapes = dims.map(|dim| [1, ROWS, kv_heads, dim]);
    let room = KvConfig::new(kv_heads, head_dim).with_value_dim(value_dim);
    let room = room.in_pages(CACHE_KEYS / page_len, page_len);
    let mut store = KvStore::<B, K>::new(backend, room).unwrap();
    let cache_shape = store.shape();
    let elements = |shape: [usize; 4]| shape.iter().product::<usize>();

    let capacity = Capacity::new(query_shape, cache_shape, REQUESTS, CHUNK);
    let capacity = capacity.with_value_dim(value_dim).with_pages(REQUESTS * 80);
    let mut plan = backend.plan(&config, &capacity).unwrap();
    let mut workspace = backend.buffer::<u8>(backend.workspace_bytes(&plan)).unwrap();
    let nan = Q::from_f32(f32::NAN);
    let mut query = backend.buffer_of(&vec![nan; elements(query_shape)]).unwrap();
    let mut new = new_shapes.map(|shape| backend.buffer_of(&vec![nan; elements(shape)]).unwrap());
    fill_with_nan(backend, &mut store);
    let [mut places, mut positions] = [(); 2].map(|()| backend.buffer::<u32>(ROWS).unwrap());
    let angles = rope.map(|rope| [0, 1].map(|which| backend.buffer_of(&rope.table(which)).unwrap()));
    let own_scales = scales::<K>(kv_heads, seed);
    let own_scales = as_slices(&own_scales);
    let stored_scales =
        own_scales.map(|Scales { key, value, .. }| [key, value].map(|s| backend.buffer_of(s).unwrap()));
    let in_memory = || {
        let [key, value] = stored_scales.as_ref()?;
        Some(Scales::new(backend.slice(key, ..), backend.slice(value, ..)))
    };
    let mut requests: Vec<Request> = Vec::new();

    for _ in 0..steps {
        while requests.len() < REQUESTS && rng.below(2) == 0 {
            let from = rng.below(2 * requests.len() + 2);
            let request = match requests.get(from) {
                Some(other) => other.fork(&mut store, &mut rng),
                None => Request::new(store.open().unwrap(), &mut rng),
            };
            requests.push(request);
        }

        // Who takes part, where: with some rows of padding, as far as pages and rows go.
        let mut batch = Batch::new(query_shape, cache_shape).unwrap().with_value_dim(value_dim).unwrap();
        let mut turns = Vec::new();
        let (mut place_of, mut position_of) = (vec![LEFT_OUT; ROWS], vec![0; ROWS]);
        let mut end = 0;
        for (index, request) in requests.iter_mut().enumerate() {
            let (len, mask) = request.next(&mut rng);
            let start = end + rng.below(3);
            let first = request.tokens.len();
            if rng.below(8) == 0 || start + len > ROWS {
                continue;
            }
            match store.extend(backend, request.sequence, len) {
                Ok(()) => {}
                Err(Error::Pages { .. }) => continue,
                Err(error) => panic!("{error}"),
            }
            request.tokens.extend((0..len).map(|_| rng.next()));
            let places = store.places(request.sequence, first..first + len).unwrap();
            for (row, (token, place)) in (start..start + len).zip((first..).zip(places)) {
                place_of[row] = place;
                position_of[row] = token as u32;
            }
            end = start + len;
            let keys = store.keys(request.sequence).unwrap();
            batch.push(Sequence::new(0, start..end, keys, mask.clone())).unwrap();
            turns.push(Turn { request: index, start, len, mask });
        }

        for turn in &turns {
            let tokens = &requests[turn.request].tokens;
            let tokens = &tokens[tokens.len() - turn.len..];
            let own = rows::<Q>(0, tokens, heads, head_dim);
            backend.write(&mut query, turn.start * heads * head_dim, own.buffer()).unwrap();
            for ((which, buffer), dim) in (1..).zip(&mut new).zip(dims) {
                let own = rows::<Q>(which, tokens, kv_heads, dim);
                backend.write(buffer, turn.start * kv_heads * dim, own.buffer()).unwrap();
            }
        }
        backend.write(&mut places, 0, &place_of).unwrap();
        backend.write(&mut positions, 0, &position_of).unwrap();
        let mut out = backend.buffer_of(&vec![RUBBISH; elements(out_shape)]).unwrap();
        let mut lse = backend.buffer_of(&vec![RUBBISH; heads * ROWS]).unwrap();

        let [new_key, new_value] = &new;
        let mut rows_to_store = Append::new(
            backend.whole("key", new_key, new_shapes[0]).unwrap(),
            backend.whole("value", new_value, new_shapes[1]).unwrap(),
            backend.slice(&places, ..),
        );
        if let (Some(Rope { rotated, interleaved }), Some([cos, sin])) = (rope, &angles) {
            rows_to_store = rows_to_store.with_rotation(Rotation {
                cos: backend.slice(cos, ..),
                sin: backend.slice(sin, ..),
                positions: backend.slice(&positions, ..),
                rotated,
                interleaved,
            });
        }
        rows_to_store.scales = in_memory();
        store.append(backend, 0, rows_to_store).unwrap();
        backend.update(&mut plan, &batch).unwrap();
        let mut inputs = Inputs::new(
            backend.whole("query", &query, query_shape).unwrap(),
            store.key(backend, 0).unwrap(),
            store.value(backend, 0).unwrap(),
        );
        inputs.scales = in_memory();
        backend
            .attend(
                &mut plan,
                inputs,
                backend.whole_mut::<f32>("out", &mut out, out_shape).unwrap(),
                Some(backend.slice_mut(&mut lse, ..)),
                backend.slice_mut(&mut workspace, ..),
            )
            .unwrap();

        let (mut out, lse) = (backend.read(&out).unwrap(), backend.read(&lse).unwrap());
        for Turn { request, start, len, mask } in turns {
            let tokens = &requests[request].tokens;
            let query = rows::<Q>(0, &tokens[tokens.len() - len..], heads, head_dim);
            let [mut key, value] =
                [1, 2].map(|which| rows::<Q>(which as u64, tokens, kv_heads, dims[which - 1]));
            if let Some(rope) = rope {
                key = rope.rotate(&key);
            }
            let of = [own_scales.map(|scales| scales.key), own_scales.map(|scales| scales.value)];
            let [key, value] = [(key, of[0]), (value, of[1])].map(|(rows, of)| cached::<Q, K>(&rows, of));
            let mut call = Call::new(&query, &key, &value);
            call.scales = own_scales;
            let expected = Expected::of_call(&AttentionConfig::new(mask), call, false);
            let own = &mut out[start * heads * value_dim..(start + len) * heads * value_dim];
            expected.check_out(own.iter().copied())?;
            own.fill(RUBBISH);
            let own_lse = (0..heads).flat_map(|head| &lse[head * ROWS + start..][..len]);
            expected.check_lse(&own_lse.copied().collect::<Vec<f32>>())?;
        }
        prop_assert!(out.iter().all(|&x| x == RUBBISH), "wrote the outputs of padding");

        requests.retain(|request| {
            let gone = request.tokens.len() >= request.total_len || rng.below(12) == 0;
            if gone {
                store.close(request.sequence).unwrap();
            }
            !gone
        });
    }
    Ok(())
}
