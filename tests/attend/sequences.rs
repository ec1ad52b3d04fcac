//! Sequences of lengths of their own, each under its mask.

use super::*;

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

/// The ways in which a file may say where the keys of the sequences lie: k, v, and what describes
/// them. The keys themselves are the rows of `key` and `value`, one sequence after another.
fn ways<T: Bytes>(key: &Tensor<T>, value: &Tensor<T>) -> Vec<Vec<Entry>> {
    let [_, _, heads, _] = key.shape();
    let starts = [0, 9, 15];
    // `at(b, s)` is the row of `key` that stands there, NaN if none.
    let placed = |shape: [usize; 2], at: &dyn Fn(usize, usize) -> Option<usize>| {
        [("k", key), ("v", value)].map(|(name, from)| {
            let shape = [shape[0], shape[1], heads, from.shape()[3]];
            let tensor = Tensor::<T>::contiguous(name, shape, |[b, s, h, d]| {
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

/// Every backend and every way to say where keys lie gives each sequence what it gets alone.
fn ragged<Q: Bytes, T: Bytes>(backends: &[&[&str]], value_dim: usize, unit: f64) {
    let folder = Folder::new(&format!("attend-ragged-{}-{}", Q::DTYPE, T::DTYPE));
    let (input, output, masks_file) =
        (folder.file("in.safetensors"), folder.file("out.safetensors"), folder.file("masks.json"));
    fs::write(&masks_file, MASKS).unwrap();
    let mut rng = Rng::new(8);
    let query = Tensor::<Q>::normal("q", [1, ROWS, 4, 64], &mut rng);
    let [key, value] = [64, value_dim].map(|dim| Tensor::<T>::normal("rows", [1, 19, 2, dim], &mut rng));
    let exact_f32 = |tensor: &Tensor<T>, rows: std::ops::Range<usize>| {
        Tensor::<f32>::contiguous("exact", [1, rows.len(), 2, tensor.shape()[3]], |[_, s, h, d]| {
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
                let inputs = Inputs::new(own.view(), key.view(), value.view()).with_sinks(&SINKS[..]);
                let exact = reference::attention_of(&config, inputs).unwrap();
                for (got, exact) in out[row * 4 * value_dim..].iter().zip(&exact.out) {
                    assert!((f64::from(*got) - exact).abs() <= 8.0 * unit, "{options:?}: {got} {exact}");
                }
                for (index, exact) in exact.lse.iter().enumerate() {
                    let got = f64::from(lse[index / rows * ROWS + row + index % rows]);
                    assert!((got - exact).abs() <= 1e-4, "{options:?}: {got} {exact}");
                }
                (row, first_key) = (row + rows, first_key + keys);
            }
            assert!(out[row * 4 * value_dim..].iter().all(|&x| x == 0.0));
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
    ragged::<f32, f32>(cpu, 24, 1e-6);
    ragged::<f32, bf16>(cpu, 64, 1e-6);
    ragged::<f32, F8E4M3>(cpu, 80, 1e-6);
    ragged::<bf16, f32>(cpu, 64, 3.9e-3);
    ragged::<bf16, bf16>(
        &[cpu, &[&["--backend", "simt"], &["--backend", "simt", "--row-invariant"]]].concat(),
        64,
        3.9e-3,
    );
    ragged::<f16, f16>(&[&["--backend", "simt", "--split-keys", "64"]], 64, 4.9e-4);
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
