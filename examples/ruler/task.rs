//! The tasks: those of RULER (Hsieh et al., arXiv 2404.06654) that can be made without downloads,
//! and bAbI's first three (Weston et al., arXiv 1502.05698) in a long text.

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Task {
    /// One needle in noise that repeats itself
    #[value(name = "niah_single_1")]
    NiahSingle1,
    /// One needle in an essay
    #[value(name = "niah_single_2")]
    NiahSingle2,
    /// One needle with a long value in an essay
    #[value(name = "niah_single_3")]
    NiahSingle3,
    /// One needle of four in an essay
    #[value(name = "niah_multikey_1")]
    NiahMultikey1,
    /// One needle among needles
    #[value(name = "niah_multikey_2")]
    NiahMultikey2,
    /// One needle among needles, with long keys and values
    #[value(name = "niah_multikey_3")]
    NiahMultikey3,
    /// Four values of one key in an essay
    NiahMultivalue,
    /// Four keys of four in an essay
    NiahMultiquery,
    /// A chain of assignments of two hops in noise
    #[value(name = "vt_2")]
    Vt2,
    /// A chain of assignments of three hops in noise
    #[value(name = "vt_3")]
    Vt3,
    /// A chain of assignments of four hops in noise
    #[value(name = "vt_4")]
    Vt4,
    /// The ten most common words of a list
    Cwe,
    /// The three most frequent words of a coded text
    Fwe,
    /// Where a person is: one fact
    Qa1,
    /// Where an object is: two facts
    Qa2,
    /// Where an object was before: three facts
    Qa3,
}

/// What the facts are hidden in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haystack {
    /// A few sentences, repeated.
    Noise,
    /// Sentences that differ.
    Essay,
    /// Other needles.
    Needles,
    /// Nothing: the context is all facts.
    Words,
}

/// Kinds of keys and values of needles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An adjective and a noun.
    Word,
    /// Of seven digits.
    Number,
    /// Longer, and unique.
    Uuid,
}

/// A needle task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Niah {
    pub haystack: Haystack,
    pub key: Kind,
    pub value: Kind,
    /// Keys hidden.
    pub keys: usize,
    /// Values of each.
    pub values: usize,
    /// Keys asked for.
    pub asked: usize,
}

impl Task {
    /// All of them, as they are reported.
    pub const ALL: [Self; 16] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt2,
        Self::Vt3,
        Self::Vt4,
        Self::Cwe,
        Self::Fwe,
        Self::Qa1,
        Self::Qa2,
        Self::Qa3,
    ];

    /// The name that options, files and tables have.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt2 => "vt_2",
            Self::Vt3 => "vt_3",
            Self::Vt4 => "vt_4",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
            Self::Qa1 => "qa1",
            Self::Qa2 => "qa2",
            Self::Qa3 => "qa3",
        }
    }

    /// The needle task, if it is one, with RULER's numbers.
    pub fn niah(self) -> Option<Niah> {
        let single = Niah {
            haystack: Haystack::Essay,
            key: Kind::Word,
            value: Kind::Number,
            keys: 1,
            values: 1,
            asked: 1,
        };
        match self {
            Self::NiahSingle1 => Some(Niah { haystack: Haystack::Noise, ..single }),
            Self::NiahSingle2 => Some(single),
            Self::NiahSingle3 => Some(Niah { value: Kind::Uuid, ..single }),
            Self::NiahMultikey1 => Some(Niah { keys: 4, ..single }),
            Self::NiahMultikey2 => Some(Niah { haystack: Haystack::Needles, ..single }),
            Self::NiahMultikey3 => {
                Some(Niah { haystack: Haystack::Needles, key: Kind::Uuid, value: Kind::Uuid, ..single })
            }
            Self::NiahMultivalue => Some(Niah { values: 4, ..single }),
            Self::NiahMultiquery => Some(Niah { keys: 4, asked: 4, ..single }),
            _ => None,
        }
    }

    /// Tokens to generate at most, in English: RULER's numbers, and BABILong's.
    pub fn answer_len(self) -> usize {
        match self {
            Self::Vt2 | Self::Vt3 | Self::Vt4 => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            Self::Qa1 | Self::Qa2 | Self::Qa3 => 32,
            _ => 128,
        }
    }
}
