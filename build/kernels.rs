//! What there is to compile: each source with the definitions that make a module of it.

use crate::policy::{APPEND_THREADS, DIMS, MERGE_THREADS, Policy};
use std::sync::atomic::{AtomicUsize, Ordering};

/// One compilation of a source of `cuda/`.
pub struct Module {
    /// As `encode_d128`.
    pub name: String,
    /// File of `cuda/`.
    pub source: &'static str,
    pub defines: Vec<(&'static str, String)>,
    /// Entry points.
    pub kernels: Vec<String>,
}

/// Calls `compile` for each module, as many at a time as cargo allows.
pub fn for_each(modules: &[Module], compile: impl Fn(&Module) + Sync) {
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(modules.len()) {
            scope.spawn(|| {
                while let Some(module) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile(module);
                }
            });
        }
    });
}

/// All modules for the given head dims.
pub fn modules(head_dims: &[usize]) -> Vec<Module> {
    let threads = |threads: usize| vec![("THREADS", threads.to_string())];
    let merges = ["f32_f32", "f32_f16", "f32_bf16", "f16_f32", "f16_f16", "bf16_f32", "bf16_bf16"];
    let mut modules = vec![
        Module {
            name: "merge".into(),
            source: "merge.cu",
            defines: threads(MERGE_THREADS),
            kernels: merges
                .iter()
                .flat_map(|m| [format!("merge_{m}"), format!("merge_{m}_unaligned")])
                .collect(),
        },
        Module {
            name: "append".into(),
            source: "append.cu",
            defines: threads(APPEND_THREADS),
            kernels: ["f16", "bf16", "e4m3", "f16_e4m3", "bf16_e4m3"]
                .map(|types| format!("append_{types}"))
                .into(),
        },
    ];
    for dims in DIMS.into_iter().filter(|dims| head_dims.contains(&dims.key)) {
        let both = [Policy::encode(dims), Policy::query(dims)];
        modules.extend(both.iter().map(flash));
        modules.extend(both.iter().filter_map(Policy::e4m3).map(|policy| flash(&policy)));
        modules.extend(Policy::encode_64(dims).iter().map(flash));
        modules.extend(Policy::hopper(dims).iter().map(hopper));
        #[cfg(feature = "variants")]
        modules.extend(Policy::variants(dims).iter().map(flash));
    }
    modules
}

fn flash(policy: &Policy) -> Module {
    let Policy { kernel, dims, stored_bytes, row_tiles, row_warps, key_warps, keys, slots, .. } = *policy;
    let numbers = [
        ("HEAD_DIM", dims.key),
        ("VALUE_DIM", dims.value),
        ("STORED_BYTES", stored_bytes),
        ("ROW_TILES", row_tiles),
        ("ROW_WARPS", row_warps),
        ("KEY_WARPS", key_warps),
        ("KEYS", keys),
        ("SLOTS", slots),
        ("THREADS", policy.threads()),
        ("SHARED_BYTES", policy.shared_bytes()),
        ("BLOCKS_SM_90", policy.blocks_sm_90),
    ];
    let mut defines = vec![
        ("KERNEL_NAME", kernel.to_string()),
        ("DIMS", dims.to_string()),
        ("VALUES_FIRST", policy.values_first.to_string()),
        ("STAGED_F32", policy.staged_f32.to_string()),
    ];
    defines.extend(numbers.map(|(name, number)| (name, number.to_string())));
    Module {
        name: format!("{kernel}_{dims}"),
        source: "flash.cu",
        defines,
        kernels: ["f16", "bf16"].map(|dtype| policy.entry(dtype)).into(),
    }
}

fn hopper(policy: &Policy) -> Module {
    let Policy { kernel, dims, row_warps, keys, slots, .. } = *policy;
    let numbers = [
        ("HEAD_DIM", dims.key),
        ("VALUE_DIM", dims.value),
        ("GROUPS", row_warps / 4),
        ("KEYS", keys),
        ("STAGES", slots / 2),
        ("THREADS", policy.threads()),
        ("SHARED_BYTES", policy.shared_bytes()),
    ];
    let mut defines = vec![("KERNEL_NAME", kernel.to_string()), ("DIMS", dims.to_string())];
    defines.extend(numbers.map(|(name, number)| (name, number.to_string())));
    Module {
        name: format!("{kernel}_{dims}"),
        source: "hopper.cu",
        defines,
        kernels: ["f16", "bf16"].map(|dtype| policy.entry(dtype)).into(),
    }
}

/// The head dims that STAR_ATTENTION_HEAD_DIMS names, or all.
#[cfg(feature = "cuda")]
pub fn head_dims() -> Result<Vec<usize>, String> {
    println!("cargo::rerun-if-env-changed=STAR_ATTENTION_HEAD_DIMS");
    let Ok(list) = std::env::var("STAR_ATTENTION_HEAD_DIMS") else {
        return Ok(all_head_dims());
    };
    list.split(',')
        .map(|dim| {
            let known = dim.trim().parse().ok().filter(|dim| all_head_dims().contains(dim));
            known.ok_or_else(|| {
                format!("STAR_ATTENTION_HEAD_DIMS: expected some of {:?}, got {dim}", all_head_dims())
            })
        })
        .collect()
}

/// The head dims of queries and keys that there are kernels for.
pub fn all_head_dims() -> Vec<usize> {
    let mut all: Vec<usize> = DIMS.iter().map(|dims| dims.key).collect();
    all.dedup();
    all
}
