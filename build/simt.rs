//! The kernels as C++ for the SIMT emulator, with `cuda/simt/device.h` in the place of a GPU.

use crate::kernels::{Module, all_head_dims, for_each, modules};
use std::fmt::Write;
use std::path::PathBuf;

/// Compiles all kernels and writes `simt_kernels.rs`: tables of their names and addresses.
pub fn build() {
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let (kernels, probes) = (modules(&all_head_dims()), [probe(), mistakes()]);
    for modules in [&kernels[..], &probes] {
        for_each(modules, |module| compile(module, &out.join(&module.name)));
    }
    let table = table("KERNELS", &kernels) + &table("PROBES", &probes);
    std::fs::write(out.join("simt_kernels.rs"), table).expect("OUT_DIR can be written");
}

fn table(name: &str, modules: &[Module]) -> String {
    let (mut functions, mut rows) = (String::new(), String::new());
    for kernel in modules.iter().flat_map(|module| &module.kernels) {
        writeln!(functions, "    fn {kernel}(params: *const u8);").expect("a string");
        writeln!(rows, "    (\"{kernel}\", {kernel}),").expect("a string");
    }
    format!("unsafe extern \"C\" {{\n{functions}}}\n\nconst {name}: &[(&str, Kernel)] = &[\n{rows}];\n\n")
}

/// Kernels of no plan: they test the emulator and, on a chip, what is told of it.
fn probe() -> Module {
    let columns = [64, 80, 96, 112, 128, 176, 192, 256].map(|n| format!("probe_wgmma_n{n}"));
    let kernels = ["probe_box".into(), "probe_ring".into()].into_iter().chain(columns).collect();
    Module { name: "probe".into(), source: "probe.cu", defines: Vec::new(), kernels }
}

fn mistakes() -> Module {
    Module {
        name: "mistakes".into(),
        source: "simt/mistakes.cu",
        defines: Vec::new(),
        kernels: vec!["mistake".into()],
    }
}

fn compile(module: &Module, out: &PathBuf) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false).out_dir(out);
    // Linked by hand below: no C++ library is needed.
    build.cpp_link_stdlib(None).cpp_set_stdlib(None);
    build.flag("-xc++").flag("-fno-exceptions").flag("-fno-rtti").flag_if_supported("-Wno-unknown-pragmas");
    for (name, value) in &module.defines {
        build.define(name, value.as_str());
    }
    build.file(format!("cuda/{}", module.source)).compile(&format!("star_simt_{}", module.name));
}
