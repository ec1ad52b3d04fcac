//! `examples/attend` on good files and bad ones.

mod common;

use common::{Folder, Rng, Tensor, assert_refused, example};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, BlockList, Element, Mask, bf16, f16};
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

fn sinks_entry(sinks: &[f32]) -> Entry {
    ("sinks", Dtype::F32, vec![sinks.len()], sinks.iter().flat_map(|x| x.bytes()).collect())
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
    agrees_with_sinks::<T>(folder, config, None, options, unit);
}

/// The same with a sink for each head, if given.
fn agrees_with_sinks<T: Bytes>(
    folder: &Folder,
    config: &AttentionConfig,
    sinks: Option<&[f32]>,
    options: &[&str],
    unit: f64,
) {
    let [q, k, v] = inputs::<T>();
    let (input, output) = (folder.file("in.safetensors"), folder.file("out.safetensors"));
    let mut tensors = vec![entry("q", &q), entry("k", &k), entry("v", &v)];
    tensors.extend(sinks.map(sinks_entry));
    save(&input, &tensors);
    let exact = reference::attention_with_sinks(config, q.view(), k.view(), v.view(), sinks).unwrap();
    for backend in [&[][..], &["--backend", "flash"], &["--backend", "cpu"], &["--backend", "reference"]] {
        let result = attend(&input, &output, &[options, backend].concat());
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let bytes = fs::read(&output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2);
        let out = file.tensor("out").unwrap();
        assert_eq!((out.dtype(), out.shape()), (T::STORED, &q.shape()[..]));
        for (bytes, exact) in out.data().chunks(T::DTYPE.size()).zip(&exact.out) {
            // Few keys of normal values: rounding the weights and the output, each by half a unit
            // of at most 4.
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
    let sinks = Some(&[0.5, f32::NEG_INFINITY, 9.0, -1.5][..]);
    agrees_with_sinks::<f32>(&folder, &config(Mask::Causal), sinks, &["--mask", "causal"], 1e-6);
    agrees_with_sinks::<bf16>(&folder, &config(Mask::Full), sinks, &["--split-keys", "4"], 3.9e-3);
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

/// Three sequences of 5, 1 and 4 query rows and 9, 6 and 4 keys, and two rows of padding.
const LENS: [[usize; 2]; 3] = [[5, 9], [1, 6], [4, 4]];
const ROWS: usize = 12;
/// One for each query head.
const SINKS: [f32; 4] = [1.5, -0.5, f32::NEG_INFINITY, 4.0];

fn masks() -> [Mask; 3] {
    let star = Mask::Star { anchor_len: 2, block_len: 3, first_block_len: 3, left: Some(1) };
    [star, Mask::Full, Mask::Window { left: Some(2), right: Some(0) }]
}

const MASKS: &str = r#"[
    {"mask": "star", "anchor_len": 2, "block_len": 3, "first_block_len": 3, "window": [1, 0]},
    {"mask": "full", "window": null},
    {"mask": "causal", "window": [2, null]}
]"#;

fn numbers(name: &'static str, shape: &[usize], data: &[i32]) -> Entry {
    (name, Dtype::I32, shape.to_vec(), data.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// The ways in which a file may say where the keys of the sequences lie: k, v, and what describes
/// them. The keys themselves are the rows of `key` and `value`, one sequence after another.
fn ways<T: Bytes>(key: &Tensor<T>, value: &Tensor<T>) -> Vec<Vec<Entry>> {
    let [_, _, heads, dim] = key.shape();
    let starts = [0, 9, 15];
    // `at(b, s)` is the row of `key` that stands there, NaN if none.
    let placed = |shape: [usize; 2], at: &dyn Fn(usize, usize) -> Option<usize>| {
        [("k", key), ("v", value)].map(|(name, from)| {
            let tensor = Tensor::<T>::contiguous(name, [shape[0], shape[1], heads, dim], |[b, s, h, d]| {
                at(b, s).map_or(f32::NAN, |row| from.get([0, row, h, d]).to_f32())
            });
            entry(name, &tensor)
        })
    };
    let lens = LENS.map(|[_, keys]| keys);
    let packed = placed([1, 19], &|_, s| Some(s));
    let gaps = placed([1, 30], &|_, s| {
        let (sequence, row) = (s / 10, s % 10);
        (row < lens[sequence]).then(|| starts[sequence] + row)
    });
    let batched = placed([3, 11], &|b, s| (s < lens[b]).then(|| starts[b] + s));
    // Pages of 4 rows, from the last to the first; a row of the table has one slot more than
    // needed.
    let table = [7, 6, 5, 4, 3, -1, 2, -1, 0].map(|page: i32| page);
    let paged = placed([8, 4], &|page, row| {
        let slot = table.iter().position(|&p| p == page as i32)?;
        let key = slot % 3 * 4 + row;
        (key < lens[slot / 3]).then(|| starts[slot / 3] + key)
    });
    let i32s = |lens: [usize; 3]| lens.map(|len| len as i32);
    vec![
        [&packed[..], &[numbers("key_offsets", &[4], &[0, 9, 15, 19])]].concat(),
        [
            &gaps[..],
            &[numbers("key_offsets", &[4], &[0, 10, 20, 30]), numbers("key_lens", &[3], &i32s(lens))],
        ]
        .concat(),
        [&batched[..], &[numbers("key_lens", &[3], &i32s(lens))]].concat(),
        [&paged[..], &[numbers("page_table", &[3, 3], &table), numbers("key_lens", &[3], &i32s(lens))]]
            .concat(),
    ]
}

fn read<T: Bytes>(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().data().chunks(T::DTYPE.size()).map(T::load).collect()
}

/// Every backend and every way to say where keys lie gives each sequence what it gets alone.
fn ragged<Q: Bytes, T: Bytes>(backends: &[&[&str]], unit: f64) {
    let folder = Folder::new(&format!("attend-ragged-{}-{}", Q::DTYPE, T::DTYPE));
    let (input, output, masks_file) =
        (folder.file("in.safetensors"), folder.file("out.safetensors"), folder.file("masks.json"));
    fs::write(&masks_file, MASKS).unwrap();
    let mut rng = Rng::new(8);
    let query = Tensor::<Q>::normal("q", [1, ROWS, 4, 64], &mut rng);
    let [key, value] = ["k", "v"].map(|name| Tensor::<T>::normal(name, [1, 19, 2, 64], &mut rng));
    let exact_f32 = |tensor: &Tensor<T>, rows: std::ops::Range<usize>| {
        Tensor::<f32>::contiguous("exact", [1, rows.len(), 2, 64], |[_, s, h, d]| {
            tensor.get([0, rows.start + s, h, d]).to_f32()
        })
    };
    for way in ways(&key, &value) {
        let offsets = numbers("query_offsets", &[4], &[0, 5, 6, 10]);
        save(&input, &[&[entry("q", &query), offsets, sinks_entry(&SINKS)][..], &way].concat());
        for backend in backends {
            let options = [&["--masks", masks_file.to_str().unwrap()], *backend].concat();
            let result = attend(&input, &output, &options);
            assert!(result.status.success(), "{options:?} {}", String::from_utf8_lossy(&result.stderr));
            let bytes = fs::read(&output).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let (out, lse) = (read::<Q>(&file, "out"), read::<f32>(&file, "lse"));
            let (mut row, mut first_key) = (0, 0);
            for ([rows, keys], mask) in LENS.into_iter().zip(masks()) {
                let own = Tensor::<f32>::contiguous("own", [1, rows, 4, 64], |[_, s, h, d]| {
                    query.get([0, row + s, h, d]).to_f32()
                });
                let [key, value] = [&key, &value].map(|t| exact_f32(t, first_key..first_key + keys));
                let config = AttentionConfig::new(mask);
                let (own, key, value) = (own.view(), key.view(), value.view());
                let exact = reference::attention_with_sinks(&config, own, key, value, Some(&SINKS)).unwrap();
                for (got, exact) in out[row * 256..].iter().zip(&exact.out) {
                    assert!((f64::from(*got) - exact).abs() <= 8.0 * unit, "{options:?}: {got} {exact}");
                }
                for (index, exact) in exact.lse.iter().enumerate() {
                    let got = f64::from(lse[index / rows * ROWS + row + index % rows]);
                    assert!((got - exact).abs() <= 1e-4, "{options:?}: {got} {exact}");
                }
                (row, first_key) = (row + rows, first_key + keys);
            }
            assert!(out[row * 256..].iter().all(|&x| x == 0.0));
            assert!((0..4).all(|head| lse[head * ROWS + row..][..2] == [f32::NEG_INFINITY; 2]));
        }
    }
}

#[test]
fn sequences_of_any_lengths() {
    let cpu: &[&[&str]] = &[
        &[],
        &["--backend", "reference"],
        &["--split-keys", "3", "--threads", "1"],
        &["--row-invariant", "--instructions", "portable"],
    ];
    ragged::<f32, f32>(cpu, 1e-6);
    ragged::<f32, bf16>(cpu, 1e-6);
    ragged::<bf16, f32>(cpu, 3.9e-3);
    ragged::<bf16, bf16>(
        &[cpu, &[&["--backend", "simt"], &["--backend", "simt", "--row-invariant"]]].concat(),
        3.9e-3,
    );
    ragged::<f16, f16>(&[&["--backend", "simt", "--split-keys", "64"]], 4.9e-4);
}

#[test]
fn bad_sequences() {
    let folder = Folder::new("attend-sequences");
    let (input, output, masks_file) =
        (folder.file("in.safetensors"), folder.file("out.safetensors"), folder.file("masks.json"));
    let [q, k, v] = inputs::<f32>();
    let tensors = [entry("q", &q), entry("k", &k), entry("v", &v)];
    let packed = tensors.clone().map(|(name, dtype, shape, data)| {
        (name, dtype, vec![1, shape[0] * shape[1], shape[2], shape[3]], data)
    });
    let refused = |tensors: &[Entry; 3], more: &[Entry], masks: &str, message: &str| {
        save(&input, &[&tensors[..], more].concat());
        fs::write(&masks_file, masks).unwrap();
        let options = ["--masks", masks_file.to_str().unwrap()];
        assert_refused(&attend(&input, &output, if masks.is_empty() { &[] } else { &options }), message);
        assert!(!output.exists());
    };
    // q has 2 sequences of 7 rows, k and v of 9 keys.
    let offsets = |name, data: &[i32]| numbers(name, &[data.len()], data);
    let with = |tensors: &[Entry; 3], more: &[Entry], message: &str| refused(tensors, more, "", message);
    with(&tensors, &[offsets("query_offsets", &[0, 7, 14])], "q: expected batch 1");
    with(&packed, &[offsets("query_offsets", &[])], "query_offsets: expected shape");
    with(&packed, &[offsets("query_offsets", &[1, 14])], "query_offsets: expected offsets");
    with(&packed, &[offsets("query_offsets", &[0, 9, 7])], "query_offsets: expected offsets");
    with(&packed, &[offsets("query_offsets", &[0, 15])], "query_offsets: expected offsets");
    with(&packed, &[offsets("query_offsets", &[0, -1])], "query_offsets: expected no negative");
    with(&packed, &[offsets("query_offsets", &[0, 7, 14])], "k: expected 2 sequences");
    with(&packed, &[offsets("key_offsets", &[0, 7, 14])], "key_offsets: expected 1 sequences");
    with(&tensors, &[offsets("key_lens", &[9])], "key_lens: expected shape [2]");
    with(&tensors, &[offsets("key_lens", &[9, 10])], "key_lens: sequence 1: expected at most 9");
    with(&tensors, &[numbers("page_table", &[2, 1], &[0, 1])], "key_lens: needed");
    let paged = |table: &[i32], lens: &[i32]| {
        [numbers("page_table", &[2, table.len() / 2], table), offsets("key_lens", lens)]
    };
    with(&tensors, &paged(&[0, 2], &[9, 9]), "sequence 1: pages");
    with(&tensors, &paged(&[0, -1], &[9, 1]), "sequence 1: pages");
    with(&tensors, &paged(&[0, 1], &[10, 9]), "sequence 0: pages");
    with(&tensors, &[("key_lens", Dtype::F32, vec![2], vec![0; 8])], "key_lens: expected dtype I32");

    for (masks, message) in [
        ("[", "--masks"),
        ("{}", "expected a list"),
        (r#"[{"mask": "full"}]"#, "error: --masks"),
        (r#"[{"mask": "full"}, 3]"#, "sequence 1: expected an object"),
        (r#"[{"mask": "full"}, {"mask": "sliding"}]"#, "sequence 1: mask"),
        (r#"[{"mask": "full"}, {"mask": "star", "anchor_len": 1, "block_len": 2}]"#, "first_block_len"),
        (r#"[{"mask": "causal", "block_len": 2}, {"mask": "full"}]"#, "sequence 0: block_len"),
        (r#"[{"mask": "full", "windows": [2, 0]}, {"mask": "full"}]"#, "sequence 0: unknown member windows"),
        (r#"[{"mask": "full", "window": 2}, {"mask": "full"}]"#, "sequence 0: window: expected [L, R]"),
        (
            r#"[{"mask": "full"}, {"mask": "full", "window": [2, -1]}]"#,
            "sequence 1: window: expected a whole",
        ),
        (r#"[{"mask": "blocks"}, {"mask": "full"}]"#, "sequence 0: mask: expected full, causal or star"),
        (r#"[{"mask": "star", "anchor_len": 3, "block_len": 2, "first_block_len": 3}, {}]"#, "anchor_len"),
        (r#"[{"mask": "star", "anchor_len": -1, "block_len": 2, "first_block_len": 3}, {}]"#, "anchor_len"),
    ] {
        refused(&tensors, &[], masks, message);
    }
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
