//! Captions: what a scene shows, in varied words.
//!
//! A dense caption has 40 to 90 words and names every object's shape, colour, size, texture and place, the background,
//! and a relation where there are two objects. What must be said comes first and is kept short where there are many
//! objects; then facts about the scene are added until a length drawn by lot is reached. Everything said is true.

use super::world::{Background, Direction, Object, Place, Relation, Scene, Shape, Size, Texture};
use crate::mix::Rng;

/// The longest caption.
const MOST: usize = 90;

/// The length drawn for a caption; it is longer only where the objects need it, and by the last fact added.
const TARGET: std::ops::Range<usize> = 44..72;

const NUMBERS: [&str; 7] = ["no", "one", "two", "three", "four", "five", "six"];

impl Scene {
    /// The long caption: 40 to 90 words.
    pub fn dense_caption(&self) -> String {
        Writer::new(self).dense()
    }

    /// The short caption: at most 12 words, only some of what is there.
    pub fn short_caption(&self) -> String {
        Writer::new(self).short()
    }

    /// Which objects `told`, a piece of one of its captions, names with their places, in the order of [`Scene::objects`].
    pub fn named(&self, told: &str) -> Vec<bool> {
        let words: Vec<&str> =
            told.split(|letter: char| !letter.is_ascii_alphabetic() && letter != '-').filter(|word| !word.is_empty()).collect();
        let told = format!(" {} ", words.join(" ").to_lowercase());
        let says = |phrase: &str| told.contains(&format!(" {phrase} "));
        let named = |object: &Object| {
            says(&format!("{} {}", object.color.name(), object.shape.name())) && place_phrases(object.place).iter().any(|place| says(place))
        };
        self.objects.iter().map(named).collect()
    }
}

/// Words are drawn from the scene's own stream, so a caption is a pure function of its scene.
struct Writer<'a> {
    scene: &'a Scene,
    rng: Rng,
    /// With many objects only short forms leave room for all of them.
    terse: bool,
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// “a red circle”, “an orange star”.
fn with_article(noun: &str) -> String {
    let an = noun.starts_with(['a', 'e', 'i', 'o']);
    format!("{} {noun}", if an { "an" } else { "a" })
}

fn sentence(clause: &str) -> String {
    let mut letters = clause.chars();
    letters.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), letters.as_str()))
}

/// Adjectives for a size; every one names only that size.
const fn size_words(size: Size) -> &'static [&'static str] {
    match size {
        Size::Small => &["small", "little"],
        Size::Medium => &["medium-sized", "mid-sized"],
        Size::Large => &["large", "big"],
    }
}

const fn texture_words(texture: Texture) -> &'static [&'static str] {
    match texture {
        Texture::Plain => &["plain", "solid"],
        Texture::Striped => &["striped"],
        Texture::Dotted => &["dotted", "polka-dotted", "spotted"],
        Texture::Checkered => &["checkered"],
    }
}

const fn texture_phrases(texture: Texture) -> &'static [&'static str] {
    match texture {
        Texture::Plain => &["with a plain surface", "without any pattern"],
        Texture::Striped => &["with diagonal stripes", "covered in stripes"],
        Texture::Dotted => &["with round dots", "covered in dots"],
        Texture::Checkered => &["with a checkered pattern", "with a checkerboard pattern"],
    }
}

/// At most 5 words in a corner and 4 elsewhere: six objects must fit into 90.
const fn place_phrases(place: Place) -> &'static [&'static str] {
    match (place.row, place.column) {
        (0, 0) => &["in the top left corner", "in the upper left corner", "at the top left"],
        (0, 1) => &["at the top center", "in the upper middle"],
        (0, _) => &["in the top right corner", "in the upper right corner", "at the top right"],
        (1, 0) => &["on the left side", "at the middle left"],
        (1, 1) => &["in the center", "in the middle", "at the center"],
        (1, _) => &["on the right side", "at the middle right"],
        (_, 0) => &["in the bottom left corner", "in the lower left corner", "at the bottom left"],
        (_, 1) => &["at the bottom center", "in the lower middle"],
        _ => &["in the bottom right corner", "in the lower right corner", "at the bottom right"],
    }
}

const fn shape_fact(shape: Shape) -> &'static str {
    match shape {
        Shape::Circle => "is perfectly round",
        Shape::Square => "has four equal sides",
        Shape::Triangle => "points upward",
        Shape::Star => "has five points",
        Shape::Diamond => "is taller than it is wide",
        Shape::Ring => "is open in the middle",
        Shape::Cross => "has four arms of equal length",
        Shape::Hexagon => "has six sides",
        Shape::Heart => "has two round lobes at the top",
        Shape::Crescent => "curves like a thin moon",
        Shape::Pentagon => "has five sides and a point at the top",
    }
}

impl<'a> Writer<'a> {
    fn new(scene: &'a Scene) -> Self {
        Self { scene, rng: Rng::new(scene.wording), terse: scene.objects.len() > 3 }
    }

    fn dense(&mut self) -> String {
        let background = self.background();
        let mut sentences = self.objects();
        let pair = (self.scene.objects.len() > 1).then(|| self.pair());
        sentences.extend(pair.map(|pair| self.relation(pair)));
        let mut length = words(&background) + sentences.iter().map(|said| words(said)).sum::<usize>();
        let target = TARGET.start + self.rng.below(TARGET.len());
        let opening = Some(self.opening()).filter(|said| self.rng.one_in(2) && length + words(said) <= MOST);
        length += opening.as_deref().map_or(0, words);
        for fact in self.facts(pair) {
            if length >= target {
                break;
            }
            length += words(&fact);
            sentences.push(fact);
        }
        let at = if self.rng.one_in(2) { 0 } else { sentences.len() };
        sentences.insert(at, background);
        opening.iter().chain(&sentences).map(|clause| sentence(clause)).collect::<Vec<_>>().join(" ")
    }

    fn short(&mut self) -> String {
        let objects = &self.scene.objects;
        let look = |object: &Object| with_article(&format!("{} {}", object.color.name(), object.shape.name()));
        match objects.as_slice() {
            [] => "an empty picture".to_owned(),
            [one] => format!("{} on {}", with_article(&self.described(one)), self.backdrop()),
            [first, second] => {
                let relations = self.scene.relations(0, 1);
                format!("{} {} {}", look(first), self.rng.pick(&relations).name(), look(second))
            }
            [first, second, third] => format!("{}, {} and {}", look(first), look(second), look(third)),
            [first, second, ..] => format!("{} shapes, including {} and {}", NUMBERS[objects.len()], look(first), look(second)),
        }
    }

    /// “large striped red circle”.
    fn described(&mut self, object: &Object) -> String {
        let (size, texture) = (self.rng.pick(size_words(object.size)), self.rng.pick(texture_words(object.texture)));
        format!("{size} {texture} {} {}", object.color.name(), object.shape.name())
    }

    /// An object with its article and all that is asked of it but the place.
    fn noun(&mut self, object: &Object) -> String {
        let (color, shape) = (object.color.name(), object.shape.name());
        let form = if self.terse { 0 } else { self.rng.below(4) };
        let noun = match form {
            0 | 1 => self.described(object),
            2 => format!("{} {color} {shape} {}", self.rng.pick(size_words(object.size)), self.rng.pick(texture_phrases(object.texture))),
            _ => {
                let (size, texture) = (self.rng.pick(size_words(object.size)), self.rng.pick(texture_words(object.texture)));
                format!("{color} {shape} that is {size} and {texture}")
            }
        };
        with_article(&noun)
    }

    /// How an object is called once it is known: “the red circle” is one, see [`Object`].
    fn known(&self, object: usize) -> String {
        let object = &self.scene.objects[object];
        format!("the {} {}", object.color.name(), object.shape.name())
    }

    /// Every object with its place, in an order of their own.
    fn objects(&mut self) -> Vec<String> {
        let mut order: Vec<Object> = self.scene.objects.clone();
        if self.rng.one_in(3) {
            order.sort_by_key(|object| object.place); // reading order
        }
        let mut left = order.as_slice();
        let mut sentences = Vec::new();
        while let Some((first, rest)) = left.split_first() {
            let second = rest.first().filter(|_| self.rng.one_in(2));
            sentences.push(match second {
                Some(second) => {
                    let join = self.rng.pick(&["while", "and"]);
                    format!("{}, {join} {}", self.stated(first), self.stated(second))
                }
                None if self.rng.one_in(2) => self.stated(first),
                None => self.placed(first),
            });
            left = &rest[usize::from(second.is_some())..];
        }
        sentences
    }

    /// “a … lies in the center”.
    fn stated(&mut self, object: &Object) -> String {
        let verbs = ["is", "lies", "sits", "appears", "can be seen", "is placed"];
        let verb = self.rng.pick(if self.terse { &verbs[..4] } else { &verbs });
        format!("{} {verb} {}", self.noun(object), self.rng.pick(place_phrases(object.place)))
    }

    /// The same, place first.
    fn placed(&mut self, object: &Object) -> String {
        let place = self.rng.pick(place_phrases(object.place));
        let verbs = ["is", "sits", "lies", "there is"];
        let verb = self.rng.pick(if self.terse { &verbs[..3] } else { &verbs });
        let comma = if verb == "there is" { "," } else { "" };
        format!("{place}{comma} {verb} {}", self.noun(object))
    }

    /// Two different objects.
    fn pair(&mut self) -> (usize, usize) {
        let count = self.scene.objects.len();
        let first = self.rng.below(count);
        (first, (first + 1 + self.rng.below(count - 1)) % count)
    }

    fn relation(&mut self, (subject, object): (usize, usize)) -> String {
        let relations = self.scene.relations(subject, object);
        let (a, b) = (self.known(subject), self.known(object));
        if let ([across, along], false) = (relations.as_slice(), self.terse)
            && self.rng.one_in(3)
        {
            let side = if *across == Relation::LeftOf { "left" } else { "right" };
            return format!("{a} is {} and to the {side} of {b}", along.name());
        }
        let forms = match self.rng.pick(&relations) {
            Relation::LeftOf => ["{a} is to the left of {b}", "to the left of {b} is {a}", "{a} is left of {b}"],
            Relation::RightOf => ["{a} is to the right of {b}", "to the right of {b} is {a}", "{a} is right of {b}"],
            Relation::Above => ["{a} is above {b}", "above {b} is {a}", "{a} is higher up than {b}"],
            Relation::Below => ["{a} is below {b}", "below {b} is {a}", "{a} is lower down than {b}"],
        };
        self.rng.pick(&forms).replace("{a}", &a).replace("{b}", &b)
    }

    /// At most 10 words where there are many objects.
    fn background(&mut self) -> String {
        let shapes = if self.scene.objects.len() == 1 { "the shape" } else { "the shapes" };
        let form = if self.terse { 0 } else { self.rng.below(3) };
        match self.scene.background {
            Background::Plain { color } => match form {
                0 => format!("the background is plain {}", color.name()),
                1 => format!("everything is set against a plain {} background", color.name()),
                _ => format!("behind {shapes} is a plain {} background", color.name()),
            },
            Background::Gradient { from, to, direction } => {
                let (from, to) = (from.name(), to.name());
                let (toward, start, end) = match direction {
                    Direction::Down => ("downward", "the top", "the bottom"),
                    Direction::Right => ("rightward", "the left", "the right"),
                    Direction::Diagonal => ("diagonally", "the top left", "the bottom right"),
                };
                match form {
                    0 => format!("the background fades {toward} from {from} to {to}"),
                    1 => format!("the background is a gradient from {from} at {start} to {to} at {end}"),
                    _ => format!("behind {shapes}, {from} at {start} fades into {to} at {end}"),
                }
            }
            Background::Pattern { color, texture } => {
                let marks = match texture {
                    Texture::Striped => "faint stripes",
                    Texture::Dotted => "faint dots",
                    Texture::Plain | Texture::Checkered => "faint checks",
                };
                match form {
                    0 => format!("the background is {} with {marks}", color.name()),
                    1 => format!("everything is set against a {} background with {marks}", color.name()),
                    _ => format!("the background has {marks} in two shades of {}", color.name()),
                }
            }
        }
    }

    /// The background in at most 4 words.
    fn backdrop(&self) -> String {
        match self.scene.background {
            Background::Plain { color } => with_article(&format!("{} background", color.name())),
            Background::Gradient { .. } => "a gradient background".to_owned(),
            Background::Pattern { texture, .. } => with_article(&format!("{} background", texture.name())),
        }
    }

    /// What more can be said, shuffled. `told` are two objects whose relation was told.
    fn facts(&mut self, told: Option<(usize, usize)>) -> Vec<String> {
        let count = self.scene.objects.len();
        let mut facts: Vec<String> = (0..count).flat_map(|object| self.object_facts(object)).collect();
        let empty = ["nothing else is in the picture".to_owned(), "the rest of the picture is empty".to_owned(), self.empty_place()];
        facts.push(self.rng.pick(&[&empty[0], &empty[1], &empty[2]]).clone());
        let each = if count == 1 { "the shape" } else { "each shape" };
        facts.push(format!("a soft shadow falls to the lower right of {each}"));
        facts.push(format!("a thin outline runs around {each}"));
        if count == 1 {
            facts.push("the shape stands alone, with empty space around it".to_owned());
        }
        facts.extend(told.map(|pair| self.comparison(pair)));
        let mut told: Vec<(usize, usize)> = told.into_iter().collect();
        for _ in 2..count {
            let (a, b) = self.pair();
            if !told.contains(&(a, b)) && !told.contains(&(b, a)) {
                facts.extend([self.comparison((a, b)), self.relation((a, b))]);
                told.push((a, b));
            }
        }
        self.rng.shuffle(&mut facts);
        facts
    }

    fn opening(&mut self) -> String {
        let number = NUMBERS[self.scene.objects.len()];
        if number == "one" {
            return self.rng.pick(&["the picture shows a single shape", "there is just one shape in this picture"]).to_owned();
        }
        let forms = ["the picture shows {n} shapes", "this is a picture of {n} flat shapes", "{n} shapes are arranged in this picture"];
        self.rng.pick(&forms).replace("{n}", number)
    }

    fn object_facts(&mut self, object: usize) -> [String; 2] {
        let name = self.known(object);
        let Object { shape, texture, .. } = self.scene.objects[object];
        let surface = match texture {
            Texture::Plain => format!("{name} is filled with one even color"),
            Texture::Striped => format!("diagonal stripes run across {name}"),
            Texture::Dotted => format!("round dots cover {name}"),
            Texture::Checkered => format!("{name} is divided into squares like a chessboard"),
        };
        [format!("{name} {}", shape_fact(shape)), surface]
    }

    /// Six objects leave three places empty.
    fn empty_place(&mut self) -> String {
        let taken = |place: &Place| self.scene.objects.iter().any(|object| object.place == *place);
        let free: Vec<Place> = Place::all().filter(|place| !taken(place)).collect();
        let place = self.rng.pick(&free);
        format!("nothing is placed {}", self.rng.pick(place_phrases(place)))
    }

    fn comparison(&self, (first, second): (usize, usize)) -> String {
        let (a, b) = (self.scene.objects[first].size, self.scene.objects[second].size);
        let (first, second) = (self.known(first), self.known(second));
        match a.cmp(&b) {
            std::cmp::Ordering::Less => format!("{first} is smaller than {second}"),
            std::cmp::Ordering::Equal => format!("{first} and {second} are about the same size"),
            std::cmp::Ordering::Greater => format!("{first} is larger than {second}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::scenes::{World, scene, world::Scene};

    const SCENES: u64 = 20_000;

    fn has_one(text: &str, words: &[&str]) -> bool {
        words.iter().any(|word| text.contains(word))
    }

    /// The sentences that name the object say all that must be said of it.
    fn describes(caption: &str, object: &Object) -> bool {
        let name = format!("{} {}", object.color.name(), object.shape.name());
        caption.to_lowercase().split(". ").any(|said| {
            said.contains(&name)
                && has_one(said, size_words(object.size))
                && (has_one(said, texture_words(object.texture)) || has_one(said, texture_phrases(object.texture)))
                && has_one(said, place_phrases(object.place))
        })
    }

    #[test]
    fn dense_captions_say_everything_in_40_to_90_words() {
        let mut lengths = HashSet::new();
        for index in 0..SCENES {
            let scene = scene(index % 7, index);
            let caption = scene.dense_caption();
            let length = words(&caption);
            lengths.insert(length);
            assert!((40..=90).contains(&length), "{length} words: {caption}");
            assert!(scene.objects.iter().all(|object| describes(&caption, object)), "{caption}\n{scene:?}");
            if scene.objects.len() > 1 {
                let relations = [" left of", " right of", "above", "below", "higher up than", "lower down than"];
                assert!(has_one(&caption.to_lowercase(), &relations), "no relation: {caption}");
            }
            let (a, b) = match scene.background {
                Background::Plain { color } | Background::Pattern { color, .. } => (color, color),
                Background::Gradient { from, to, .. } => (from, to),
            };
            assert!(caption.contains(a.name()) && caption.contains(b.name()), "no background: {caption}");
        }
        assert!(lengths.len() > 35, "lengths {lengths:?}");
    }

    #[test]
    fn six_objects_with_the_longest_words_fit() {
        let longest = (0..SCENES).map(|index| words(&Scene::draw(World::Rich, 3, index, &(6..=6)).dense_caption())).max();
        assert!(longest <= Some(90), "{longest:?}");
    }

    #[test]
    fn a_whole_caption_names_all_and_a_piece_of_it_some() {
        let mut named = 0;
        for index in 0..500 {
            let scene = scene(13, index);
            let caption = scene.dense_caption();
            assert!(scene.named(&caption).iter().all(|named| *named), "{caption}");
            assert!(!scene.named("").contains(&true));
            let first = caption.split_whitespace().take(22).collect::<Vec<_>>().join(" ");
            named += scene.named(&first).iter().filter(|named| **named).count();
        }
        assert!((300..900).contains(&named), "{named}");
    }

    #[test]
    fn captions_are_well_formed() {
        for index in 0..SCENES {
            let scene = scene(11, index);
            for caption in [scene.dense_caption(), sentence(&scene.short_caption())] {
                assert!(caption.is_ascii() && caption.ends_with('.') && !caption.contains("  "), "{caption}");
                assert!(caption.split(". ").all(|said| said.starts_with(|c: char| c.is_ascii_uppercase())), "{caption}");
                let all: Vec<&str> = caption.split([' ', '.', ',']).filter(|word| !word.is_empty()).collect();
                for pair in all.windows(2) {
                    let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                    assert!(!pair[0].eq_ignore_ascii_case("a") || !vowel, "{pair:?}: {caption}");
                    assert!(!pair[0].eq_ignore_ascii_case("an") || vowel, "{pair:?}: {caption}");
                    assert_ne!(pair[0], pair[1], "{caption}");
                }
                let sentences: Vec<&str> = caption.trim_end_matches('.').split(". ").collect();
                assert_eq!(sentences.iter().collect::<HashSet<_>>().len(), sentences.len(), "said twice: {caption}");
            }
        }
    }

    #[test]
    fn short_captions_are_short_and_captions_vary() {
        let mut shorts = HashSet::new();
        let mut forms = HashSet::new();
        for index in 0..SCENES {
            let scene = scene(2, index);
            let short = scene.short_caption();
            assert!((5..=12).contains(&words(&short)), "{short}");
            shorts.insert(short);
            forms.insert(scene.dense_caption().split_whitespace().take(3).collect::<Vec<_>>().join(" "));
        }
        assert!(shorts.len() as u64 > SCENES * 9 / 10 && forms.len() > 250, "{} {}", shorts.len(), forms.len());
    }

    #[test]
    fn the_words_are_pinned() {
        let scene = scene(7, 2);
        assert_eq!(scene.short_caption(), "a turquoise pentagon, a magenta cross and a pink square");
        let dense = "At the top center is a big plain turquoise pentagon. A magenta cross that is little and solid is placed at the bottom left, while a large solid pink square lies on the right side. The magenta cross is lower down than the pink square. The turquoise pentagon is filled with one even color. The background is plain charcoal.";
        assert_eq!(scene.dense_caption(), dense);
    }
}
