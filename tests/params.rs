//! The committed view of `cuda/params.h` is bindgen's. With `BLESS=1` it is written anew.

use std::panic;
use std::path::Path;

#[test]
fn params_are_those_of_the_header() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // bindgen panics where it finds no libclang.
    let generated = panic::catch_unwind(|| {
        bindgen::Builder::default()
            .header(root.join("cuda/params.h").to_string_lossy())
            .allowlist_type("Star.*")
            .derive_default(true)
            .generate_comments(false)
            .disable_header_comment()
            .raw_line(
                "//! What the kernels are told: bindgen's view of `cuda/params.h`, which has the comments.\n",
            )
            .formatter(bindgen::Formatter::Prettyplease)
            .generate()
    });
    let Ok(generated) = generated else {
        assert!(std::env::var_os("LIBCLANG_PATH").is_none(), "no libclang where LIBCLANG_PATH says");
        println!("skipped: there is no libclang");
        return;
    };
    let generated = generated.unwrap().to_string();
    let path = root.join("src/cuda/params.rs");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(generated == committed, "src/cuda/params.rs is not what cuda/params.h gives");
}
