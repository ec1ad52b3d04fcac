//! The built example: good runs on haystacks and text, saved logits, and bad input, which gives one
//! line and exit code 2.
#![cfg(feature = "candle")]

// Shared with the tests of the model, which use all of it.
#[allow(dead_code)]
#[path = "model/byte_level.rs"]
mod byte_level;
#[allow(dead_code)]
#[path = "model/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code)]
#[path = "model/gguf_file.rs"]
mod gguf_file;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Metadata;
use candle_core::{DType, Device, Tensor};
use gguf_file::File;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// A directory that goes away with its owner.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("star-attention-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file; returns its path.
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self.path(name)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// A copy of the retrieval Llama, in a directory of its own.
    fn checkpoint(&self, name: &str) -> PathBuf {
        let (from, to) = (retrieval_llama(), self.0.join(name));
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::write(to.join(file), std::fs::read(from.join(file)).unwrap()).unwrap();
        }
        to
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn retrieval_llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/retrieval-llama")
}

/// The example, which `cargo test` builds beside the folder of its tests unless it was told to
/// build this test alone.
fn built() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        let path = profile.join("examples/star_attention").with_extension(std::env::consts::EXE_EXTENSION);
        if !path.exists() {
            let profile = if profile.ends_with("release") { "release" } else { "test" };
            let args = ["build", "--features", "candle", "--example", "star_attention", "--profile", profile];
            assert!(Command::new(env!("CARGO")).args(args).status().unwrap().success());
        }
        path
    })
}

fn example(args: &[&str]) -> Output {
    Command::new(built()).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn star_and_dense_find_the_needles() {
    let output = example(&["--context-len", "512", "--needles", "4", "--ranks", "3", "--block-len", "100"]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert_eq!(out.matches("(right)").count(), 8, "{out}");
    for row in [
        "phase 1",
        "phase 2",
        "speed-up over dense",
        "KV of the context",
        "sent per layer",
        "messages per layer",
    ] {
        assert!(out.contains(row), "{row} is not in {out}");
    }
}

#[test]
fn every_scheme_finds_the_needles() {
    for anchor in ["received", "cheapest"] {
        let args = [
            "--context-len",
            "512",
            "--needles",
            "4",
            "--ranks",
            "3",
            "--block-len",
            "100",
            "--mode",
            "star",
        ];
        let output = example(&[&args[..], &["--anchor", anchor, "--generated", "round-robin"]].concat());
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{err}");
        assert_eq!(out.matches("(right)").count(), 4, "{out}");
        assert!(out.contains("dealt to all"), "{out}");
    }
}

/// The example with a text on standard input.
fn example_with_input(args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(built());
    let pipes = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// A checkpoint whose attention adds nothing: after a byte comes the next one, and after `g` the
/// end.
fn alphabet() -> checkpoint::Directory {
    let (config, tensors) = alphabet_tensors();
    let directory = checkpoint::write(&config, &tensors);
    std::fs::write(directory.path().join("tokenizer.json"), byte_level::tokenizer().to_string()).unwrap();
    directory
}

fn alphabet_tensors() -> (Value, HashMap<String, Tensor>) {
    let vocab = byte_level::EOS as usize + 1;
    let config = checkpoint::config_with(json!({
        "vocab_size": vocab, "hidden_size": 64, "bos_token_id": byte_level::BOS, "eos_token_id": byte_level::EOS
    }));
    let mut tensors = checkpoint::tensors(&config, DType::F32);
    for (name, tensor) in &mut tensors {
        if name.contains("o_proj") || name.contains("down_proj") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    // The row of each token's successor is the token's own, and signs alone make rows of equal
    // length.
    let embedding = tensors["model.embed_tokens.weight"].sign().unwrap();
    let before = |token: u32| match token {
        byte_level::EOS => u32::from(b'g'),
        // The end takes the place of `h`.
        104 => 104,
        token => token.saturating_sub(1),
    };
    let rows: Vec<u32> = (0..vocab as u32).map(before).collect();
    let rows = Tensor::new(rows, &Device::Cpu).unwrap();
    tensors.insert("lm_head.weight".into(), embedding.index_select(&rows, 0).unwrap());
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    tensors.insert("model.norm.weight".into(), Tensor::ones(64, DType::F32, &Device::Cpu).unwrap());
    (config, tensors)
}

#[test]
fn text_is_answered_with_text() {
    let (model, directory) = (alphabet(), Directory::new("text"));
    let model = model.path().display().to_string();
    let context = directory.file("context.txt", "Läs några rader.\nThen the letters.\n".as_bytes());
    let args = ["--model", &model, "--context", &context, "--query", "say ab"];
    for (generate, answer) in [(&[][..], "cdefg"), (&["--generate", "3"], "cde")] {
        let output = example(&[&args[..], generate].concat());
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{err}");
        for mode in ["star", "dense"] {
            assert!(out.lines().any(|line| line == format!("{mode}: {answer}")), "{mode}: {out}");
        }
    }
}

/// The same model and tokenizer in one file, and the context on standard input.
#[test]
fn a_gguf_file_answers_as_its_directory_does() {
    let (config, tensors) = alphabet_tensors();
    let mut file = File::of(&config, &tensors, GgmlDType::F32);
    // Two tokens of a chat template, in the place of control characters.
    for (name, values) in [
        ("tokenizer.ggml.tokens", ["<|im_start|>", "<|im_end|>"].map(|token| Metadata::String(token.into()))),
        ("tokenizer.ggml.token_type", [Metadata::I32(3), Metadata::I32(3)]),
    ] {
        let Some(Metadata::Array(array)) = file.metadata.get_mut(name) else { panic!("{name}") };
        array[..2].clone_from_slice(&values);
    }
    let (_directory, path) = file.write();
    let model = path.display().to_string();
    let args = ["--model", &model, "--text", "-", "--question", "say ab"];
    let output = example_with_input(&args, "Läs några rader.\n".as_bytes());
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    for mode in ["star", "dense"] {
        assert!(out.lines().any(|line| line == format!("{mode}: cdefg")), "{mode}: {out}");
    }
    // `<s>`, `<|im_start|>`, `user`, a line's end, and two letters.
    let output = example_with_input(&[&args[..], &["--chat", "--generate", "2"]].concat(), b"yz");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("1 context of 9 tokens"), "{out}");
}

#[test]
fn logits_are_saved_for_every_query_and_generated_token() {
    let directory = Directory::new("logits");
    let context = directory.file("context.json", b"[0,16,17,18,1,112,200,201,16,17,18]");
    let query = directory.file("query.json", b"[2,112]");
    for (mode, names) in [("both", vec!["dense", "star"]), ("star", vec!["star"]), ("dense", vec!["dense"])] {
        let logits = directory.path("logits.safetensors");
        let mut args = vec!["--context-ids", &context, "--query-ids", &query, "--generate", "3"];
        args.extend(["--save-logits", &logits, "--mode", mode, "--block-len", "4", "--anchor-len", "2"]);
        let output = example(&args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let bytes = std::fs::read(&logits).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut found: Vec<&str> = tensors.names();
        found.sort_unstable();
        assert_eq!(found, names);
        for name in names {
            let tensor = tensors.tensor(name).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, [5, 256].as_slice()));
        }
        assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 3, "nothing else is left behind");
    }
}

#[test]
fn bad_input_gives_one_line_and_exit_code_2() {
    let directory = Directory::new("bad");
    let ids = directory.file("ids.json", b"[0,16,17,18]");
    let outside = directory.file("outside.json", b"[0,256]");
    let negative = directory.file("negative.json", b"[-1]");
    let words = directory.file("words.json", b"{\"ids\": 3}");
    let empty = directory.file("empty.json", b"[]");
    let prose = directory.file("prose.txt", b"sun moon");
    let binary = directory.file("binary", b"\xff\xfe");
    let logits = directory.path("logits.safetensors");
    let nowhere = directory.path("no/where");

    // More tensors than the file has room for.
    let lying = directory.file("lying.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\0\0\0\0\x01\0\0\0\0\0\0\0");

    let truncated = directory.checkpoint("truncated");
    let weights = truncated.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let foreign = directory.checkpoint("foreign");
    let config = std::fs::read_to_string(foreign.join("config.json")).unwrap();
    std::fs::write(foreign.join("config.json"), config.replace("\"llama\"", "\"mamba\"")).unwrap();
    let wordless = directory.checkpoint("wordless");
    std::fs::remove_file(wordless.join("tokenizer.json")).unwrap();
    let scrambled = directory.checkpoint("scrambled");
    std::fs::write(scrambled.join("tokenizer.json"), "{").unwrap();
    let [truncated, foreign, wordless, scrambled] =
        [truncated, foreign, wordless, scrambled].map(|path| path.display().to_string());

    let cases: &[(&[&str], &str)] = &[
        (&["--model", &nowhere], "--model"),
        (&["--model", &prose], "prose.txt"),
        (&["--model", &lying], "lying.gguf"),
        (&["--model", &truncated], "model.safetensors"),
        (&["--model", &foreign], "config.json"),
        (&["--model", &scrambled], "tokenizer.json"),
        (&["--model", &wordless], "--model"),
        (&["--context-len", "16"], "--context-len"),
        (&["--context-len", "-5"], "-5"),
        (&["--context-len", "99999999999999"], "--context-len"),
        (&["--block-len", "0"], "block_len"),
        (&["--block-len", "100", "--anchor-len", "101"], "anchor_len"),
        (&["--ranks", "0"], "--ranks"),
        (&["--ranks", "1000000000"], "--ranks"),
        (&["--needles", "0"], "--needles"),
        (&["--needles", "65"], "--needles"),
        (&["--queries", "0"], "--queries"),
        (&["--generate", "0"], "--generate"),
        (&["--generate", "1000000000000"], "--generate"),
        (&["--mode", "ring"], "--mode"),
        (&["--engine", "sockets"], "--engine"),
        (&["--anchor", "sent"], "--anchor"),
        (&["--generated", "first"], "--generated"),
        (&["--timeout", "x"], "--timeout"),
        (&["--timeout=-1"], "--timeout"),
        (
            &["--engine", "mpi", "--context-ids", &ids, "--query-ids", &ids, "--save-logits", &logits],
            "--save-logits",
        ),
        #[cfg(not(feature = "mpi"))]
        (&["--engine", "mpi"], "MPI"),
        (&["--dtype", "f64"], "--dtype"),
        (&["--seed", "x"], "--seed"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--context-ids", &ids], "--query-ids"),
        (&["--query-ids", &ids], "--context-ids"),
        (&["--save-logits", &logits], "--context-ids"),
        (&["--context", &prose], "--query"),
        (&["--chat"], "--query"),
        (&["--context", &prose, "--query", "sun", "--chat"], "--chat"),
        (&["--context", "-", "--query", "sun", "--engine", "mpi"], "--context"),
        (&["--query", "sun"], "--context"),
        (&["--context", &prose, "--query", ""], "--query"),
        (&["--context", &nowhere, "--query", "sun"], "--context"),
        (&["--context", &binary, "--query", "sun"], "--context"),
        (&["--context", &prose, "--query", "sun", "--seed", "3"], "--seed"),
        (&["--context", &prose, "--query", "sun", "--context-ids", &ids], "--context-ids"),
        (&["--context", &prose, "--query", "sun", "--model", &wordless], "--model"),
        (&["--context-ids", &ids, "--query-ids", &ids, "--needles", "3"], "--needles"),
        (&["--context-ids", &nowhere, "--query-ids", &ids], "--context-ids"),
        (&["--context-ids", &outside, "--query-ids", &ids], "--context-ids"),
        (&["--context-ids", &ids, "--query-ids", &outside], "--query-ids"),
        (&["--context-ids", &ids, "--query-ids", &negative], "--query-ids"),
        (&["--context-ids", &words, "--query-ids", &ids], "--context-ids"),
        (&["--context-ids", &ids, "--query-ids", &empty], "--query-ids"),
        (&["--context-ids", &ids, "--query-ids", &ids, "--save-logits", &nowhere], "--save-logits"),
        (&["--context-ids", &outside, "--query-ids", &ids, "--save-logits", &logits], "--context-ids"),
    ];
    for (args, named) in cases {
        let output = example(args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
        assert!(err.contains(named), "{args:?}: {named} is not in {err}");
        assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
        assert!(!Path::new(&logits).exists(), "{args:?}");
    }
}
