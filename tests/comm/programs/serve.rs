//! A server over ranks: requests arrive with layouts, query ranks and lengths of their own, are
//! encoded, asked and answered, and end. One loop serves every backend.

use super::assert_same_everywhere;
use crate::common::{Call, Rng, Tensor, sinks};
use crate::expected::Expected;
use star_attention::comm::{Collective, Ranks, Staged};
use star_attention::cpu::Cpu;
use star_attention::cuda::{Cuda, simt::Simt};
use star_attention::{
    Append, AttentionConfig, Backend, Batch, Capacity, Element, GeneratedKv, Inputs, Keys, KvConfig, KvStore,
    LEFT_OUT, Mask, PlanConfig, RankLayout, Sequence, SequenceId, StarLayout, bf16,
};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
/// Requests at a time, and the most tokens of a context, a block, a query and an answer.
const REQUESTS: usize = 3;
const CONTEXT: usize = 60;
const BLOCK: usize = 16;
const QUERY: usize = 7;
const ANSWER: usize = 4;
/// Rows of phase 1 on a rank, and of a step of phase 2.
const ENCODED: usize = REQUESTS * (CONTEXT + BLOCK);
const ASKED: usize = REQUESTS * QUERY;

pub fn serve(group: &dyn Collective) {
    let mut rng = Rng::new(11 + group.size() as u64);
    let cpu = Cpu::new().with_threads(1).unwrap();
    rounds::<_, _, f32>(&cpu, group, group, [24, 12], rng.next());
    rounds::<_, _, bf16>(&cpu, group, group, [64, 6], rng.next());
    let emulator = Cuda::new(Simt::new(rng.next()), ());
    let staged = Staged { device: &**emulator.device(), group };
    // Ranks share the machine's cores, and the emulator needs many.
    let few = if group.size() > 4 { 2 } else { 4 };
    rounds::<_, _, bf16>(&emulator, &staged, group, [64, few], rng.next());
}

/// What all ranks know of a request, and where this one keeps its keys.
struct Request {
    layout: StarLayout,
    local: RankLayout,
    /// What each token's query, key and value are drawn from: of context, query and answer.
    tokens: Vec<u64>,
    query_len: usize,
    /// Tokens of query and answer that have attended.
    done: usize,
    sequence: SequenceId,
}

impl Request {
    fn new(rng: &mut Rng, [rank, size]: [usize; 2], sequence: SequenceId) -> Self {
        let block_len = 1 + rng.below(BLOCK);
        let kept = [GeneratedKv::QueryRank, GeneratedKv::RoundRobin][rng.below(2)];
        let layout = StarLayout::builder(rng.below(CONTEXT + 1))
            .block_len(block_len)
            .anchor_len(rng.below(block_len + 1))
            .ranks(size)
            .query_rank(rng.below(size))
            .generated(kept)
            .build()
            .unwrap();
        let query_len = 1 + rng.below(QUERY);
        let new = query_len + rng.below(ANSWER + 1);
        let tokens = (0..layout.context_len() + new).map(|_| rng.next()).collect();
        Self { layout, local: layout.rank(rank).unwrap(), tokens, query_len, done: 0, sequence }
    }

    /// The tokens of the next step: the query's, and then one at a time.
    fn next(&self) -> std::ops::Range<usize> {
        self.done..if self.done == 0 { self.query_len } else { self.done + 1 }
    }

    fn is_answered(&self) -> bool {
        self.layout.context_len() + self.done == self.tokens.len()
    }
}

/// Queries (0), keys (1) or values (2) of tokens that are drawn from these seeds.
fn rows<T: Element>(which: u64, tokens: &[u64], heads: usize, dim: usize) -> Tensor<T> {
    let mut rngs: Vec<Rng> = tokens.iter().map(|&seed| Rng::new(seed.wrapping_add(which))).collect();
    Tensor::contiguous("rows", [1, tokens.len(), heads, dim], |[_, token, ..]| rngs[token].normal())
}

/// The tensors of packed rows, in a backend's memory.
struct Packed<B: Backend, T: Element> {
    len: usize,
    dim: usize,
    tensors: [B::Buffer<T>; 3],
}

impl<B: Backend, T: Element> Packed<B, T> {
    /// Room for `len` rows; the first are those of `tokens`.
    fn new(backend: &B, tokens: &[u64], len: usize, dim: usize) -> Self {
        let tensors = [(0, HEADS), (1, KV_HEADS), (2, KV_HEADS)].map(|(which, heads)| {
            let mut buffer = backend.buffer(len * heads * dim).unwrap();
            backend.write(&mut buffer, 0, rows::<T>(which, tokens, heads, dim).buffer()).unwrap();
            buffer
        });
        Self { len, dim, tensors }
    }

    fn query<'a>(&'a self, backend: &'a B) -> B::View<'a, T> {
        backend.whole("query", &self.tensors[0], [1, self.len, HEADS, self.dim]).unwrap()
    }

    /// Stores the keys and values at `places`.
    fn store(&self, backend: &B, store: &mut KvStore<B, T>, mut places: Vec<u32>) {
        places.resize(self.len, LEFT_OUT);
        let places = backend.buffer_of(&places).unwrap();
        let view = |i: usize| backend.whole("new", &self.tensors[i], [1, self.len, KV_HEADS, self.dim]);
        let new = Append::new(view(1).unwrap(), view(2).unwrap(), backend.slice(&places, ..));
        store.append(backend, 0, new).unwrap();
    }
}

/// Every context row is the oracle's under its star mask, and every row of a query or an answer the
/// softmax over all keys of its request up to it, with the same bits on every rank.
fn rounds<B: Backend, R: Ranks<B> + ?Sized, T: Element>(
    backend: &B,
    ranks: &R,
    group: &dyn Collective,
    [dim, rounds]: [usize; 2],
    seed: u64,
) {
    let mut rng = Rng::new(seed);
    let (rank, size) = ranks.rank_and_size();
    let page_len = [1, 8, 16][rng.below(3)];
    let pages = REQUESTS * (CONTEXT + QUERY + ANSWER).div_ceil(page_len);
    let heads = KvConfig::new(KV_HEADS, dim);
    let mut store = KvStore::<B, T>::new(backend, heads.in_pages(pages, page_len)).unwrap();
    let mut anchors = KvStore::<B, T>::new(backend, heads.in_rows(REQUESTS, BLOCK)).unwrap();
    let [encoded, asked] = [ENCODED, ASKED].map(|rows| [1, rows, HEADS, dim]);
    let capacity = |query| Capacity::new(query, store.shape(), REQUESTS, ENCODED).with_pages(pages);
    let encoding = capacity(encoded).with_prefix(REQUESTS, BLOCK);
    let mut encoding = backend.plan(&PlanConfig::new(), &encoding).unwrap();
    let mut asking = backend.plan(&PlanConfig::new(), &capacity(asked)).unwrap();
    let bytes = backend.workspace_bytes(&encoding).max(backend.workspace_bytes(&asking));
    let mut workspace = backend.buffer::<u8>(bytes).unwrap();
    let mut merge = ranks.prepare(backend, &ranks.plan::<f32, f32>(asked).unwrap()).unwrap();
    let sinks = sinks(HEADS, seed);
    let stored_sinks = backend.buffer_of(&sinks).unwrap();
    let mut requests: Vec<Request> = Vec::new();

    for _ in 0..rounds {
        // Phase 1 of the requests that arrive.
        let mut batch = Batch::new(encoded, store.shape()).unwrap().with_prefix(REQUESTS, BLOCK).unwrap();
        let (mut tokens, mut own, mut anchored, mut opened) = (vec![], vec![], vec![], vec![]);
        let before = requests.len();
        while requests.len() < REQUESTS && (requests.is_empty() || rng.below(2) == 0) {
            let request = Request::new(&mut rng, [rank, size], store.open().unwrap());
            let (local, start) = (&request.local, tokens.len());
            tokens.extend(local.tokens().map(|token| request.tokens[token]));
            store.extend(backend, request.sequence, local.own_tokens().len()).unwrap();
            let places = store.places(request.sequence, 0..local.own_tokens().len()).unwrap();
            own.extend(local.anchor_tokens().map(|_| LEFT_OUT).chain(places));
            let keys = store.keys(request.sequence).unwrap();
            let mut sequence = Sequence::new(0, start..tokens.len(), keys, local.mask());
            if !local.anchor_tokens().is_empty() {
                let anchor = anchors.open().unwrap();
                anchors.extend(backend, anchor, local.anchor_tokens().len()).unwrap();
                anchored.extend(anchors.places(anchor, local.anchor_tokens()).unwrap());
                let Keys::Rows { batch, rows, .. } = anchors.keys(anchor).unwrap() else { unreachable!() };
                sequence = sequence.with_prefix(batch, rows);
                opened.push(anchor);
            }
            anchored.resize(tokens.len(), LEFT_OUT);
            batch.push(sequence).unwrap();
            requests.push(request);
        }
        let new = Packed::<B, T>::new(backend, &tokens, ENCODED, dim);
        new.store(backend, &mut store, own);
        new.store(backend, &mut anchors, anchored);
        backend.update(&mut encoding, &batch).unwrap();
        let mut out = backend.buffer::<T>(ENCODED * HEADS * dim).unwrap();
        let inputs =
            Inputs::new(new.query(backend), store.key(backend, 0).unwrap(), store.value(backend, 0).unwrap())
                .with_prefix(anchors.key(backend, 0).unwrap(), anchors.value(backend, 0).unwrap())
                .with_sinks(backend.slice(&stored_sinks, ..));
        let to = backend.whole_mut("out", &mut out, encoded).unwrap();
        backend.attend(&mut encoding, inputs, to, None, backend.slice_mut(&mut workspace, ..)).unwrap();
        opened.into_iter().for_each(|anchor| anchors.close(anchor).unwrap());
        let out = backend.read(&out).unwrap();
        let mut start = 0;
        for Request { local, tokens, .. } in &requests[before..] {
            let tokens: Vec<u64> = local.tokens().map(|token| tokens[token]).collect();
            let end = start + tokens.len();
            let own = out[start * HEADS * dim..end * HEADS * dim].iter().map(|x| x.to_f32());
            expected::<T>(local.mask(), &tokens, &tokens, &sinks, dim).check_out(own).unwrap();
            start = end;
        }

        // A step of phase 2 of all requests.
        let mut batch = Batch::new(asked, store.shape()).unwrap();
        let (mut tokens, mut appended, mut kept, mut lens) = (vec![], vec![], vec![], vec![]);
        for request in &requests {
            let step = request.local.step(request.next());
            let rows = store.begin_step(backend, request.sequence, &step).unwrap();
            let start = tokens.len();
            tokens.extend(step.positions().map(|token| request.tokens[token]));
            let keys = store.keys_of(request.sequence, rows.attended).unwrap();
            batch.push(Sequence::new(0, start..tokens.len(), keys, step.mask())).unwrap();
            appended.extend(rows.appended_places);
            kept.extend(rows.kept_places);
            lens.push(rows.kept);
        }
        let new = Packed::<B, T>::new(backend, &tokens, ASKED, dim);
        new.store(backend, &mut store, appended);
        backend.update(&mut asking, &batch).unwrap();
        let inputs =
            Inputs::new(new.query(backend), store.key(backend, 0).unwrap(), store.value(backend, 0).unwrap());
        let (partial, lse) = ranks.partial(backend, &mut merge).unwrap();
        let workspace = backend.slice_mut(&mut workspace, ..);
        backend.attend(&mut asking, inputs, partial, Some(lse), workspace).unwrap();
        new.store(backend, &mut store, kept);
        let mut out = backend.buffer::<f32>(ASKED * HEADS * dim).unwrap();
        let mut lse = backend.buffer::<f32>(ASKED * HEADS).unwrap();
        let to = backend.whole_mut("out", &mut out, asked).unwrap();
        let (once, to_lse) = (backend.slice(&stored_sinks, ..), backend.slice_mut(&mut lse, ..));
        ranks.run_with_sinks(backend, &mut merge, Some(once), to, Some(to_lse)).unwrap();

        let (out, lse) = (backend.read(&out).unwrap(), backend.read(&lse).unwrap());
        let bits: Vec<u32> = out[..tokens.len() * HEADS * dim].iter().map(|x| x.to_bits()).collect();
        assert_same_everywhere(group, &bits);
        let mut start = 0;
        for (request, len) in requests.iter_mut().zip(lens) {
            store.truncate(request.sequence, len).unwrap();
            let step = request.next();
            let end = start + step.len();
            let seen = &request.tokens[..request.layout.context_len() + step.end];
            let expected = expected::<T>(Mask::Causal, &seen[seen.len() - step.len()..], seen, &sinks, dim);
            expected.check_out(out[start * HEADS * dim..end * HEADS * dim].iter().copied()).unwrap();
            let own = (0..HEADS).flat_map(|head| &lse[head * ASKED + start..head * ASKED + end]);
            expected.check_lse(&own.copied().collect::<Vec<f32>>()).unwrap();
            (request.done, start) = (step.end, end);
        }
        requests.retain(|request| {
            let ends = request.is_answered() || rng.below(10) == 0;
            if ends {
                store.close(request.sequence).unwrap();
            }
            !ends
        });
    }
    requests.iter().for_each(|request| store.close(request.sequence).unwrap());
    assert_eq!((store.free_pages(), anchors.free_pages()), (pages, REQUESTS));
}

/// The oracle's answer, and how far from it rounding may lead.
fn expected<T: Element>(mask: Mask, queries: &[u64], keys: &[u64], sinks: &[f32], dim: usize) -> Expected {
    let [key, value] = [1, 2].map(|which| rows::<T>(which, keys, KV_HEADS, dim));
    let query = rows::<T>(0, queries, HEADS, dim);
    let call = Call::new(&query, &key, &value).with_sinks(sinks);
    Expected::of_call(&AttentionConfig::new(mask), call, false)
}
