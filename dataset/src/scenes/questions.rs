//! What a picture of a scene is asked, as DPG-Bench asks of its prompts (arXiv 2403.05135 §4): questions in five broad categories, some of which
//! make sense only if another's answer is yes.
//!
//! They are answered from a [`Sight`]: what somebody has found in a picture, cell by cell. A scene's own sight answers all of them with yes.

use serde::Serialize;

use super::world::{Backdrop, Background, Color, Object, Place, Relation, Scene, Shape, Size, Texture};

/// What is found in a picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// The background's colour, where it is one colour.
    pub backdrop: Option<Backdrop>,
    /// What lies in the places, in the order of [`Place::all`]; those beyond the last are empty.
    pub cells: Vec<Option<Look>>,
}

/// What a thing in a picture looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its outline.
    pub shape: Shape,
    /// Its colour.
    pub color: Color,
    /// Its size.
    pub size: Size,
    /// What covers it.
    pub texture: Texture,
}

impl Sight {
    /// What lies there.
    pub fn at(&self, place: Place) -> Option<Look> {
        self.cells.get(place.number()).copied().flatten()
    }

    /// The places of all that has this outline and colour.
    fn places_of(&self, shape: Shape, color: Color) -> impl Iterator<Item = Place> {
        let found = Place::all().filter(move |place| self.at(*place).is_some_and(|look| (look.shape, look.color) == (shape, color)));
        found.collect::<Vec<_>>().into_iter()
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Asked {
    /// Whether a thing of this outline lies there.
    Entity(Place, Shape),
    /// Whether what lies there has this colour.
    Colored(Place, Color),
    /// Whether it has this size.
    Sized(Place, Size),
    /// Whether it is covered by this.
    Covered(Place, Texture),
    /// Whether one thing lies so to another, wherever both are.
    Related((Shape, Color), Relation, (Shape, Color)),
    /// Whether the background has this colour.
    Backdrop(Backdrop),
    /// Whether there are so many things.
    Count(usize),
    /// Whether a thing of this outline and colour lies anywhere.
    Somewhere(Shape, Color),
}

impl Asked {
    fn is_so(self, sight: &Sight) -> bool {
        match self {
            Self::Entity(place, shape) => sight.at(place).is_some_and(|look| look.shape == shape),
            Self::Colored(place, color) => sight.at(place).is_some_and(|look| look.color == color),
            Self::Sized(place, size) => sight.at(place).is_some_and(|look| look.size == size),
            Self::Covered(place, texture) => sight.at(place).is_some_and(|look| look.texture == texture),
            Self::Related(subject, relation, object) => {
                let mut pairs =
                    sight.places_of(subject.0, subject.1).flat_map(|a| sight.places_of(object.0, object.1).map(move |b| (a, b)));
                pairs.any(|(a, b)| relation.holds(a, b))
            }
            Self::Backdrop(color) => sight.backdrop == Some(color),
            Self::Count(number) => sight.cells.iter().flatten().count() == number,
            Self::Somewhere(shape, color) => sight.places_of(shape, color).next().is_some(),
        }
    }
}

/// One question, as a row of DPG-Bench's table has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Question {
    /// Its number within its scene, from 1.
    pub proposition_id: u32,
    /// The numbers of the questions whose answer must be yes for this one to make sense, separated by commas; 0 if there is none.
    pub dependency: String,
    /// `entity`, `attribute`, `relation`, `global` or `other`.
    pub category_broad: &'static str,
    /// As `color` or `spatial`.
    pub category_detailed: &'static str,
    /// As `attribute - color (circle, red)`.
    pub tuple: String,
    /// In words.
    pub question_natural_language: String,
    #[serde(skip)]
    asked: Asked,
}

impl Question {
    /// Whether the answer is yes for a picture in which this was found. Parents' answers are not looked at.
    pub fn is_so(&self, sight: &Sight) -> bool {
        self.asked.is_so(sight)
    }
}

impl Scene {
    /// What is found in its picture by whoever makes no mistake.
    pub fn sight(&self) -> Sight {
        let look = |object: &Object| Look { shape: object.shape, color: object.color, size: object.size, texture: object.texture };
        let at = |place| self.objects.iter().find(|object| object.place == place).map(look);
        let backdrop = match self.background {
            Background::Plain { color } => Some(color),
            Background::Gradient { .. } | Background::Pattern { .. } => None,
        };
        Sight { backdrop, cells: Place::all().map(at).collect() }
    }

    /// What its picture is asked: of every object whether it is there, its colour, size and surface; of neighbours in the list of objects how they lie
    /// to each other; the background's colour, where it is plain; and the number of objects.
    pub fn questions(&self) -> Vec<Question> {
        let mut list = List::default();
        let entities: Vec<u32> = self.objects.iter().map(|object| list.object(object)).collect();
        for (subject, parents) in entities.windows(2).enumerate() {
            // Objects lie in different places, so there is one.
            if let Some(relation) = self.relations(subject, subject + 1).first() {
                list.relation((&self.objects[subject], &self.objects[subject + 1]), *relation, parents);
            }
        }
        if let Background::Plain { color } = self.background {
            list.backdrop(color);
        }
        list.count(self.objects.len());
        list.0
    }

    /// What a picture of its short caption is asked, which says less: whether the things are there that it names, how they lie to each other, the number of
    /// things and the background's colour, each where it says so.
    pub fn short_questions(&self) -> Vec<Question> {
        let (mut list, caption) = (List::default(), self.short_caption());
        let told = |object: &&Object| caption.contains(&called(object));
        let told: Vec<(&Object, u32)> = self.objects.iter().filter(told).map(|object| (object, list.somewhere(object))).collect();
        if let ([(first, a), (second, b)], 2) = (told.as_slice(), self.objects.len()) {
            let said = Relation::ALL.iter().copied().find(|relation| caption.contains(&format!(" {} ", relation.name())));
            if let Some(relation) = said {
                list.relation((first, second), relation, &[*a, *b]);
            }
        }
        if let Background::Plain { color } = self.background
            && caption.contains(color.name())
            && self.objects.len() == 1
        {
            list.backdrop(color);
        }
        if told.len() == self.objects.len() || caption.contains("shapes") {
            list.count(self.objects.len());
        }
        list.0
    }
}

/// “red circle”.
fn called(object: &Object) -> String {
    format!("{} {}", object.color.name(), object.shape.name())
}

/// Questions so far.
#[derive(Default)]
struct List(Vec<Question>);

impl List {
    /// Returns its number.
    fn add(
        &mut self,
        (broad, detailed): (&'static str, &'static str),
        what: String,
        question: String,
        (asked, parents): (Asked, &[u32]),
    ) -> u32 {
        let proposition_id = self.0.len() as u32 + 1;
        let parents: Vec<String> = parents.iter().map(u32::to_string).collect();
        self.0.push(Question {
            proposition_id,
            dependency: if parents.is_empty() { "0".to_owned() } else { parents.join(",") },
            category_broad: broad,
            category_detailed: detailed,
            tuple: format!("{broad} - {detailed} {what}"),
            question_natural_language: question,
            asked,
        });
        proposition_id
    }

    fn somewhere(&mut self, object: &Object) -> u32 {
        let name = called(object);
        let (question, asked) = (format!("Is there a {name}?"), Asked::Somewhere(object.shape, object.color));
        self.add(("entity", "whole"), format!("({name})"), question, (asked, &[]))
    }

    fn backdrop(&mut self, color: Backdrop) {
        let name = color.name();
        let question = format!("Is the background {name}?");
        self.add(("global", "color"), format!("(background, {name})"), question, (Asked::Backdrop(color), &[]));
    }

    fn count(&mut self, count: usize) {
        let (verb, plural) = if count == 1 { ("Is", "") } else { ("Are", "s") };
        let question = format!("{verb} there exactly {count} shape{plural}?");
        self.add(("other", "count"), format!("(shapes, =={count})"), question, (Asked::Count(count), &[]));
    }

    /// An object and its attributes; the number of the question whether it is there.
    fn object(&mut self, object: &Object) -> u32 {
        let Object { shape, color, size, texture, place, .. } = *object;
        let (noun, at) = (shape.name(), place.name());
        let entity = self.add(
            ("entity", "whole"),
            format!("({noun}, {at})"),
            format!("Is there a {noun} at the {at}?"),
            (Asked::Entity(place, shape), &[]),
        );
        for (detailed, word, asked) in [
            ("color", color.name(), Asked::Colored(place, color)),
            ("size", size.name(), Asked::Sized(place, size)),
            ("texture", texture.name(), Asked::Covered(place, texture)),
        ] {
            let question = format!("Is the {noun} at the {at} {word}?");
            self.add(("attribute", detailed), format!("({noun}, {word})"), question, (asked, &[entity]));
        }
        entity
    }

    fn relation(&mut self, (a, b): (&Object, &Object), relation: Relation, parents: &[u32]) {
        let what = format!("({}, {}, {})", called(a), called(b), relation.name());
        let question = format!("Is the {} {} the {}?", called(a), relation.name(), called(b));
        let asked = Asked::Related((a.shape, a.color), relation, (b.shape, b.color));
        self.add(("relation", "spatial"), what, question, (asked, parents));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::scenes::{World, scene, scene_of};

    fn share(questions: &[Question], sight: &Sight) -> f64 {
        questions.iter().filter(|question| question.is_so(sight)).count() as f64 / questions.len() as f64
    }

    #[test]
    fn a_scene_answers_its_own_questions_with_yes_and_others_mostly_with_no() {
        let mut of_others = 0.0;
        for index in 0..300 {
            for scene in [scene(3, index), scene_of(World::Mini, 3, index)] {
                assert_eq!(share(&scene.questions(), &scene.sight()), 1.0, "{scene:?}");
            }
            of_others += share(&scene_of(World::Mini, 3, index).questions(), &scene_of(World::Mini, 4, index).sight());
        }
        assert!((0.05..0.4).contains(&(of_others / 300.0)), "{of_others}");
        let scene = scene_of(World::Mini, 3, 0);
        assert_eq!(share(&scene.questions(), &Sight::default()), 0.0);
    }

    #[test]
    fn each_thing_that_is_wrong_costs_just_the_questions_that_ask_for_it() {
        let scene = (0..).map(|index| scene_of(World::Mini, 5, index)).find(|scene| scene.objects.len() == 3).unwrap();
        let questions = scene.questions();
        let missed = |change: &dyn Fn(&mut Sight)| {
            let mut sight = scene.sight();
            change(&mut sight);
            let mut missed = BTreeMap::new();
            for question in questions.iter().filter(|question| !question.is_so(&sight)) {
                *missed.entry(question.category_detailed).or_insert(0) += 1;
            }
            missed
        };
        let cell = scene.objects[0].place.number();
        let other = |color| if color == Color::Red { Color::Blue } else { Color::Red };
        assert_eq!(
            missed(&|sight| sight.cells[cell] = None),
            [("color", 1), ("count", 1), ("size", 1), ("spatial", 1), ("texture", 1), ("whole", 1)].into()
        );
        assert_eq!(missed(&|sight| sight.backdrop = None), [("color", 1)].into());
        // Relations are between things by their colour and outline.
        let recolored = |sight: &mut Sight| sight.cells[cell].iter_mut().for_each(|look| look.color = other(look.color));
        assert_eq!(missed(&recolored), [("color", 1), ("spatial", 1)].into());
        assert_eq!(missed(&|sight| sight.cells[cell].iter_mut().for_each(|look| look.texture = Texture::Dotted)), [("texture", 1)].into());
    }

    #[test]
    fn short_captions_are_asked_only_what_they_say() {
        let mut asked = BTreeMap::new();
        for index in 0..300 {
            let scene = scene_of(World::Mini, 6, index);
            let questions = scene.short_questions();
            assert!(!questions.is_empty() && share(&questions, &scene.sight()) == 1.0, "{scene:?}");
            questions.iter().for_each(|question| *asked.entry(question.category_broad).or_insert(0) += 1);
            // Things may lie elsewhere than in the scene: a short caption names no place.
            if scene.objects.len() != 2 {
                let mut moved = scene.sight();
                moved.cells.rotate_left(1);
                assert_eq!(share(&questions, &moved), 1.0, "{scene:?}");
            }
        }
        assert!(["entity", "relation", "global", "other"].iter().all(|kind| asked[kind] > 20), "{asked:?}");
    }

    #[test]
    fn rows_are_numbered_and_depend_on_what_comes_before() {
        for index in 0..100 {
            let (scene, mut broad) = (scene_of(World::Mini, 8, index), BTreeMap::new());
            for (question, number) in scene.questions().iter().zip(1..) {
                assert_eq!(question.proposition_id, number);
                let parents: Vec<u32> = question.dependency.split(',').map(|parent| parent.parse().unwrap()).collect();
                assert!(parents == [0] || parents.iter().all(|parent| (1..number).contains(parent)), "{question:?}");
                assert!(question.tuple.starts_with(&format!("{} - {} (", question.category_broad, question.category_detailed)));
                *broad.entry(question.category_broad).or_insert(0) += 1;
            }
            let count = scene.objects.len();
            assert_eq!((broad["entity"], broad["attribute"], broad["global"], broad["other"]), (count, 3 * count, 1, 1));
            assert_eq!(broad.get("relation").copied().unwrap_or(0), count - 1);
        }
    }
}
