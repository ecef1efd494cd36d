//! The built-in data set: rendered scenes whose truth is known.
//!
//! [`scene`] draws a scene by lot, [`Scene::render`] shows it, [`Scene::dense_caption`] tells it, [`Scene::truth`] says
//! what is in it, and [`write()`] makes WebDataset tars of any number of them. All is a pure function of the seed and
//! the scene's index: the same seed gives the same bytes, whatever the machine and its number of cores.

mod caption;
mod questions;
mod render;
mod suite;
mod truth;
mod world;
mod write;

use std::ops::RangeInclusive;

pub use questions::{Look, Question, Sight};
pub use suite::{SUITE, Suite, SuiteError, Telling};
pub use world::{Backdrop, Background, Color, Direction, Object, Place, Relation, Scene, Shape, Size, Texture, World};
pub use write::{ScenesConfig, ScenesError, ScenesReport, write};

/// Scene `index` of the rich world's data set of `seed`, with 1 to 6 objects.
pub fn scene(seed: u64, index: u64) -> Scene {
    scene_of(World::Rich, seed, index)
}

/// Scene `index` of a world's data set of `seed`, with 1 to [`World::most_objects`] objects.
pub fn scene_of(world: World, seed: u64, index: u64) -> Scene {
    scene_with(world, seed, index, &(1..=world.most_objects()))
}

/// Scene `index` of a world's data set of `seed`, with so many objects, within 1 to [`World::most_objects`].
pub fn scene_with(world: World, seed: u64, index: u64, objects: &RangeInclusive<u32>) -> Scene {
    Scene::draw(world, seed, index, objects)
}
