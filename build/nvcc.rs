//! The kernels as fatbins, by nvcc.

use crate::kernels::{Module, for_each, head_dims, modules};
use std::env;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Machine code for the Ampere and Ada families (8.x runs 8.0) and for Hopper, and PTX that the
/// driver compiles for newer chips.
const ARCHS: &str = "80,90,90+ptx";
/// The same of kernels that use what Hopper alone has. They are built where 9.0 is among the
/// others.
const HOPPER: &str = "-gencode=arch=compute_90a,code=sm_90a";

/// Compiles all kernels and writes `cuda_modules.rs`: a table of kernel names and the fatbins that
/// hold them.
pub fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let mut modules = modules(&head_dims()?);
    // The documentation's machine has no compiler, and needs no kernels.
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let documented = env::var_os("DOCS_RS").is_some();
    if !documented {
        let (nvcc, archs) = (find()?, arch_flags()?);
        let hopper = archs.iter().any(|flag| flag.contains("=compute_90"));
        modules.retain(|module| hopper || !is_for_hopper(module));
        compile_all(&nvcc, &archs, &modules, &out)?;
    }
    let hopper = modules.iter().any(|module| is_for_hopper(module) && !documented);
    let mut table = format!("const HAS_HOPPER: bool = {hopper};\nconst MODULES: &[(&[&str], &[u8])] = &[\n");
    for module in modules.iter().filter(|_| !documented) {
        let fatbin = out.join(format!("{}.fatbin", module.name));
        writeln!(table, "    (&{:?}, include_bytes!({fatbin:?})),", module.kernels)
            .map_err(|e| e.to_string())?;
    }
    table.push_str("];\n");
    std::fs::write(out.join("cuda_modules.rs"), table).map_err(|e| e.to_string())
}

fn is_for_hopper(module: &Module) -> bool {
    module.source == "hopper.cu"
}

/// nvcc: NVCC itself, of the toolkit in CUDA_HOME or CUDA_PATH, on the PATH, or in the usual
/// places.
fn find() -> Result<PathBuf, String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        return if nvcc.is_file() { Ok(nvcc) } else { Err(format!("NVCC: no file {}", nvcc.display())) };
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .map(|home| PathBuf::from(home).join("bin"))
        .chain(env::split_paths(&path))
        .chain([root.join(".nvcc/bin"), "/usr/local/cuda/bin".into(), "/opt/cuda/bin".into()])
        .map(|folder| folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))
        .find(|nvcc| nvcc.is_file())
        .ok_or_else(|| {
            "the feature `cuda` needs nvcc, 12.8 or later: install the CUDA toolkit, set NVCC to its path, or run scripts/install-nvcc.sh, \
             which puts nvcc 13.0 into this repository without changing the system"
                .into()
        })
}

/// `80,90+ptx` to nvcc's flags.
fn arch_flags() -> Result<Vec<String>, String> {
    println!("cargo::rerun-if-env-changed=STAR_ATTENTION_CUDA_ARCHS");
    let list = env::var("STAR_ATTENTION_CUDA_ARCHS").unwrap_or(ARCHS.into());
    list.split(',')
        .map(|arch| {
            let arch = arch.trim();
            let (number, code) = match arch.strip_suffix("+ptx") {
                Some(number) => (number, "compute"),
                None => (arch, "sm"),
            };
            let digits = number.trim_end_matches(['a', 'f']);
            if digits.parse::<u32>().is_ok_and(|n| n >= 80) {
                Ok(format!("-gencode=arch=compute_{number},code={code}_{number}"))
            } else {
                Err(format!(
                    "STAR_ATTENTION_CUDA_ARCHS: expected a list as {ARCHS}, of 80 and up, got {arch}"
                ))
            }
        })
        .collect()
}

fn compile_all(nvcc: &Path, archs: &[String], modules: &[Module], out: &Path) -> Result<(), String> {
    let failed = Mutex::new(None);
    for_each(modules, |module| {
        if let Err(reason) = compile(nvcc, archs, module, out)
            && let Ok(mut failed) = failed.lock()
        {
            failed.get_or_insert(reason);
        }
    });
    failed.into_inner().ok().flatten().map_or(Ok(()), Err)
}

fn compile(nvcc: &Path, archs: &[String], module: &Module, out: &Path) -> Result<(), String> {
    let source = Path::new("cuda").join(module.source);
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "--compress-mode=size", "--resource-usage"]);
    if is_for_hopper(module) {
        command.arg(HOPPER)
    } else {
        command.args(archs)
    };
    command.args(module.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    command.arg(&source).arg("-o").arg(out.join(format!("{}.fatbin", module.name)));
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {}", module.name, report.replace('\n', " | ")));
    }
    // For scripts/kernel-report.py.
    let defines: Vec<_> = module.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let report = format!("{}\n{report}", defines.join(" "));
    std::fs::write(out.join(format!("{}.usage", module.name)), report).map_err(|e| e.to_string())
}
