//! Runs of the suite: on random weights, that they go on after an interruption; on the trained
//! ones, how many answers are right.

use super::byte_level;
use super::checkpoint::{Directory, config_with, tensors, write};
use super::llama::anchor::AnchorBlock;
use super::llama::error::Error;
use super::mass;
use super::record::{Log, Record};
use super::setting::{Extent, Setting, Star};
use super::small::Small;
use super::suite::{Subject, Suite};
use super::task::Task;
use candle_core::DType;
use serde_json::json;
use star_attention::StarLayout;
use std::path::{Path, PathBuf};

/// The small model's words in a `tokenizer.json`.
fn tokenizer() -> serde_json::Value {
    let vocab: serde_json::Map<_, _> =
        Small::vocabulary().into_iter().zip(0..).map(|(word, id)| (word, json!(id))).collect();
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" }
    })
}

/// Random weights over the small model's words.
fn random_checkpoint() -> Directory {
    let config = config_with(json!({ "vocab_size": Small::vocabulary().len(), "eos_token_id": 1 }));
    let directory = write(&config, &tensors(&config, DType::F32));
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    directory
}

fn star(anchor: Extent) -> Setting {
    Setting::Star(Star { block: Extent::Part(4), anchor, ranks: 4, anchor_block: AnchorBlock::First })
}

fn log(directory: &Directory) -> PathBuf {
    directory.path().join("records/run.jsonl")
}

/// All but the times.
fn results(records: &[Record]) -> Vec<(String, String, u64, usize, String)> {
    let mut results: Vec<_> = records
        .iter()
        .map(|record| {
            let key = &record.key;
            let score = format!("{} {:.6}", record.answer, record.score);
            (key.setting.clone(), key.task.name().to_owned(), key.seed, record.context_len, score)
        })
        .collect();
    results.sort();
    results
}

#[test]
fn an_interrupted_run_goes_on() {
    let checkpoint = random_checkpoint();
    let subject = Subject::load(checkpoint.path(), DType::F32).unwrap();
    let settings = [Setting::Dense, star(Extent::Part(1))];
    let tasks = [Task::NiahMultikey1, Task::Vt2, Task::Qa2];
    let suite = Suite { tasks: &tasks, lens: &[96, 128], settings: &settings, samples: 2, seed: 5 };
    let whole = Directory::new();
    let mut all = Log::open(&log(&whole)).unwrap();
    suite.run(&subject, &mut all).unwrap();
    assert_eq!(all.records.len(), 2 * 3 * 2 * 2);

    // The file as an interruption leaves it: whole lines, and a part of one.
    let text = std::fs::read_to_string(log(&whole)).unwrap();
    let cut = Directory::new();
    for lines in [0, 1, 5, 11] {
        let kept: usize = text.split_inclusive('\n').take(lines).map(str::len).sum();
        std::fs::create_dir_all(log(&cut).parent().unwrap()).unwrap();
        std::fs::write(log(&cut), &text[..kept + 30]).unwrap();
        let mut resumed = Log::open(&log(&cut)).unwrap();
        let before = resumed.records.clone();
        assert_eq!(before[..], all.records[..lines]);
        suite.run(&subject, &mut resumed).unwrap();
        // What was there was not run again: its times are the same.
        assert_eq!(resumed.records[..lines], before[..]);
        assert_eq!(results(&resumed.records), results(&all.records));
        assert_eq!(Log::open(&log(&cut)).unwrap().records, resumed.records);
    }

    // Nothing is left, and more samples are added to what is there.
    let before = std::fs::read_to_string(log(&cut)).unwrap();
    suite.run(&subject, &mut Log::open(&log(&cut)).unwrap()).unwrap();
    assert_eq!(std::fs::read_to_string(log(&cut)).unwrap(), before);
    let more = Suite { samples: 3, ..suite };
    let mut grown = Log::open(&log(&cut)).unwrap();
    more.run(&subject, &mut grown).unwrap();
    assert_eq!(more.records(&subject, &grown).len(), 36);
    assert_eq!(suite.records(&subject, &grown).len(), 24);
}

/// A checkpoint with another tokenizer is asked in English.
#[test]
fn any_checkpoint_is_asked_in_english() {
    let vocab_size = byte_level::EOS as usize + 1;
    let config = config_with(json!({
        "vocab_size": vocab_size, "bos_token_id": byte_level::BOS, "eos_token_id": byte_level::EOS
    }));
    let checkpoint = write(&config, &tensors(&config, DType::F32));
    std::fs::write(checkpoint.path().join("tokenizer.json"), byte_level::tokenizer().to_string()).unwrap();
    let subject = Subject::load(checkpoint.path(), DType::F32).unwrap();
    assert_eq!(subject.stop, [byte_level::EOS]);
    assert_eq!(subject.answer_len(Task::NiahMultiquery), 128);
    let settings = [Setting::Dense, star(Extent::Part(1))];
    let suite = Suite {
        tasks: &[Task::NiahMultiquery, Task::Fwe],
        lens: &[4096],
        settings: &settings,
        samples: 1,
        seed: 1,
    };
    let mut log = Log::open(&log(&checkpoint)).unwrap();
    suite.run(&subject, &mut log).unwrap();
    assert_eq!(log.records.len(), 4);
    for record in &log.records {
        let sample = subject.sample(record.key.task, 4096, 1).unwrap();
        let context = subject.tokenizer.context(&sample.text()).unwrap();
        assert_eq!((context[0], context.len()), (byte_level::BOS, record.context_len));
        let query = subject.tokenizer.query(&sample.questions[0].query).unwrap();
        // Nearly all of the length is used, and room is left for the answer.
        let used = context.len() + query.len() + subject.answer_len(record.key.task);
        assert!((3700..=4096).contains(&used), "{used}");
    }
}

#[test]
fn another_model_s_records_do_not_count() {
    let (one, other) = (random_checkpoint(), Directory::new());
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(one.path().join(file), other.path().join(file)).unwrap();
    }
    let mut weights =
        candle_core::safetensors::load(one.path().join("model.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    let norm = weights["model.norm.weight"].affine(2.0, 0.0).unwrap();
    weights.insert("model.norm.weight".into(), norm);
    candle_core::safetensors::save(&weights, other.path().join("model.safetensors")).unwrap();
    let suite = Suite { tasks: &[Task::Qa1], lens: &[64], settings: &[Setting::Dense], samples: 1, seed: 0 };
    let mut log = Log::open(&log(&one)).unwrap();
    for directory in [&one, &other] {
        suite.run(&Subject::load(directory.path(), DType::F32).unwrap(), &mut log).unwrap();
    }
    assert_eq!(log.records.len(), 2);
}

#[test]
fn bad_input_is_refused() {
    let checkpoint = random_checkpoint();
    let subject = Subject::load(checkpoint.path(), DType::F32).unwrap();
    let run = |lens: &[usize], setting: Setting| {
        let suite = Suite { tasks: &[Task::Cwe], lens, settings: &[setting], samples: 1, seed: 0 };
        suite.run(&subject, &mut Log::open(&log(&checkpoint)).unwrap()).expect_err("an error").to_string()
    };
    assert!(run(&[64], Setting::Dense).contains("cwe has no sample of 64 tokens"));
    let star =
        |block, anchor, ranks| Setting::Star(Star { block, anchor, ranks, anchor_block: AnchorBlock::First });
    assert!(run(&[256], star(Extent::Tokens(0), Extent::Part(1), 2)).starts_with("--block"));
    assert!(run(&[256], star(Extent::Tokens(8), Extent::Tokens(9), 2)).starts_with("--anchor"));
    assert!(run(&[256], star(Extent::Tokens(8), Extent::Tokens(8), 0)).starts_with("--ranks"));
    let file = checkpoint.path().join("bad.jsonl");
    for text in ["{}\n", "not json\n", "\u{0}\n"] {
        std::fs::write(&file, text).unwrap();
        let error = Log::open(&file).err().expect("an error");
        assert!(matches!(&error, Error::Input { argument, .. } if argument == "--out"), "{error}");
        assert!(error.to_string().contains("line 1"));
    }
    assert!(
        "/0".parse::<Extent>().is_err() && "x".parse::<Extent>().is_err() && "".parse::<Extent>().is_err()
    );
    assert_eq!(("/4".parse(), "7".parse()), (Ok(Extent::Part(4)), Ok(Extent::Tokens(7))));
    assert!(Subject::load(Path::new("/nowhere"), DType::F32).is_err());
}

/// Masses are shares: those of all keys of a block and its anchor are one.
#[test]
fn masses_of_all_keys_are_one() {
    let checkpoint = random_checkpoint();
    let subject = Subject::load(checkpoint.path(), DType::F32).unwrap();
    let context: Vec<u32> = (0..64).map(|index| index * 5 % 300).collect();
    // Blocks of 16 behind 15 tokens: only the last row of a block sees all of them, and itself
    // beside.
    let layout = StarLayout::builder(64).block_len(16).anchor_len(15).ranks(4).build().unwrap();
    for mass in mass::masses(&subject.model, &layout, &context, 15).unwrap() {
        assert!(mass.anchor > 0.0 && mass.block > 0.0 && mass.anchor + mass.block < 1.0, "{mass:?}");
    }
    let without = StarLayout::builder(64).block_len(16).anchor_len(0).ranks(4).build().unwrap();
    for mass in mass::masses(&subject.model, &without, &context, 4).unwrap() {
        assert!(mass.anchor == 0.0 && mass.block > 0.0 && mass.block < 1.0, "{mass:?}");
    }
}

/// The trained checkpoint, on tasks that it knows well: every answer is right, dense and with star.
#[test]
fn the_small_llama_finds_its_needles() {
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/ruler-llama");
    let subject = Subject::load(&checkpoint, DType::F32).unwrap();
    let directory = Directory::new();
    let suite = Suite {
        tasks: &[Task::NiahSingle1, Task::NiahSingle2, Task::NiahMultikey2],
        lens: &[512],
        settings: &[Setting::Dense, star(Extent::Part(1))],
        samples: 6,
        seed: 1_000_000,
    };
    let mut log = Log::open(&log(&directory)).unwrap();
    suite.run(&subject, &mut log).unwrap();
    assert_eq!(log.records.len(), 3 * 6 * 2);
    for record in &log.records {
        assert_eq!(record.score, 1.0, "{record:?}");
    }
}
