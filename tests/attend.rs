//! `examples/attend` on good files and bad ones.

mod common;

use common::{Folder, Rng, Tensor, assert_refused, example};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, Element, Mask, bf16, f16};
use std::fs;
use std::path::Path;
use std::process::Output;

fn attend(input: &Path, output: &Path, options: &[&str]) -> Output {
    let mut command = example("attend");
    command.arg("--input").arg(input).arg("--output").arg(output).args(options);
    command.output().expect("examples/attend, which `cargo test` builds with the tests")
}

type Entry = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn save(path: &Path, entries: &[Entry]) {
    let views = entries
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
}

trait Bytes: Element {
    const STORED: Dtype;
    fn bytes(self) -> Vec<u8>;
    fn load(bytes: &[u8]) -> f32;
}

macro_rules! bytes {
    ($($type:ty: $stored:expr),*) => {$(
        impl Bytes for $type {
            const STORED: Dtype = $stored;
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
            fn load(bytes: &[u8]) -> f32 {
                Self::from_le_bytes(bytes.try_into().unwrap()).to_f32()
            }
        }
    )*};
}
bytes!(f32: Dtype::F32, f16: Dtype::F16, bf16: Dtype::BF16);

fn entry<T: Bytes>(name: &'static str, tensor: &Tensor<T>) -> Entry {
    let bytes = tensor.values().flat_map(|x| T::from_f32(x).bytes()).collect();
    (name, T::STORED, tensor.shape().to_vec(), bytes)
}

fn inputs<T: Bytes>() -> [Tensor<T>; 3] {
    let mut rng = Rng::new(3);
    [("q", [2, 7, 4, 16]), ("k", [2, 9, 2, 16]), ("v", [2, 9, 2, 16])]
        .map(|(name, shape)| Tensor::normal(name, shape, &mut rng))
}

fn entries() -> [Entry; 3] {
    let [q, k, v] = inputs::<f32>();
    [entry("q", &q), entry("k", &k), entry("v", &v)]
}

/// Both backends give the oracle's answer for the mask; `unit` is the type's unit roundoff.
fn agrees<T: Bytes>(folder: &Folder, config: &AttentionConfig, options: &[&str], unit: f64) {
    let [q, k, v] = inputs::<T>();
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    save(&input, &[entry("q", &q), entry("k", &k), entry("v", &v)]);
    let exact = reference::attention(config, q.view(), k.view(), v.view()).unwrap();
    for backend in [&[][..], &["--backend", "flash"], &["--backend", "reference"]] {
        let result = attend(&input, &output, &[options, backend].concat());
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let bytes = fs::read(&output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2);
        let out = file.tensor("out").unwrap();
        assert_eq!((out.dtype(), out.shape()), (T::STORED, &q.shape()[..]));
        for (bytes, exact) in out.data().chunks(T::DTYPE.size()).zip(&exact.out) {
            // Few keys of normal values: rounding the weights and the output, each by half a unit of at most 4.
            assert!((f64::from(T::load(bytes)) - exact).abs() <= 8.0 * unit);
        }
        let lse = file.tensor("lse").unwrap();
        assert_eq!((lse.dtype(), lse.shape()), (Dtype::F32, &[2, 4, 7][..]));
        for (bytes, &exact) in lse.data().chunks(4).zip(&exact.lse) {
            let lse = f64::from(f32::load(bytes));
            assert!(lse == exact || (lse - exact).abs() <= 1e-5, "{lse} {exact}");
        }
        fs::remove_file(&output).unwrap();
    }
    assert_eq!(folder.files(), ["in.safetensors"]);
}

#[test]
fn good_files() {
    let folder = Folder::new("attend-good");
    let config = AttentionConfig::new;
    agrees::<f32>(&folder, &config(Mask::Full), &[], 1e-6);
    agrees::<f32>(&folder, &config(Mask::Causal), &["--mask", "causal"], 1e-6);
    agrees::<f16>(&folder, &config(Mask::Causal), &["--mask", "causal"], 4.9e-4);
    agrees::<bf16>(&folder, &config(Mask::Full), &["--mask", "full"], 3.9e-3);
    let star = Mask::Star { anchor_len: 2, block_len: 3, first_block_len: 4 };
    let lens = ["--mask", "star", "--anchor-len", "2", "--block-len", "3", "--first-block-len", "4"];
    agrees::<f32>(&folder, &config(star), &lens, 1e-6);
    let scaled = AttentionConfig { scale: Some(0.5), softcap: Some(3.0), ..config(Mask::Full) };
    agrees::<f32>(&folder, &scaled, &["--scale", "0.5", "--softcap", "3"], 1e-6);
}

#[test]
fn bad_files() {
    let folder = Folder::new("attend-files");
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    let refused = |message: &str| {
        assert_refused(&attend(&input, &output, &[]), message);
        let left: Vec<_> = folder.files().into_iter().filter(|name| name != "in.safetensors").collect();
        assert!(left.is_empty(), "{left:?} written in spite of the error");
    };
    refused("--input");

    save(&input, &entries());
    let whole = fs::read(&input).unwrap();
    for len in [0, 5, 8, 60, whole.len() / 2, whole.len() - 1] {
        fs::write(&input, &whole[..len]).unwrap();
        refused("--input");
    }
    fs::write(&input, [&whole[..], &[0]].concat()).unwrap();
    refused("--input");
    fs::write(&input, b"PK\x03\x04 this is another kind of file, longer than a header").unwrap();
    refused("--input");
    fs::write(&input, [0xff; 64]).unwrap();
    refused("--input");

    for (missing, name) in ["q", "k", "v"].into_iter().enumerate() {
        let mut rest = entries().to_vec();
        rest.remove(missing);
        save(&input, &rest);
        refused(&format!("no tensor {name}"));

        let mut wrong = entries();
        wrong[missing].2 = vec![wrong[missing].2.iter().product()];
        save(&input, &wrong);
        refused(&format!("{name}: expected 4 axes"));
    }
    let [_, k, v] = inputs::<f16>();
    for (i, other) in [(1, entry("k", &k)), (2, entry("v", &v))] {
        let mut wrong = entries();
        wrong[i] = other;
        save(&input, &wrong);
        refused(&format!("{}: expected dtype F32", wrong[i].0));
    }
    let integers = entries().map(|(name, _, shape, data)| (name, Dtype::I32, shape, data));
    save(&input, &integers);
    refused("q: expected dtype");

    // The library's own errors come through: batches, heads and head dims that do not fit.
    for (tensor, shape) in [(1, [1, 18, 2, 16]), (1, [2, 6, 3, 16]), (2, [2, 18, 1, 16]), (2, [2, 9, 4, 8])] {
        let mut wrong = entries();
        wrong[tensor].2 = shape.to_vec();
        save(&input, &wrong);
        refused("expected");
    }
}

#[test]
fn bad_options() {
    let folder = Folder::new("attend-options");
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    save(&input, &entries());
    fs::write(&output, "kept").unwrap();
    let star = |lens: [&'static str; 3]| {
        vec!["--mask", "star", "--anchor-len", lens[0], "--block-len", lens[1], "--first-block-len", lens[2]]
    };
    let cases: [(Vec<&str>, &str); 15] = [
        (vec!["--mask", "sliding"], "--mask"),
        (vec!["--backend", "gpu"], "--backend"),
        (vec!["--mask", "star"], "--anchor-len"),
        (vec!["--mask", "star", "--anchor-len", "1"], "--block-len"),
        (vec!["--mask", "star", "--anchor-len", "1", "--block-len", "2"], "--first-block-len"),
        (vec!["--anchor-len", "1"], "--anchor-len"),
        (vec!["--mask", "causal", "--block-len", "1"], "--block-len"),
        (star(["4", "3", "4"]), "anchor_len"),
        (star(["0", "0", "4"]), "block_len"),
        (star(["-1", "3", "4"]), "--anchor-len"),
        (vec!["--scale", "-1"], "scale"),
        (vec!["--scale", "NaN"], "scale"),
        (vec!["--scale", "much"], "--scale"),
        (vec!["--softcap", "0"], "softcap"),
        (vec!["--softcap", "inf"], "softcap"),
    ];
    for (options, message) in cases {
        assert_refused(&attend(&input, &output, &options), message);
        assert_eq!(fs::read(&output).unwrap(), b"kept");
    }
    assert_refused(&attend(&input, &folder.file("no/such/folder"), &[]), "--output");
    assert_refused(&attend(&input, folder.path(), &[]), "--output");
    assert_eq!(folder.files(), ["in.safetensors", "out.safetensors"]);
}
