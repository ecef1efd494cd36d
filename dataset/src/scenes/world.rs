//! What a scene can hold, and how one is drawn by lot.

use std::ops::RangeInclusive;

use serde::{Serialize, Serializer};

use crate::mix::{self, Rng};

/// Keeps scenes' keys apart from other uses of a seed.
const SCENES: u64 = 3;

/// The places form a square grid of this side, an object a cell.
const GRID: usize = 3;

/// Room in picture widths between an object and its cell's edge, so that neighbours never touch.
const MARGIN: f32 = 0.006;

/// How far from its cell's middle an object lies at most, so that a corner stays a corner.
const SHIFT: f32 = 0.05;

/// The smallest weighted distance between an object's colour and what is behind it.
const CONTRAST: i32 = 240;

/// An enum of words: each variant has a name, which is also its JSON form.
macro_rules! words {
    ($(#[$doc:meta])* $kind:ident { $($variant:ident = $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $kind { $(#[doc = concat!("“", $name, "”")] $variant),+ }

        impl $kind {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its name in captions and truth.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// The one of this name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.name() == name)
            }
        }

        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.name())
            }
        }
    };
}

words!(
    /// An object's outline.
    Shape {
        Circle = "circle", Square = "square", Triangle = "triangle", Star = "star", Diamond = "diamond", Ring = "ring",
        Cross = "cross", Hexagon = "hexagon", Heart = "heart", Crescent = "crescent", Pentagon = "pentagon",
    }
);
words!(
    /// An object's colour.
    Color {
        Red = "red", Orange = "orange", Yellow = "yellow", Lime = "lime", Green = "green", Turquoise = "turquoise",
        Blue = "blue", Purple = "purple", Magenta = "magenta", Pink = "pink", Brown = "brown", Gray = "gray", Black = "black", White = "white",
    }
);
words!(
    /// A background's colour.
    Backdrop {
        White = "white", Cream = "cream", Beige = "beige", Mint = "mint", SkyBlue = "sky blue", Lavender = "lavender",
        Peach = "peach", LightGray = "light gray", Navy = "navy", Charcoal = "charcoal", DarkGreen = "dark green", Maroon = "maroon",
    }
);
words!(
    /// An object's size.
    Size { Small = "small", Medium = "medium", Large = "large" }
);
words!(
    /// What covers an object or a patterned background.
    Texture { Plain = "plain", Striped = "striped", Dotted = "dotted", Checkered = "checkered" }
);
words!(
    /// How one object lies to another.
    Relation { LeftOf = "left of", RightOf = "right of", Above = "above", Below = "below" }
);
words!(
    /// Where a gradient runs.
    Direction { Down = "down", Right = "right", Diagonal = "diagonal" }
);

impl Relation {
    /// Whether something at `a` lies so to something at `b`.
    pub const fn holds(self, a: Place, b: Place) -> bool {
        match self {
            Self::LeftOf => a.column < b.column,
            Self::RightOf => a.column > b.column,
            Self::Above => a.row < b.row,
            Self::Below => a.row > b.row,
        }
    }
}

impl Color {
    pub(super) const fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [218, 38, 44],
            Self::Orange => [243, 129, 28],
            Self::Yellow => [250, 208, 36],
            Self::Lime => [150, 208, 44],
            Self::Green => [38, 140, 62],
            Self::Turquoise => [32, 184, 178],
            Self::Blue => [40, 92, 214],
            Self::Purple => [124, 58, 176],
            Self::Magenta => [214, 36, 146],
            Self::Pink => [246, 140, 180],
            Self::Brown => [122, 74, 38],
            Self::Gray => [128, 131, 136],
            Self::Black => [26, 26, 29],
            Self::White => [249, 249, 246],
        }
    }
}

impl Backdrop {
    /// Red, green, blue.
    #[must_use]
    pub const fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [250, 250, 250],
            Self::Cream => [250, 242, 216],
            Self::Beige => [229, 214, 186],
            Self::Mint => [200, 236, 212],
            Self::SkyBlue => [186, 220, 248],
            Self::Lavender => [220, 210, 246],
            Self::Peach => [255, 218, 192],
            Self::LightGray => [212, 214, 218],
            Self::Navy => [22, 32, 72],
            Self::Charcoal => [50, 52, 58],
            Self::DarkGreen => [20, 62, 44],
            Self::Maroon => [90, 20, 36],
        }
    }

    pub(super) const fn is_dark(self) -> bool {
        matches!(self, Self::Navy | Self::Charcoal | Self::DarkGreen | Self::Maroon)
    }
}

impl Size {
    /// Half the side of the box that an object is drawn in, in widths of a picture of nine cells.
    const fn radius(self) -> f32 {
        match self {
            Self::Small => 0.085,
            Self::Medium => 0.12,
            Self::Large => 0.16,
        }
    }
}

/// What scenes are drawn from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum World {
    /// All that there is.
    #[default]
    Rich,
    /// What a small network learns to draw and to tell apart at 64 × 64 pixels: up to four objects, large ones in the corners, of six shapes, eight
    /// colours, two sizes and two textures, and plain backgrounds of six colours.
    Mini,
}

impl World {
    /// Every one, by the name that the command line knows it by.
    pub const NAMES: [(&'static str, World); 2] = [("rich", World::Rich), ("mini", World::Mini)];

    /// The name that the command line knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rich => "rich",
            Self::Mini => "mini",
        }
    }

    /// The most objects in a scene.
    pub const fn most_objects(self) -> u32 {
        match self {
            Self::Rich => 6,
            Self::Mini => 4,
        }
    }

    /// Where its objects lie: in the places that have cells of their own, which are of one size and fill the picture.
    pub fn places(self) -> Vec<Place> {
        let has = |place: &Place| self == Self::Rich || (place.row != 1 && place.column != 1);
        Place::all().filter(has).collect()
    }

    /// Cells a side.
    const fn grid(self) -> usize {
        match self {
            Self::Rich => GRID,
            Self::Mini => 2,
        }
    }

    /// The cell along one axis that a place's row or column is.
    const fn cell(self, along: u8) -> u8 {
        match self {
            Self::Rich => along,
            Self::Mini => along / 2,
        }
    }

    /// Half the side of the box that an object is drawn in, in picture widths.
    fn radius(self, size: Size) -> f32 {
        match self {
            Self::Rich => size.radius(),
            Self::Mini => 1.4 * size.radius(),
        }
    }

    /// The outlines of its objects.
    pub const fn shapes(self) -> &'static [Shape] {
        match self {
            Self::Rich => Shape::ALL,
            Self::Mini => &[Shape::Circle, Shape::Square, Shape::Triangle, Shape::Star, Shape::Ring, Shape::Cross],
        }
    }

    /// The colours of its objects.
    pub const fn colors(self) -> &'static [Color] {
        match self {
            Self::Rich => Color::ALL,
            Self::Mini => &[Color::Red, Color::Orange, Color::Yellow, Color::Green, Color::Blue, Color::Purple, Color::Black, Color::White],
        }
    }

    /// The sizes of its objects.
    pub const fn sizes(self) -> &'static [Size] {
        match self {
            Self::Rich => Size::ALL,
            Self::Mini => &[Size::Medium, Size::Large],
        }
    }

    /// What covers its objects.
    pub const fn textures(self) -> &'static [Texture] {
        match self {
            Self::Rich => Texture::ALL,
            Self::Mini => &[Texture::Plain, Texture::Checkered],
        }
    }

    /// The colours of its backgrounds.
    pub const fn backdrops(self) -> &'static [Backdrop] {
        match self {
            Self::Rich => Backdrop::ALL,
            Self::Mini => &[Backdrop::Beige, Backdrop::Mint, Backdrop::SkyBlue, Backdrop::Lavender, Backdrop::LightGray, Backdrop::Navy],
        }
    }
}

/// A cell of the 3 × 3 grid of places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Place {
    /// 0 at the top.
    pub row: u8,
    /// 0 at the left.
    pub column: u8,
}

impl Place {
    /// Every place, row by row.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..(GRID * GRID) as u8).map(|cell| Self { row: cell / GRID as u8, column: cell % GRID as u8 })
    }

    /// Its number in [`Place::all`].
    pub const fn number(self) -> usize {
        self.row as usize * GRID + self.column as usize
    }

    /// The place of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|place| place.name() == name)
    }

    /// Its name in truth, as “top left” or “center”.
    pub const fn name(self) -> &'static str {
        match (self.row, self.column) {
            (0, 0) => "top left",
            (0, 1) => "top center",
            (0, _) => "top right",
            (1, 0) => "middle left",
            (1, 1) => "center",
            (1, _) => "middle right",
            (_, 0) => "bottom left",
            (_, 1) => "bottom center",
            _ => "bottom right",
        }
    }
}

/// One thing in a scene. No two of a scene have both the same shape and the same colour, so “the red circle” is one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Object {
    /// Its outline.
    pub shape: Shape,
    /// Its colour.
    pub color: Color,
    /// Its size.
    pub size: Size,
    /// What covers it.
    pub texture: Texture,
    /// The cell that it lies in; no other object does.
    pub place: Place,
    /// Its middle (x, y) in picture widths from the top left.
    pub center: [f32; 2],
    /// Half the side of the box that it is drawn in, in picture widths.
    pub radius: f32,
}

/// What is behind the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Background {
    /// One colour.
    Plain {
        /// Which.
        color: Backdrop,
    },
    /// From one colour to another.
    Gradient {
        /// The first colour.
        from: Backdrop,
        /// The last colour.
        to: Backdrop,
        /// Where it runs: down, right, or diagonally down to the right.
        direction: Direction,
    },
    /// Two shades of one colour.
    Pattern {
        /// Which.
        color: Backdrop,
        /// Any but plain.
        texture: Texture,
    },
}

/// A picture before it is drawn: a pure function of (seed, index, allowed object counts).
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// The data set's seed.
    pub seed: u64,
    /// The scene's number.
    pub index: u64,
    /// What is in it, 1 to 6.
    pub objects: Vec<Object>,
    /// What is behind.
    pub background: Background,
    /// Keys the choice of words.
    pub(super) wording: u64,
}

impl Scene {
    pub(super) fn draw(world: World, seed: u64, index: u64, counts: &RangeInclusive<u32>) -> Self {
        let mut rng = Rng::new(mix::key(&[SCENES, seed, index]));
        let background = Background::draw(&mut rng, world);
        let span = counts.end().saturating_sub(*counts.start()) as usize + 1;
        let count = *counts.start() as usize + rng.below(span);
        let mut places = world.places();
        rng.shuffle(&mut places);
        let mut looks: Vec<(Shape, Color)> = background.colors(world).flat_map(|c| world.shapes().iter().map(move |s| (*s, c))).collect();
        rng.shuffle(&mut looks);
        let drawn = looks.into_iter().zip(places).take(count);
        let objects = drawn.map(|(look, place)| Object::draw(&mut rng, world, look, place)).collect();
        Self { seed, index, objects, background, wording: rng.next() }
    }

    /// How the first object lies to the second: one relation for each axis in which their places differ.
    pub fn relations(&self, subject: usize, object: usize) -> Vec<Relation> {
        let (a, b) = (self.objects[subject].place, self.objects[object].place);
        Relation::ALL.iter().copied().filter(|relation| relation.holds(a, b)).collect()
    }
}

impl Object {
    fn draw(rng: &mut Rng, world: World, (shape, color): (Shape, Color), place: Place) -> Self {
        let (size, texture) = (rng.pick(world.sizes()), rng.pick(world.textures()));
        let (half, radius) = (0.5 / world.grid() as f32, world.radius(size));
        let room = (half - radius - MARGIN).min(SHIFT);
        let mut at = |along: u8| {
            let shift = rng.below(2001) as f32 / 1000.0 - 1.0;
            (2.0 * f32::from(world.cell(along)) + 1.0) * half + shift * room
        };
        let center = [at(place.column), at(place.row)];
        Self { shape, color, size, texture, place, center, radius }
    }
}

impl Background {
    fn draw(rng: &mut Rng, world: World) -> Self {
        let color = rng.pick(world.backdrops());
        if world == World::Mini {
            return Self::Plain { color };
        }
        match rng.below(5) {
            0 | 1 => Self::Plain { color },
            2 | 3 => {
                // Both ends pale or both dark: something must stand out from all of it.
                let others: Vec<Backdrop> =
                    Backdrop::ALL.iter().copied().filter(|other| *other != color && other.is_dark() == color.is_dark()).collect();
                Self::Gradient { from: color, to: rng.pick(&others), direction: rng.pick(Direction::ALL) }
            }
            _ => Self::Pattern { color, texture: rng.pick(&Texture::ALL[1..]) },
        }
    }

    /// The colours of a world that stand out from it.
    fn colors(self, world: World) -> impl Iterator<Item = Color> {
        let ends = match self {
            Self::Plain { color } | Self::Pattern { color, .. } => [color, color],
            Self::Gradient { from, to, .. } => [from, to],
        };
        world.colors().iter().copied().filter(move |color| ends.iter().all(|end| distance(color.rgb(), end.rgb()) >= CONTRAST * CONTRAST))
    }
}

/// A squared distance of colours that follows the eye a little: green counts most, red least.
fn distance(a: [u8; 3], b: [u8; 3]) -> i32 {
    let square = |channel: usize| (i32::from(a[channel]) - i32::from(b[channel])).pow(2);
    2 * square(0) + 4 * square(1) + 3 * square(2)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_background_leaves_colours_enough() {
        for (world, least) in [(World::Rich, 7), (World::Mini, 5)] {
            for seed in 0..2000 {
                let background = Background::draw(&mut Rng::new(seed), world);
                let colors: Vec<_> = background.colors(world).collect();
                assert!(colors.len() >= least, "{background:?}: {colors:?}");
            }
        }
    }

    #[test]
    fn objects_are_distinct_and_inside_their_own_cells() {
        for world in [World::Rich, World::Mini] {
            objects_are_within(world);
        }
    }

    fn objects_are_within(world: World) {
        let (mut counts, most) = (HashSet::new(), world.most_objects());
        let width = 1.0 / world.grid() as f32;
        for index in 0..3000 {
            let scene = Scene::draw(world, 5, index, &(1..=most));
            counts.insert(scene.objects.len());
            let looks: HashSet<_> = scene.objects.iter().map(|o| (o.shape, o.color)).collect();
            let places: HashSet<_> = scene.objects.iter().map(|o| o.place).collect();
            assert_eq!((looks.len(), places.len()), (scene.objects.len(), scene.objects.len()));
            for object in &scene.objects {
                let cells = [object.place.column, object.place.row];
                for (at, cell) in object.center.iter().zip(cells) {
                    let low = f32::from(world.cell(cell)) * width;
                    assert!(at - object.radius >= low && at + object.radius <= low + width, "{object:?}");
                }
            }
        }
        assert_eq!(counts, (1..=most as usize).collect());
    }

    #[test]
    fn relations_agree_with_the_centres() {
        for index in 0..500 {
            let scene = Scene::draw(World::Rich, 9, index, &(2..=6));
            for (subject, object) in (0..scene.objects.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                let (a, b) = (scene.objects[subject].center, scene.objects[object].center);
                let relations = scene.relations(subject, object);
                assert!(!relations.is_empty());
                assert!(relations.iter().all(|relation| match relation {
                    Relation::LeftOf => a[0] < b[0],
                    Relation::RightOf => a[0] > b[0],
                    Relation::Above => a[1] < b[1],
                    Relation::Below => a[1] > b[1],
                }));
            }
        }
    }

    #[test]
    fn every_word_of_a_world_turns_up_and_no_other() {
        for (_, world) in World::NAMES {
            let scenes: Vec<Scene> = (0..2000).map(|index| Scene::draw(world, 1, index, &(1..=world.most_objects()))).collect();
            let objects = || scenes.iter().flat_map(|scene| &scene.objects);
            assert_eq!(objects().map(|o| o.shape).collect::<HashSet<_>>(), world.shapes().iter().copied().collect());
            assert_eq!(objects().map(|o| o.color).collect::<HashSet<_>>(), world.colors().iter().copied().collect());
            let rest = world.sizes().len() * world.textures().len() * world.places().len();
            assert_eq!(objects().map(|o| (o.size, o.texture, o.place)).collect::<HashSet<_>>().len(), rest);
        }
    }
}
