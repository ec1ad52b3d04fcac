//! The tasks in English: RULER's templates (for base models) and bAbI's sentences. Essays and word
//! lists are procedural, where the originals download them.

use super::language::{Language, Sentences};
use super::llama::random::Random;
use super::task::{Haystack, Kind};

/// English.
pub struct English;

/// RULER's noise: one piece of hay.
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
const ADJECTIVES: &str = "abiding brisk careful daring earnest faithful gleaming hidden idle jovial knowing lasting measured noble \
    open patient quiet restless steady thoughtful upright varied wandering young ancient broad curious distant early fragile \
    gentle honest inner joint keen limpid mild narrow ordinary plain ragged sober tender useful vast worn";
const NOUNS: &str = "harbor archive bargain ceiling danger emblem furnace garment habit insect journey kettle ledger marble number \
    orchard parcel quarry record saddle tavern utensil village wagon anchor border circle doctor engine factor guest hollow \
    island jacket kitchen letter mirror notion office painter ribbon season timber uncle valley window";
const SUBJECTS: &[&str] = &[
    "the teacher",
    "a good essay",
    "the old city",
    "every founder",
    "a careful reader",
    "the committee",
    "one of the editors",
    "the whole trade",
    "a young painter",
    "the second draft",
    "nobody in the room",
    "the market",
];
const VERBS: &[&str] = &[
    "rarely explains",
    "slowly improves",
    "often forgets",
    "has to defend",
    "never quite trusts",
    "tends to repeat",
    "learns to prefer",
    "is quick to praise",
    "would rather avoid",
    "cannot easily replace",
    "came to depend on",
    "keeps returning to",
];
const THINGS: &[&str] = &[
    "the first idea",
    "what other people expect",
    "a long habit",
    "the shape of the question",
    "its own mistakes",
    "the work of a summer",
    "an honest answer",
    "the cost of waiting",
    "small and patient steps",
    "the tools at hand",
    "a reputation",
    "the difference between the two",
];
const ENDINGS: &[&str] = &[
    "when there is time",
    "in the long run",
    "because it seems safe",
    "without noticing",
    "as the years go by",
    "for reasons of its own",
    "before the evening is over",
    "even in good years",
    "though few admit it",
    "and is better for it",
    "as letters of that time show",
    "while others look on",
];
const PERSONS: &[&str] = &["John", "Mary", "Daniel", "Sandra", "Fred", "Julie", "Jeff", "Bill"];
const PLACES: &[&str] = &["hallway", "bathroom", "kitchen", "garden", "office", "bedroom", "park", "cinema"];
const OBJECTS: &[&str] = &["football", "apple", "milk", "book", "lamp"];
/// Letters of a coded word, and digits of a number.
const CODED: usize = 6;
const DIGITS: usize = 7;

fn words(list: &str) -> Vec<&str> {
    list.split_whitespace().collect()
}

/// The singular or plural of what is looked for.
fn kind_name(kind: Kind, count: usize) -> &'static str {
    match (kind, count) {
        (Kind::Word, 1) => "word",
        (Kind::Word, _) => "words",
        (Kind::Number, 1) => "number",
        (Kind::Number, _) => "numbers",
        (Kind::Uuid, 1) => "uuid",
        (Kind::Uuid, _) => "uuids",
    }
}

/// `a`, `a and b`, `a, b, and c`.
fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [first, second] => format!("{first} and {second}"),
        [rest @ .., last] => format!("{}, and {last}", rest.join(", ")),
    }
}

impl English {
    /// Two nouns as one word: thousands of different ones.
    fn compounds() -> Vec<String> {
        let nouns = words(NOUNS);
        let pairs = nouns.iter().flat_map(|first| nouns.iter().map(move |second| (first, second)));
        pairs
            .filter(|(first, second)| first != second)
            .map(|(first, second)| format!("{first}{second}"))
            .collect()
    }
}

impl Language for English {
    fn end(&self) -> &'static str {
        "."
    }

    fn separator(&self, haystack: Haystack) -> &'static str {
        match haystack {
            Haystack::Noise | Haystack::Needles => "\n",
            Haystack::Essay | Haystack::Words => " ",
        }
    }

    fn noise(&self, _: Random) -> Sentences {
        Box::new(|| NOISE.into())
    }

    fn essay(&self, mut random: Random) -> Sentences {
        Box::new(move || {
            let parts = [SUBJECTS, VERBS, THINGS, ENDINGS].map(|list| *random.choose(list));
            let sentence = parts.join(" ");
            sentence[..1].to_uppercase() + &sentence[1..] + "."
        })
    }

    fn item(&self, kind: Kind, random: &mut Random) -> String {
        match kind {
            Kind::Word => {
                format!("{}-{}", random.choose(&words(ADJECTIVES)), random.choose(&words(NOUNS)))
            }
            Kind::Number => {
                let lowest = 10usize.pow(DIGITS as u32 - 1);
                random.between(lowest..10 * lowest).to_string()
            }
            Kind::Uuid => {
                let [high, low] = [random.next(), random.next()];
                // Version 4, variant 1, as random ones have it.
                let third = 0x4000 | high & 0xfff;
                let fourth = 0x8000 | low >> 48 & 0x3fff;
                let last = low & 0xffff_ffff_ffff;
                format!("{:08x}-{:04x}-{third:04x}-{fourth:04x}-{last:012x}", high >> 32, high >> 16 & 0xffff)
            }
        }
    }

    fn needles_are_hidden(&self, kind: Kind, count: usize) -> String {
        let (some, are) = if count == 1 { ("A", "is") } else { ("Some", "are") };
        let name = kind_name(kind, count);
        format!(
            "{some} special magic {name} {are} hidden within the following text. Make sure to memorize it. I will quiz you about the \
             {name} afterwards."
        )
    }

    fn needle(&self, kind: Kind, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", kind_name(kind, 2))
    }

    fn ask_needles(&self, kind: Kind, keys: &[String], values: usize) -> String {
        let count = keys.len() * values;
        let (question, are) = if count == 1 { ("What is", "is") } else { ("What are all", "are") };
        let (name, keys) = (kind_name(kind, count), listed(keys));
        format!(
            "\n{question} the special magic {name} for {keys} mentioned in the provided text? The special magic {name} for {keys} \
             mentioned in the provided text {are}"
        )
    }

    fn needles_answer(&self, found: &[(String, Vec<String>)]) -> String {
        let values: Vec<String> = found.iter().flat_map(|(_, values)| values.clone()).collect();
        format!(" {}", listed(&values))
    }

    fn variables_are_assigned(&self) -> String {
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n".into()
    }

    fn variables(&self, count: usize, random: &mut Random) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        while names.len() < count {
            let name: String = (0..5).map(|_| char::from(b'A' + random.between(0..26) as u8)).collect();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    fn assign_value(&self, variable: &str, value: &str) -> String {
        format!("VAR {variable} = {value}")
    }

    fn assign_variable(&self, variable: &str, from: &str) -> String {
        format!("VAR {variable} = VAR {from}")
    }

    fn ask_variables(&self, value: &str, count: usize) -> String {
        format!(
            "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of \
             variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
        )
    }

    fn words_are_listed(&self) -> String {
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most \
         often.\n"
            .into()
    }

    fn most_words(&self) -> usize {
        let nouns = words(NOUNS).len();
        nouns * (nouns - 1)
    }

    fn words(&self, count: usize, random: &mut Random) -> Vec<String> {
        random.sample(count, &Self::compounds())
    }

    fn listed(&self, place: usize, word: &str) -> String {
        format!("{place}. {word}")
    }

    fn ask_common(&self, count: usize) -> String {
        format!(
            "\nQuestion: What are the {count} most common words in the above list? Answer: The top {count} words that appear most often \
             in the list are:"
        )
    }

    fn text_is_coded(&self) -> String {
        format!(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded \
             words. Please ignore the dots '{}'.\n",
            self.dots()
        )
    }

    fn coded_words(&self, count: usize, random: &mut Random) -> Vec<String> {
        let mut coded = std::collections::BTreeSet::new();
        while coded.len() < count {
            coded.insert(
                (0..CODED).map(|_| char::from(b'a' + random.between(0..26) as u8)).collect::<String>(),
            );
        }
        let coded: Vec<String> = coded.into_iter().collect();
        random.sample(count, &coded)
    }

    fn dots(&self) -> &'static str {
        "...."
    }

    fn ask_frequent(&self) -> String {
        format!(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '{}'. What are the three most frequently appeared words \
             in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:",
            self.dots()
        )
    }

    fn story_begins(&self) -> String {
        "Somewhere in the following text it is told where persons and objects are. The latest of what is told holds.\n".into()
    }

    fn cast(&self) -> [&'static [&'static str]; 3] {
        [PERSONS, PLACES, OBJECTS]
    }

    fn went(&self, person: &str, place: &str, random: &mut Random) -> String {
        let verb = random.choose(&["went", "moved", "journeyed", "travelled"]);
        format!("{person} {verb} to the {place}.")
    }

    fn got(&self, person: &str, object: &str, random: &mut Random) -> String {
        let verb = random.choose(&["got", "took", "grabbed", "picked up"]);
        format!("{person} {verb} the {object} there.")
    }

    fn left(&self, person: &str, object: &str, random: &mut Random) -> String {
        let verb = random.choose(&["left", "dropped", "put down", "discarded"]);
        format!("{person} {verb} the {object}.")
    }

    fn ask_person(&self, person: &str) -> String {
        format!("\nQuestion: Where is {person}? Answer: {person} is in the")
    }

    fn ask_object(&self, object: &str) -> String {
        format!("\nQuestion: Where is the {object}? Answer: The {object} is in the")
    }

    fn ask_before(&self, object: &str, place: &str) -> String {
        format!(
            "\nQuestion: Where was the {object} before the {place}? Answer: Before the {place}, the {object} was in the"
        )
    }

    fn place_answer(&self, _: Option<&str>, place: &str) -> String {
        format!(" {place}")
    }
}
