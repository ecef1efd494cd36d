//! In a local folder, where killed writers leave half-written files.

use crate::kills::Ground;
use crate::trial::Trial;
use crate::{Size, seed, sources};
use anyhow::{Context as _, Result};
use ella_tests::{Dice, World};

#[test]
fn in_a_folder_nothing_is_lost_or_done_twice() -> Result<()> {
    let (size, seed) = (Size::asked(), seed());
    let world = World::new(8)?;
    let at = |name: &str| world.path(name).display().to_string();
    let samples = sources::write(&world.path("tars"), &size)?;
    let chaos = world.path("chaos");
    let trial = Trial {
        size,
        world: &world,
        tars: at("tars"),
        samples,
        calm: at("calm"),
        chaos: at("chaos"),
        ground: Ground::Folder(&chaos),
        environments: vec![Vec::new(); size.workers],
    };
    trial.run(&mut Dice::new(seed)).with_context(|| format!("ELLA_CHAOS_SEED={seed}"))
}
