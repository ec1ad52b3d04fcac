//! Samples of all tasks and lengths under all settings, one after another.

use super::english::English;
use super::fit::Fit;
use super::language::Language;
use super::llama::checkpoint::Checkpoint;
use super::llama::error::{Error, Result};
use super::llama::model::Llama;
use super::llama::random::Random;
use super::llama::run::{Job, run};
use super::llama::tokenizer::Tokenizer;
use super::record::{Key, Log, Record};
use super::sample::Sample;
use super::samples::small_answer_len;
use super::setting::Setting;
use super::small::Small;
use super::task::Task;
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

/// A checkpoint, and the language it is asked in.
pub struct Subject {
    pub model: Llama,
    pub tokenizer: Tokenizer,
    pub language: Box<dyn Language>,
    /// Ids that end an answer.
    pub stop: Vec<u32>,
    fingerprint: String,
    small: bool,
}

/// What is run.
pub struct Suite<'a> {
    pub tasks: &'a [Task],
    /// Tokens of context, query and answer.
    pub lens: &'a [usize],
    pub settings: &'a [Setting],
    /// Samples of each task and length; those of seeds `seed..seed + samples`.
    pub samples: usize,
    pub seed: u64,
}

impl Subject {
    /// Loads a checkpoint with its tokenizer. One that knows the small model's words
    /// is asked in them, any other in English.
    ///
    /// # Errors
    /// Those of the checkpoint's files.
    pub fn load(path: &Path, dtype: DType) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let model = Llama::of(&checkpoint, Some(dtype))?;
        let tokenizer = checkpoint.tokenizer()?;
        let tokenizer = tokenizer.ok_or_else(|| Error::input("--model", "it has no tokenizer"))?;
        let small =
            Small::vocabulary().iter().zip(0..).all(|(word, id)| tokenizer.word(id).as_ref() == Some(word));
        let fingerprint = format!("{:016x}", model.fingerprint()?);
        let language: Box<dyn Language> = if small { Box::new(Small) } else { Box::new(English) };
        Ok(Self { stop: checkpoint.eos_ids()?, model, tokenizer, language, fingerprint, small })
    }

    /// A token that says nothing, for an anchor of it alone: the first of a piece of hay.
    ///
    /// # Errors
    /// [`Error::Input`] for a tokenizer that has no tokens for it.
    pub fn constant(&self) -> Result<u32> {
        let hay = self.language.essay(Random(0))();
        let ids = self.tokenizer.query(&hay)?;
        ids.first()
            .copied()
            .ok_or_else(|| Error::input("--model", format!("its tokenizer has no token for {hay:?}")))
    }

    /// The first id of a word where markers come before all words, as in the small model's
    /// vocabulary.
    pub fn first_word(&self) -> Option<u32> {
        self.small.then(Small::first_word)
    }

    /// Tokens that an answer may have.
    pub fn answer_len(&self, task: Task) -> usize {
        if self.small { small_answer_len(task) } else { task.answer_len() }
    }

    /// The sample of a task and seed that fills `len` tokens.
    ///
    /// # Errors
    /// [`Error::Input`] if the task does not fit.
    pub fn sample(&self, task: Task, len: usize, seed: u64) -> Result<Sample> {
        // The special tokens before the context take room as well.
        let room = len.saturating_sub(self.tokenizer.context("")?.len());
        let fit = Fit { task, len: room, answer_len: self.answer_len(task), questions: 1, seed };
        let tokens = |text: &str| self.tokenizer.query(text).map_or(usize::MAX / 4, |ids| ids.len());
        fit.sample(self.language.as_ref(), &tokens)
            .ok_or_else(|| Error::input("--len", format!("{} has no sample of {len} tokens", task.name())))
    }
}

impl Suite<'_> {
    /// Runs what `log` does not hold yet, settings in turn for each sample.
    ///
    /// # Errors
    /// Those of the model, the layouts, and the file.
    pub fn run(&self, subject: &Subject, log: &mut Log) -> Result<()> {
        for (&len, setting) in
            self.lens.iter().flat_map(|len| self.settings.iter().map(move |setting| (len, setting)))
        {
            setting.check(len)?;
        }
        // Long ones take longer: the bar counts tokens.
        let left = self.keys(subject).filter(|key| !log.has(key)).map(|key| key.len as u64).sum();
        let style =
            ProgressStyle::with_template("{msg:32} [{elapsed_precise}] {wide_bar} {percent}% eta {eta}");
        let bar = ProgressBar::new(left).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        for key in self
            .keys(subject)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| (a.len, a.task, a.seed) == (b.len, b.task, b.seed))
        {
            if key.iter().all(|key| log.has(key)) {
                continue;
            }
            let Key { len, task, seed, .. } = key[0];
            bar.set_message(format!("{} {len}", task.name()));
            let sample = subject.sample(task, len, seed)?;
            for (key, setting) in
                key.iter().zip(self.settings).filter(|(key, _)| !log.has(key)).collect::<Vec<_>>()
            {
                log.add(record(subject, setting, &sample, key.clone())?)?;
                bar.inc(len as u64);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// What the suite asks for of what `log` holds.
    pub fn records(&self, subject: &Subject, log: &Log) -> Vec<Record> {
        let asked: HashSet<Key> = self.keys(subject).collect();
        log.records.iter().filter(|record| asked.contains(&record.key)).cloned().collect()
    }

    /// All that is to be run, the settings of a sample one after another.
    fn keys<'s>(&'s self, subject: &'s Subject) -> impl Iterator<Item = Key> + 's {
        let seeds = (0..self.samples as u64).map(|index| self.seed.wrapping_add(index));
        self.lens.iter().flat_map(move |&len| {
            seeds.clone().flat_map(move |seed| {
                self.tasks.iter().flat_map(move |&task| {
                    self.settings.iter().map(move |setting| Key {
                        model: subject.fingerprint.clone(),
                        setting: setting.to_string(),
                        len,
                        task,
                        seed,
                    })
                })
            })
        })
    }
}

fn record(subject: &Subject, setting: &Setting, sample: &Sample, key: Key) -> Result<Record> {
    let question = &sample.questions[0];
    let context = subject.tokenizer.context(&sample.text())?;
    let query = subject.tokenizer.query(&question.query)?;
    let mode = setting.mode(key.len, context.len())?;
    let job = Job {
        context: &context,
        queries: &[query],
        generate: subject.answer_len(key.task),
        stop: &subject.stop,
        all_logits: false,
    };
    let run = run(&subject.model, None, mode, &job, &ProgressBar::hidden())?;
    let answer = subject.tokenizer.text(&run.answers[0].tokens, true)?;
    Ok(Record {
        key,
        context_len: context.len(),
        score: question.score(&answer),
        encode: run.encode_time.as_secs_f64(),
        query: run.query_time.as_secs_f64(),
        answer,
    })
}
