//! bAbI's tasks 1 to 3 (Weston et al., section 3.1) in an essay: persons who move, take objects and
//! put them down.

use super::super::language::Language;
use super::super::llama::random::Random;
use super::super::sample::{Piece, Question, Sample};
use super::super::task::Haystack;
use super::hide;

/// Persons, places and objects in one story, as in bAbI.
const PERSONS: usize = 4;
const PLACES: usize = 6;
const OBJECTS: usize = 3;

/// Sentences of a story, for one, two and three supporting facts.
const LENGTHS: [std::ops::Range<usize>; 3] = [2..11, 4..17, 8..25];

/// A story with `facts` supporting facts (1 to 3) to a question.
pub fn sample(
    language: &dyn Language,
    facts: usize,
    size: usize,
    questions: usize,
    mut random: Random,
) -> Option<Sample> {
    let length = random.between(LENGTHS[facts - 1].clone());
    let (told, mut asked) = loop {
        let story = Story::new(language, facts > 1, length, &mut random);
        let asked = story.questions(language, facts);
        if !asked.is_empty() {
            break (story.told, asked);
        }
    };
    random.shuffle(&mut asked);
    asked.truncate(questions.max(1));
    let mut sentence = language.essay(random.stream(1));
    let hay: Vec<Piece> = (0..size).map(|_| Piece::hay(sentence())).collect();
    // Several sentences of the story may follow each other.
    let mut places: Vec<usize> = told.iter().map(|_| random.between(0..size + 1)).collect();
    places.sort_unstable();
    Some(Sample {
        context: hide(language.story_begins(), hay, told, &places),
        separator: language.separator(Haystack::Essay),
        questions: asked,
    })
}

/// What has happened.
struct Story {
    persons: Vec<Person>,
    objects: Vec<Object>,
    told: Vec<String>,
}

struct Person {
    name: &'static str,
    place: Option<&'static str>,
}

struct Object {
    name: &'static str,
    /// Who holds it.
    holder: Option<usize>,
    /// Who took it last.
    last: Option<usize>,
    /// The places it has been at, and by whom it came there; known from when it was first taken.
    visits: Vec<(usize, &'static str)>,
}

impl Story {
    fn new(language: &dyn Language, with_objects: bool, length: usize, random: &mut Random) -> Self {
        let cast = language.cast();
        let mut pick = |count, names: &[&'static str]| random.sample(count, names);
        let (persons, places, objects) =
            (pick(PERSONS, cast[0]), pick(PLACES, cast[1]), pick(OBJECTS, cast[2]));
        let mut story = Self {
            persons: persons.into_iter().map(|name| Person { name, place: None }).collect(),
            objects: objects
                .into_iter()
                .map(|name| Object { name, holder: None, last: None, visits: Vec::new() })
                .collect(),
            told: Vec::new(),
        };
        while story.told.len() < length {
            let person = random.between(0..PERSONS);
            // Half of what happens are moves, where there are objects.
            if with_objects && random.between(0..2) == 1 {
                story.handle(language, person, random);
            } else {
                let place = *random.choose(&places);
                story.walk(language, person, place, random);
            }
        }
        story
    }

    fn walk(&mut self, language: &dyn Language, person: usize, place: &'static str, random: &mut Random) {
        if self.persons[person].place == Some(place) {
            return;
        }
        self.persons[person].place = Some(place);
        for object in self.objects.iter_mut().filter(|object| object.holder == Some(person)) {
            object.visits.push((person, place));
        }
        self.told.push(language.went(self.persons[person].name, place, random));
    }

    /// Takes an object that lies where the person is, or puts down one of the person's.
    fn handle(&mut self, language: &dyn Language, person: usize, random: &mut Random) {
        let Some(place) = self.persons[person].place else { return };
        let name = self.persons[person].name;
        let object = &mut self.objects[random.between(0..OBJECTS)];
        if object.holder == Some(person) {
            object.holder = None;
            self.told.push(language.left(name, object.name, random));
        } else if object.holder.is_none() && object.visits.last().is_none_or(|visit| visit.1 == place) {
            (object.holder, object.last) = (Some(person), Some(person));
            if object.visits.is_empty() {
                object.visits.push((person, place));
            }
            self.told.push(language.got(name, object.name, random));
        }
    }

    /// All that can be asked with this many supporting facts.
    fn questions(&self, language: &dyn Language, facts: usize) -> Vec<Question> {
        let question = |query, person, place: &str| Question {
            query,
            answer: language.place_answer(person, place),
            expected: vec![place.to_owned()],
        };
        let name = |person: usize| Some(self.persons[person].name);
        match facts {
            1 => self
                .persons
                .iter()
                .filter_map(|person| Some(question(language.ask_person(person.name), None, person.place?)))
                .collect(),
            2 => {
                let known = |object: &Object| {
                    // Who took it last may not be who brought it there.
                    Some(question(
                        language.ask_object(object.name),
                        name(object.last?),
                        object.visits.last()?.1,
                    ))
                };
                self.objects.iter().filter_map(known).collect()
            }
            _ => self
                .objects
                .iter()
                .flat_map(|object| object.visits.windows(2).map(move |pair| (object, pair[0], pair[1])))
                // A place to which it came twice has no one before.
                .filter(|(object, _, (_, to))| {
                    object.visits.iter().filter(|visit| visit.1 == *to).count() == 1
                })
                .map(|(object, (_, from), (person, to))| {
                    question(language.ask_before(object.name, to), name(person), from)
                })
                .collect(),
        }
    }
}
