//! `examples/attend` on good files and bad ones.

#[path = "../common/mod.rs"]
mod common;

mod sequences;

use common::{Folder, Rng, Tensor, assert_refused, example};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, BlockList, Element, F8E4M3, Inputs, Mask, Scales, bf16, f16};
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

impl Bytes for F8E4M3 {
    const STORED: Dtype = Dtype::F8_E4M3;
    fn bytes(self) -> Vec<u8> {
        vec![self.to_bits()]
    }
    fn load(bytes: &[u8]) -> f32 {
        Self::from_bits(bytes[0]).to_f32()
    }
}

fn entry<T: Bytes>(name: &'static str, tensor: &Tensor<T>) -> Entry {
    let bytes = tensor.values().flat_map(|x| T::from_f32(x).bytes()).collect();
    (name, T::STORED, tensor.shape().to_vec(), bytes)
}

fn floats(name: &'static str, shape: &[usize], data: &[f32]) -> Entry {
    (name, Dtype::F32, shape.to_vec(), data.iter().flat_map(|x| x.bytes()).collect())
}

fn sinks_entry(sinks: &[f32]) -> Entry {
    floats("sinks", &[sinks.len()], sinks)
}

fn inputs<T: Bytes>() -> [Tensor<T>; 3] {
    let mut rng = Rng::new(3);
    [("q", [2, 7, 4, 16]), ("k", [2, 9, 2, 16]), ("v", [2, 9, 2, 16])]
        .map(|(name, shape)| Tensor::normal(name, shape, &mut rng))
}

/// What a file has beside normal q, k and v, and the last axis of v.
#[derive(Default)]
struct Given<'a> {
    sinks: Option<&'a [f32]>,
    scales: Option<Scales<&'a [f32]>>,
    value_dim: Option<usize>,
}

fn entries() -> [Entry; 3] {
    let [q, k, v] = inputs::<f32>();
    [entry("q", &q), entry("k", &k), entry("v", &v)]
}

/// Both backends give the oracle's answer for the mask; `unit` is the type's unit roundoff.
fn agrees<T: Bytes>(folder: &Folder, config: &AttentionConfig, options: &[&str], unit: f64) {
    agrees_with::<T, T>(folder, config, &Given::default(), options, unit);
}

/// The same with k and v of another type, and with what else is given.
fn agrees_with<Q: Bytes, K: Bytes>(
    folder: &Folder,
    config: &AttentionConfig,
    given: &Given<'_>,
    options: &[&str],
    unit: f64,
) {
    let value_dim = given.value_dim.unwrap_or(16);
    let ([q, _, _], [_, k, _]) = (inputs::<Q>(), inputs::<K>());
    let v = Tensor::<K>::normal("v", [2, 9, 2, value_dim], &mut Rng::new(4));
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    let mut tensors = vec![entry("q", &q), entry("k", &k), entry("v", &v)];
    tensors.extend(given.sinks.map(sinks_entry));
    if let Some(Scales { key, value, .. }) = given.scales {
        tensors.extend([floats("k_scale", &[key.len()], key), floats("v_scale", &[value.len()], value)]);
    }
    save(&input, &tensors);
    let mut views = Inputs::new(q.view(), k.view(), v.view());
    (views.sinks, views.scales) = (given.sinks, given.scales);
    let exact = reference::attention_of(config, views).unwrap();
    for backend in [&[][..], &["--backend", "flash"], &["--backend", "cpu"], &["--backend", "reference"]] {
        let result = attend(&input, &output, &[options, backend].concat());
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let bytes = fs::read(&output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2);
        let out = file.tensor("out").unwrap();
        assert_eq!((out.dtype(), out.shape()), (Q::STORED, &[2, 7, 4, value_dim][..]));
        for (bytes, exact) in out.data().chunks(Q::DTYPE.size()).zip(&exact.out) {
            // Few keys of normal values: rounding the weights and the output, each by half a unit
            // of at most 4.
            assert!((f64::from(Q::load(bytes)) - exact).abs() <= 8.0 * unit);
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

fn numbers(name: &'static str, shape: &[usize], data: &[i32]) -> Entry {
    (name, Dtype::I32, shape.to_vec(), data.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn read<T: Bytes>(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().data().chunks(T::DTYPE.size()).map(T::load).collect()
}

#[test]
fn good_files() {
    let folder = Folder::new("attend-good");
    let config = AttentionConfig::new;
    agrees::<f32>(&folder, &config(Mask::Full), &[], 1e-6);
    agrees::<f32>(&folder, &config(Mask::Causal), &["--mask", "causal"], 1e-6);
    agrees::<f16>(&folder, &config(Mask::Causal), &["--mask", "causal"], 4.9e-4);
    agrees::<bf16>(&folder, &config(Mask::Full), &["--mask", "full"], 3.9e-3);
    let star = Mask::Star { anchor_len: 2, block_len: 3, first_block_len: 4, left: None };
    let lens = ["--mask", "star", "--anchor-len", "2", "--block-len", "3", "--first-block-len", "4"];
    agrees::<f32>(&folder, &config(star), &lens, 1e-6);
    let window = |left, right| Mask::Window { left, right };
    agrees::<f32>(&folder, &config(window(Some(2), Some(1))), &["--window", "2,1"], 1e-6);
    agrees::<f32>(&folder, &config(window(None, Some(1))), &["--mask", "full", "--window", ",1"], 1e-6);
    let sliding = config(Mask::sliding_window(3).unwrap());
    agrees::<bf16>(&folder, &sliding, &["--mask", "causal", "--window", "2,7"], 3.9e-3);
    let star = Mask::Star { anchor_len: 2, block_len: 3, first_block_len: 4, left: Some(1) };
    agrees::<f32>(&folder, &config(star), &[&lens[..], &["--window", "1,"]].concat(), 1e-6);
    let scaled = AttentionConfig { scale: Some(0.5), softcap: Some(3.0), ..config(Mask::Full) };
    agrees::<f32>(&folder, &scaled, &["--scale", "0.5", "--softcap", "3"], 1e-6);
    let given = Given { sinks: Some(&[0.5, f32::NEG_INFINITY, 9.0, -1.5]), ..Given::default() };
    agrees_with::<f32, f32>(&folder, &config(Mask::Causal), &given, &["--mask", "causal"], 1e-6);
    agrees_with::<bf16, bf16>(&folder, &config(Mask::Full), &given, &["--split-keys", "4"], 3.9e-3);
}

#[test]
fn values_of_another_dim_and_codes_with_scales() {
    let folder = Folder::new("attend-values");
    let (config, causal) = (AttentionConfig::new(Mask::Causal), ["--mask", "causal"]);
    for value_dim in [1, 7, 40] {
        let given = Given { value_dim: Some(value_dim), ..Given::default() };
        agrees_with::<f32, f32>(&folder, &config, &given, &causal, 1e-6);
        agrees_with::<f16, bf16>(&folder, &config, &given, &causal, 4.9e-4);
    }
    agrees_with::<f32, F8E4M3>(&folder, &config, &Given::default(), &causal, 1e-6);
    let given = Given {
        scales: Some(Scales::new(&[0.25, 1.7], &[0.4])),
        sinks: Some(&[0.5, f32::NEG_INFINITY, 9.0, -1.5]),
        value_dim: Some(24),
    };
    agrees_with::<f32, F8E4M3>(&folder, &config, &given, &causal, 1e-6);
    agrees_with::<bf16, F8E4M3>(&folder, &config, &given, &causal, 3.9e-3);
    let given = Given { scales: Some(Scales::new(&[1.7], &[0.1, 1.3])), ..Given::default() };
    agrees_with::<f16, F8E4M3>(&folder, &config, &given, &causal, 4.9e-4);

    // A scalar counts as one element, and a scale that is missing as 1.
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    let ([q, _, _], [_, k, v]) = (inputs::<f32>(), inputs::<F8E4M3>());
    let [q, k, v] = [entry("q", &q), entry("k", &k), entry("v", &v)];
    let result = |scales: &[Entry]| {
        save(&input, &[&[q.clone(), k.clone(), v.clone()], scales].concat());
        assert!(attend(&input, &output, &[]).status.success());
        fs::read(&output).unwrap()
    };
    let expected = result(&[floats("k_scale", &[2], &[0.3; 2]), floats("v_scale", &[2], &[1.0; 2])]);
    assert!(result(&[floats("k_scale", &[], &[0.3])]) == expected);
    assert!(result(&[floats("k_scale", &[1], &[0.3]), floats("v_scale", &[], &[1.0])]) == expected);
    assert!(result(&[]) != expected);
}

/// Seven rows in tiles of 4 over nine keys; a second sequence has the same list.
#[test]
fn block_lists() {
    let folder = Folder::new("attend-blocks");
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    let offsets = numbers("row_offsets", &[3], &[0, 2, 3]);
    let ranges = numbers("row_ranges", &[3, 2], &[0, 2, 4, 7, 1, 9]);
    let list = BlockList::new(4, &[0, 2, 3], &[0..2, 4..7, 1..9]).unwrap();
    let [q, k, v] = inputs::<f32>();
    save(&input, &[&entries()[..], &[offsets.clone(), ranges.clone()]].concat());
    let blocks = ["--mask", "blocks", "--block-rows", "4"];
    for (list, options) in [(list.clone(), &[][..]), (list.causal(), &["--block-causal"])] {
        let config = AttentionConfig::new(Mask::from(list));
        let exact = reference::attention(&config, q.view(), k.view(), v.view()).unwrap();
        let result = attend(&input, &output, &[&blocks, options].concat());
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let bytes = fs::read(&output).unwrap();
        let got = read::<f32>(&SafeTensors::deserialize(&bytes).unwrap(), "out");
        assert!(got.iter().zip(&exact.out).all(|(got, exact)| (f64::from(*got) - exact).abs() <= 1e-6));
    }
    let refused = |options: &[&str], message: &str| {
        assert_refused(&attend(&input, &output, options), message);
    };
    refused(&["--mask", "blocks"], "--block-rows: needed");
    refused(&["--mask", "blocks", "--block-rows", "0"], "tile_rows");
    refused(&["--mask", "blocks", "--block-rows", "3"], "row_offsets: expected 3 tiles");
    refused(&[&blocks[..], &["--window", "1,1"]].concat(), "--window: not with");
    for (wrong, message) in [
        (vec![offsets.clone()], "row_ranges: needed"),
        (
            vec![offsets.clone(), numbers("row_ranges", &[6], &[0, 2, 4, 7, 1, 9])],
            "row_ranges: expected shape",
        ),
        (vec![offsets.clone(), numbers("row_ranges", &[3, 2], &[0, 5, 4, 7, 1, 9])], "tile 0, range 1"),
        (
            vec![offsets.clone(), numbers("row_ranges", &[3, 2], &[0, 2, 4, 7, 1, 10])],
            "keys below 9 (tile 1)",
        ),
        (
            vec![numbers("row_offsets", &[3], &[0, 2, 4]), ranges.clone()],
            "row_offsets: expected offsets from 0",
        ),
        (vec![numbers("row_offsets", &[3], &[0, -2, 3]), ranges], "row_offsets: expected no negative"),
    ] {
        save(&input, &[&entries()[..], &wrong].concat());
        refused(&blocks, message);
    }
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
    let [q, k, v] = entries();
    for (sinks, message) in [
        (sinks_entry(&[0.0; 3]), "sinks: expected shape [4]"),
        (("sinks", Dtype::F16, vec![4], vec![0; 8]), "sinks: expected dtype F32"),
        (sinks_entry(&[0.0, 0.0, f32::NAN, 0.0]), "sinks: expected a number below +inf for head 2"),
    ] {
        save(&input, &[q.clone(), k.clone(), v.clone(), sinks]);
        refused(message);
    }
    let [query, key, value] = inputs::<F8E4M3>();
    let codes = [entry("k", &key), entry("v", &value)];
    let of_codes = |scale: Entry| [std::slice::from_ref(&q), &codes[..], &[scale]].concat();
    for (scale, message) in [
        (floats("k_scale", &[3], &[1.0; 3]), "k_scale: expected shape [1] or [2], got [3]"),
        (floats("v_scale", &[1, 2], &[1.0; 2]), "v_scale: expected shape [1] or [2], got [1, 2]"),
        (floats("k_scale", &[0], &[]), "k_scale: expected shape [1] or [2], got [0]"),
        (("v_scale", Dtype::F16, vec![1], vec![0; 2]), "v_scale: expected dtype F32, got F16"),
        (floats("k_scale", &[2], &[1.0, 0.0]), "k_scale: expected a finite number above 0 for head 1, got 0"),
        (floats("k_scale", &[], &[f32::NAN]), "k_scale: expected a finite number above 0 for head 0"),
        (floats("v_scale", &[1], &[f32::INFINITY]), "v_scale: expected a finite number above 0"),
        (floats("v_scale", &[1], &[-1.0]), "v_scale: expected a finite number above 0"),
    ] {
        save(&input, &of_codes(scale));
        refused(message);
    }
    save(&input, &[q.clone(), k.clone(), v.clone(), floats("v_scale", &[1], &[1.0])]);
    refused("v_scale: expected k and v of dtype F8_E4M3, got F32");
    save(&input, &[&[entry("q", &query)], &codes[..]].concat());
    refused("q: expected dtype F32, F16 or BF16, got F8_E4M3");
    save(&input, &[q.clone(), codes[0].clone(), v.clone()]);
    refused("k: expected dtype F32 as v has, got F8_E4M3");
    for (shape, message) in
        [([2, 9, 1, 16], "v: expected shape [2, 9, 2, 16]"), ([2, 9, 2, 0], "v: expected a last axis")]
    {
        let len = 4 * shape.iter().product::<usize>();
        save(&input, &[q.clone(), k.clone(), ("v", Dtype::F32, shape.to_vec(), vec![0; len])]);
        refused(message);
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
    let cases: [(Vec<&str>, &str); 32] = [
        (vec!["--mask", "sliding"], "--mask"),
        (vec!["--backend", "gpu"], "--backend"),
        (vec!["--window", "3"], "--window"),
        (vec!["--window", "-1,0"], "--window"),
        (vec!["--window", "1,2,3"], "--window"),
        (vec!["--window", "1,0", "--masks", "no/such/file"], "--window: not with --masks"),
        (vec!["--block-rows", "4"], "--block-rows: only with"),
        (vec!["--block-causal"], "--block-causal: only with"),
        (vec!["--mask", "blocks", "--block-rows", "4"], "row_offsets: needed"),
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
        (vec!["--split-keys", "0"], "split_keys"),
        (vec!["--split-keys", "-1"], "--split-keys"),
        (vec!["--threads", "0"], "--threads"),
        (vec!["--threads", "2", "--backend", "simt"], "--threads"),
        (vec!["--instructions", "sse"], "error: --instructions"),
        // Of another CPU.
        (
            vec!["--instructions", if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" }],
            "error: --instructions",
        ),
        (vec!["--instructions", "portable", "--backend", "reference"], "--instructions"),
        (vec!["--masks", "no/such/file"], "--masks"),
        (vec!["--masks", "no/such/file", "--mask", "causal"], "--mask: not with --masks"),
        // Only f16 and bf16 of the kernels' head dims.
        (vec!["--backend", "simt"], "expected"),
    ];
    for (options, message) in cases {
        assert_refused(&attend(&input, &output, &options), message);
        assert_eq!(fs::read(&output).unwrap(), b"kept");
    }
    assert_refused(&attend(&input, &folder.file("no/such/folder"), &[]), "--output");
    assert_refused(&attend(&input, folder.path(), &[]), "--output");
    assert_eq!(folder.files(), ["in.safetensors", "out.safetensors"]);
}

/// A link stays one, and a file keeps who may read it.
#[cfg(unix)]
#[test]
fn outputs_replace_no_links() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = Folder::new("attend-links");
    let (input, real, link) =
        (folder.file("in.safetensors"), folder.file("real"), folder.file("link.safetensors"));
    save(&input, &entries());
    fs::write(&real, "old").unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&real, &link).unwrap();
    assert!(attend(&input, &link, &[]).status.success());
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let written = fs::read(&real).unwrap();
    assert!(SafeTensors::deserialize(&written).is_ok());
    fs::write(&real, "old").unwrap();
    assert!(attend(&input, &real, &[]).status.success());
    assert_eq!(fs::read(&real).unwrap(), written);
    assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o600);
}
