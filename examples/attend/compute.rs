//! The call itself, on any backend.

use crate::file::{File, FileElement, outputs};
use crate::{Args, Backend as Kind, Result};
use safetensors::tensor::Dtype;
use star_attention::cpu::{Cpu, InstructionSet, reference};
use star_attention::cuda::Cuda;
use star_attention::cuda::simt::Simt;
use star_attention::{
    AttentionConfig, Backend, Batch, Element, F8E4M3, Inputs, Keys, PlanConfig, Scales, ScoreConfig,
    Sequence, TensorView, bf16, f16,
};

/// What computes, and how.
pub struct Settings {
    backend: Kind,
    config: PlanConfig,
    cpu: Cpu,
}

impl Settings {
    pub fn of(args: &Args, score: ScoreConfig) -> Result<Self> {
        let mut config = PlanConfig::from(score);
        (config.split_keys, config.row_invariant) = (args.split_keys, args.row_invariant);
        config.validate().map_err(|e| e.to_string())?;
        let of_cpu = [("--instructions", args.instructions.is_some()), ("--threads", args.threads.is_some())];
        if let Some((name, _)) = of_cpu.iter().find(|(_, given)| *given && args.backend != Kind::Cpu) {
            return Err(format!("{name}: only with --backend cpu"));
        }
        if args.backend == Kind::Cuda {
            check_gpu().map_err(|e| format!("--backend cuda: {e}"))?;
        }
        let mut cpu = Cpu::new();
        if let Some(name) = &args.instructions {
            cpu = cpu.with_instructions(instructions(name)?).map_err(|e| format!("--instructions: {e}"))?;
        }
        if let Some(threads) = args.threads {
            cpu = cpu.with_threads(threads).map_err(|e| format!("--threads: {e}"))?;
        }
        Ok(Self { backend: args.backend, config, cpu })
    }

    /// The call on a file's tensors; gives the file to write.
    pub fn run(&self, file: &File<'_>, batch: Batch) -> Result<Vec<u8>> {
        match file.inputs[0].data.dtype() {
            Dtype::F32 => self.run_queries::<f32>(file, batch),
            Dtype::F16 => self.run_queries::<f16>(file, batch),
            Dtype::BF16 => self.run_queries::<bf16>(file, batch),
            other => Err(format!("q: expected dtype F32, F16 or BF16, got {other:?}")),
        }
    }

    fn run_queries<Q: FileElement>(&self, file: &File<'_>, batch: Batch) -> Result<Vec<u8>> {
        match file.inputs[1].data.dtype() {
            Dtype::F32 => self.run_keys::<Q, f32>(file, batch),
            Dtype::F16 => self.run_keys::<Q, f16>(file, batch),
            Dtype::BF16 => self.run_keys::<Q, bf16>(file, batch),
            Dtype::F8_E4M3 => self.run_keys::<Q, F8E4M3>(file, batch),
            other => Err(format!("k: expected dtype F32, F16, BF16 or F8_E4M3, got {other:?}")),
        }
    }

    fn run_keys<Q: FileElement, T: FileElement>(&self, file: &File<'_>, batch: Batch) -> Result<Vec<u8>> {
        let [query, key, value] = file.inputs.each_ref().map(|input| input.data.data());
        let call = Call {
            config: self.config,
            batch,
            query: Q::read(query),
            key: T::read(key),
            value: T::read(value),
            sinks: file.sinks()?,
            scales: file.scales()?,
        };
        let results = match self.backend {
            Kind::Cpu => call.on(&self.cpu),
            Kind::Simt => call.on(&Cuda::new(Simt::new(0), ())),
            Kind::Cuda => call.on_gpu(),
            Kind::Reference => call.on_reference(),
        };
        let (out, lse) = results.map_err(|e| e.to_string())?;
        outputs(call.batch.out_shape(), &out, &lse)
    }
}

#[cfg(feature = "cuda")]
fn check_gpu() -> star_attention::Result<()> {
    star_attention::cuda::driver::Driver::open(0).map(drop)
}

#[cfg(not(feature = "cuda"))]
fn check_gpu() -> star_attention::Result<()> {
    let reason = "built without the feature cuda".into();
    Err(star_attention::Error::Unavailable { what: "the GPU", reason })
}

fn instructions(name: &str) -> Result<InstructionSet> {
    let known = InstructionSet::ALL.iter().find(|set| format!("{set:?}").eq_ignore_ascii_case(name));
    known.copied().ok_or_else(|| {
        format!("--instructions: expected one of {:?}, got {name}", InstructionSet::available())
    })
}

/// One call on tensors in memory.
struct Call<Q, T> {
    config: PlanConfig,
    batch: Batch,
    query: Vec<Q>,
    key: Vec<T>,
    value: Vec<T>,
    sinks: Option<Vec<f32>>,
    scales: Option<Scales<Vec<f32>>>,
}

/// Outputs and log-sum-exps; (0, -inf) for rows of no sequence.
type Results<Q> = star_attention::Result<(Vec<Q>, Vec<f32>)>;

impl<Q: Element, T: Element> Call<Q, T> {
    fn on<B: Backend>(&self, backend: &B) -> Results<Q> {
        let out_shape = self.batch.out_shape();
        let mut plan = backend.plan_for(&self.config, &self.batch)?;
        let (query, key, value) =
            (backend.buffer_of(&self.query)?, backend.buffer_of(&self.key)?, backend.buffer_of(&self.value)?);
        let mut out = backend.buffer::<Q>(out_shape.iter().product())?;
        let mut lse = backend.buffer_of(&vec![f32::NEG_INFINITY; self.batch.lse_len()])?;
        let mut workspace = backend.buffer::<u8>(backend.workspace_bytes(&plan))?;
        let sinks = self.sinks.as_ref().map(|sinks| backend.buffer_of(sinks)).transpose()?;
        let mut scales = None;
        if let Some(Scales { key, value, .. }) = &self.scales {
            scales = Some([backend.buffer_of(key)?, backend.buffer_of(value)?]);
        }
        let mut inputs = Inputs::new(
            backend.whole("q", &query, self.batch.query_shape())?,
            backend.whole("k", &key, self.batch.key_shape())?,
            backend.whole("v", &value, self.batch.value_shape())?,
        );
        inputs.sinks = sinks.as_ref().map(|sinks| backend.slice(sinks, ..));
        inputs.scales =
            scales.as_ref().map(|[key, value]| Scales::new(backend.slice(key, ..), backend.slice(value, ..)));
        backend.attend(
            &mut plan,
            inputs,
            backend.whole_mut("out", &mut out, out_shape)?,
            Some(backend.slice_mut(&mut lse, ..)),
            backend.slice_mut(&mut workspace, ..),
        )?;
        Ok((backend.read(&out)?, backend.read(&lse)?))
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> Results<Q> {
        let driver = star_attention::cuda::driver::Driver::open(0)?;
        let stream = driver.context().default_stream();
        self.on(&Cuda::new(driver, stream))
    }

    #[cfg(not(feature = "cuda"))]
    fn on_gpu(&self) -> Results<Q> {
        check_gpu().map(|()| Default::default())
    }

    /// Each sequence by itself.
    fn on_reference(&self) -> Results<Q> {
        let [_, seq, heads, dim] = self.batch.query_shape();
        let [_, page_len, kv_heads, _] = self.batch.key_shape();
        let value_dim = self.batch.value_dim();
        let mut out = vec![Q::default(); self.batch.out_shape().iter().product()];
        let mut lse = vec![f32::NEG_INFINITY; self.batch.lse_len()];
        let ScoreConfig { scale, softcap, .. } = self.config.score;
        for Sequence { batch, rows, keys, mask, .. } in self.batch.sequences() {
            let rows_of = rows.clone().map(|row| batch * seq + row);
            let gather = |from: &[T], dim: usize| -> Vec<T> {
                let place = |key| match keys {
                    Keys::Rows { batch, rows } => batch * page_len + rows.start + key,
                    Keys::Pages { pages, .. } => pages[key / page_len] as usize * page_len + key % page_len,
                    _ => unreachable!("keys of a file lie in rows or pages"),
                };
                let width = kv_heads * dim;
                (0..keys.len()).flat_map(|key| &from[place(key) * width..][..width]).copied().collect()
            };
            let width = heads * dim;
            let own = rows_of.clone().flat_map(|row| &self.query[row * width..][..width]);
            let own: Vec<Q> = own.copied().collect();
            let (key, value) = (gather(&self.key, dim), gather(&self.value, value_dim));
            let config = AttentionConfig { mask: mask.clone(), scale, softcap };
            let mut inputs = Inputs::new(
                TensorView::contiguous("q", &own, [1, rows.len(), heads, dim])?,
                TensorView::contiguous("k", &key, [1, keys.len(), kv_heads, dim])?,
                TensorView::contiguous("v", &value, [1, keys.len(), kv_heads, value_dim])?,
            );
            inputs.sinks = self.sinks.as_deref();
            inputs.scales =
                self.scales.as_ref().map(|scales| Scales::new(&scales.key[..], &scales.value[..]));
            let exact = reference::attention_of(&config, inputs)?;
            let width = heads * value_dim;
            for (index, row) in rows_of.enumerate() {
                let from = exact.out[index * width..][..width].iter();
                let to = &mut out[row * width..][..width];
                to.iter_mut().zip(from).for_each(|(to, &x)| *to = Q::from_f32(x as f32));
                for head in 0..heads {
                    let at = (batch * heads + head) * seq + row % seq;
                    lse[at] = exact.lse[head * rows.len() + index] as f32;
                }
            }
        }
        Ok((out, lse))
    }
}
