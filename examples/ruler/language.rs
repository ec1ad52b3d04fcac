//! How tasks are put into words: in English, as RULER and bAbI have them, or in the few words of
//! the small model.

use super::llama::random::Random;
use super::task::{Haystack, Kind};

/// Sentences without an end.
pub type Sentences = Box<dyn FnMut() -> String>;

/// Words and templates of all tasks.
pub trait Language {
    /// What ends an answer.
    fn end(&self) -> &'static str;
    /// What stands between two pieces of a context.
    fn separator(&self, haystack: Haystack) -> &'static str;

    /// The sentences of a haystack that repeats itself, over and over.
    fn noise(&self, random: Random) -> Sentences;
    /// Sentences of a procedural essay.
    fn essay(&self, random: Random) -> Sentences;

    /// A key or value of needles.
    fn item(&self, kind: Kind, random: &mut Random) -> String;
    /// What opens a context in which needles of `kind` are hidden.
    fn needles_are_hidden(&self, kind: Kind, count: usize) -> String;
    /// A needle.
    fn needle(&self, kind: Kind, key: &str, value: &str) -> String;
    /// Asks for all `values` values of all `keys`.
    fn ask_needles(&self, kind: Kind, keys: &[String], values: usize) -> String;
    /// The answer to it: the keys in the order asked, the values in that of the text.
    fn needles_answer(&self, found: &[(String, Vec<String>)]) -> String;

    /// What opens a context of assignments.
    fn variables_are_assigned(&self) -> String;
    /// `count` different variables.
    fn variables(&self, count: usize, random: &mut Random) -> Vec<String>;
    /// A number assigned to a variable.
    fn assign_value(&self, variable: &str, value: &str) -> String;
    /// A variable's value assigned to another.
    fn assign_variable(&self, variable: &str, from: &str) -> String;
    /// Asks for the `count` variables that have a value.
    fn ask_variables(&self, value: &str, count: usize) -> String;

    /// What opens a list of words.
    fn words_are_listed(&self) -> String;
    /// How many different words there are for lists.
    fn most_words(&self) -> usize;
    /// `count` different words, at most [`most_words`](Self::most_words).
    fn words(&self, count: usize, random: &mut Random) -> Vec<String>;
    /// The word at a place of a list, which is counted from 1.
    fn listed(&self, place: usize, word: &str) -> String;
    /// Asks for the `count` words of a list that stand in it most often.
    fn ask_common(&self, count: usize) -> String;

    /// What opens a coded text.
    fn text_is_coded(&self) -> String;
    /// `count` different coded words, at most [`most_words`](Self::most_words).
    fn coded_words(&self, count: usize, random: &mut Random) -> Vec<String>;
    /// The most frequent word of coded texts, which does not count.
    fn dots(&self) -> &'static str;
    /// Asks for the three most frequent words of a coded text.
    fn ask_frequent(&self) -> String;

    /// What opens a story.
    fn story_begins(&self) -> String;
    /// Persons, places and objects of stories.
    fn cast(&self) -> [&'static [&'static str]; 3];
    /// A person moves to a place.
    fn went(&self, person: &str, place: &str, random: &mut Random) -> String;
    /// A person takes an object.
    fn got(&self, person: &str, object: &str, random: &mut Random) -> String;
    /// A person puts an object down.
    fn left(&self, person: &str, object: &str, random: &mut Random) -> String;
    /// Asks where a person is.
    fn ask_person(&self, person: &str) -> String;
    /// Asks where an object is.
    fn ask_object(&self, object: &str) -> String;
    /// Asks where an object was before it came to a place.
    fn ask_before(&self, object: &str, place: &str) -> String;
    /// The answer; `person` is who took the object last, or who brought it to the place asked
    /// about.
    fn place_answer(&self, person: Option<&str>, place: &str) -> String;
}
