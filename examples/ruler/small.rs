//! The small model's language: some 300 words, each a token; a statement is a marker and its
//! arguments.
//!
//! | statement | means |
//! |---|---|
//! | `<needle> KEY VALUE` | a needle; a word key is two words, a number two, a long key or value three numbers |
//! | `<query> KEY` | asks for its value |
//! | `<all> KEY <answer>` | asks for all of its values: `KEY VALUE KEY VALUE ...` |
//! | `<queries> KEY KEY ... <answer>` | asks for the values of all: `KEY VALUE KEY VALUE ...` |
//! | `<put> VALUE NOUN`, `<put> NOUN NOUN` | assigns the first to the second |
//! | `<trace> VALUE` | asks for the variables that have it |
//! | `<common>`, `<frequent>` | asks for the words that stand most often before it |
//! | `<went> PERSON PLACE`, `<got> OBJECT PERSON`, `<left> OBJECT PERSON` | what happens |
//! | `<where> PERSON` | asks for a place |
//! | `<where> OBJECT`, `<before> OBJECT PLACE` | asks for a person, who took it last or brought it to the place, and a place |

use super::language::{Language, Sentences};
use super::llama::random::Random;
use super::task::{Haystack, Kind};

/// The words of [`Small`].
pub struct Small;

/// Markers, in the order of their ids, from 0.
const MARKERS: &[&str] = &[
    "<bos>",
    "<eos>",
    "<unk>",
    "<needle>",
    "<query>",
    "<all>",
    "<queries>",
    "<answer>",
    "<put>",
    "<trace>",
    "<common>",
    "<frequent>",
    "<dots>",
    "<went>",
    "<got>",
    "<left>",
    "<where>",
    "<before>",
];
/// Words of hay, of lists and of coded texts.
const WORDS: &str = "grass sky sun rain wind stone river cloud field tree leaf root seed bird fish wolf bear deer mouse \
    horse bread milk salt sugar honey apple pear plum grape lemon table chair lamp clock door curtain \
    wall roof floor stair paper pencil brush paint cloth thread button pocket";
/// First words of keys.
const ADJECTIVES: &str = "ample bitter calm dizzy eager fancy gentle happy icy jolly keen lively mellow noble odd proud quiet rapid \
    silent tidy urgent vivid warm young zesty agile brave clever daring elegant fierce grand humble immense jealous kind \
    loyal modest nimble obese plain quaint robust shy tough upset vague wise yellow bright crisp dusty empty fresh \
    giant hollow ideal joyful lazy merry narrow open polite steady";
/// Second words of keys, and variables.
const NOUNS: &str = "paris london berlin madrid rome vienna lisbon dublin oslo athens cairo lagos nairobi tunis dakar lima quito \
    bogota caracas havana boston denver dallas seattle chicago austin toronto ottawa sydney perth delhi mumbai karachi \
    dhaka tokyo osaka seoul beijing shanghai hanoi manila jakarta bangkok lahore tehran baghdad ankara kiev minsk warsaw \
    prague zagreb sofia bucharest munich hamburg lyon milan naples turin geneva zurich basel bern";
const PERSONS: &[&str] = &["john", "mary", "daniel", "sandra", "fred", "julie", "jeff", "emily"];
const PLACES: &[&str] = &[
    "hallway", "bathroom", "kitchen", "garden", "office", "bedroom", "cellar", "attic", "garage", "library",
    "balcony", "workshop",
];
const OBJECTS: &[&str] =
    &["football", "carton", "ticket", "lantern", "suitcase", "umbrella", "compass", "notebook"];
/// Numbers are of these.
const DIGITS: std::ops::Range<usize> = 10..90;
/// Words of the noise, which is one sentence over and over.
const NOISE: std::ops::Range<usize> = 4..17;
/// Sentences that an essay is made of, and words of each.
const ESSAY: usize = 24;
const SENTENCE: std::ops::Range<usize> = 4..10;

impl Small {
    /// All words, in the order of their ids.
    pub fn vocabulary() -> Vec<String> {
        let numbers = DIGITS.map(|number| number.to_string());
        let lists = [WORDS, ADJECTIVES, NOUNS].map(str::split_whitespace);
        let names = [PERSONS, PLACES, OBJECTS].concat();
        let words = MARKERS.iter().copied().chain(lists.into_iter().flatten()).chain(names);
        words.map(str::to_owned).chain(numbers).collect()
    }

    /// The id behind those of the markers.
    pub fn first_word() -> u32 {
        MARKERS.len() as u32
    }

    fn sentence(random: &mut Random, len: usize) -> String {
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        (0..len).map(|_| *random.choose(&words)).collect::<Vec<_>>().join(" ")
    }
}

/// Words of a list that is separated by white space.
fn sample(list: &str, count: usize, random: &mut Random) -> Vec<String> {
    let words: Vec<&str> = list.split_whitespace().collect();
    random.sample(count, &words).into_iter().map(str::to_owned).collect()
}

impl Language for Small {
    fn end(&self) -> &'static str {
        MARKERS[1]
    }

    fn separator(&self, _: Haystack) -> &'static str {
        " "
    }

    fn noise(&self, mut random: Random) -> Sentences {
        let len = random.between(NOISE);
        let sentence = Self::sentence(&mut random, len);
        Box::new(move || sentence.clone())
    }

    fn essay(&self, mut random: Random) -> Sentences {
        let mut draw = || {
            let len = random.between(SENTENCE);
            Self::sentence(&mut random, len)
        };
        let sentences: Vec<String> = (0..ESSAY).map(|_| draw()).collect();
        Box::new(move || random.choose(&sentences).clone())
    }

    fn item(&self, kind: Kind, random: &mut Random) -> String {
        let mut numbers = |count: usize| {
            (0..count).map(|_| random.between(DIGITS).to_string()).collect::<Vec<_>>().join(" ")
        };
        match kind {
            Kind::Word => {
                let [adjective, noun] = [ADJECTIVES, NOUNS].map(|list| sample(list, 1, random).remove(0));
                format!("{adjective} {noun}")
            }
            Kind::Number => numbers(2),
            Kind::Uuid => numbers(3),
        }
    }

    fn needles_are_hidden(&self, _: Kind, _: usize) -> String {
        MARKERS[0].into()
    }

    fn needle(&self, _: Kind, key: &str, value: &str) -> String {
        format!("<needle> {key} {value}")
    }

    fn ask_needles(&self, _: Kind, keys: &[String], values: usize) -> String {
        match (keys, values) {
            ([key], 1) => format!("<query> {key}"),
            ([key], _) => format!("<all> {key} <answer>"),
            (keys, _) => format!("<queries> {} <answer>", keys.join(" ")),
        }
    }

    fn needles_answer(&self, found: &[(String, Vec<String>)]) -> String {
        if let [(_, values)] = found
            && let [value] = &values[..]
        {
            return value.clone();
        }
        let pairs = found.iter().flat_map(|(key, values)| values.iter().map(move |value| (key, value)));
        pairs.map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>().join(" ")
    }

    fn variables_are_assigned(&self) -> String {
        MARKERS[0].into()
    }

    fn variables(&self, count: usize, random: &mut Random) -> Vec<String> {
        sample(NOUNS, count, random)
    }

    fn assign_value(&self, variable: &str, value: &str) -> String {
        format!("<put> {value} {variable}")
    }

    fn assign_variable(&self, variable: &str, from: &str) -> String {
        format!("<put> {from} {variable}")
    }

    fn ask_variables(&self, value: &str, _: usize) -> String {
        format!("<trace> {value}")
    }

    fn words_are_listed(&self) -> String {
        MARKERS[0].into()
    }

    fn most_words(&self) -> usize {
        WORDS.split_whitespace().count()
    }

    fn words(&self, count: usize, random: &mut Random) -> Vec<String> {
        sample(WORDS, count, random)
    }

    fn listed(&self, _: usize, word: &str) -> String {
        word.to_owned()
    }

    fn ask_common(&self, _: usize) -> String {
        "<common>".into()
    }

    fn text_is_coded(&self) -> String {
        MARKERS[0].into()
    }

    fn coded_words(&self, count: usize, random: &mut Random) -> Vec<String> {
        sample(WORDS, count, random)
    }

    fn dots(&self) -> &'static str {
        "<dots>"
    }

    fn ask_frequent(&self) -> String {
        "<frequent>".into()
    }

    fn story_begins(&self) -> String {
        MARKERS[0].into()
    }

    fn cast(&self) -> [&'static [&'static str]; 3] {
        [PERSONS, PLACES, OBJECTS]
    }

    fn went(&self, person: &str, place: &str, _: &mut Random) -> String {
        format!("<went> {person} {place}")
    }

    fn got(&self, person: &str, object: &str, _: &mut Random) -> String {
        format!("<got> {object} {person}")
    }

    fn left(&self, person: &str, object: &str, _: &mut Random) -> String {
        format!("<left> {object} {person}")
    }

    fn ask_person(&self, person: &str) -> String {
        format!("<where> {person}")
    }

    fn ask_object(&self, object: &str) -> String {
        format!("<where> {object}")
    }

    fn ask_before(&self, object: &str, place: &str) -> String {
        format!("<before> {object} {place}")
    }

    fn place_answer(&self, person: Option<&str>, place: &str) -> String {
        person.into_iter().chain([place]).collect::<Vec<_>>().join(" ")
    }
}
