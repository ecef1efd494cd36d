//! `ella scenes`: the built-in data set.

use std::path::PathBuf;

use clap::Args;
use ella_dataset::scenes::{ScenesConfig, World, write};

use crate::ui::{DONE, Fail, Meter, Out, bytes};

#[derive(Debug, Args)]
pub(crate) struct Scenes {
    /// Folder that the tars are written to
    #[arg(long, value_name = "DST")]
    out: PathBuf,
    /// How many scenes
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// What may be in them: rich, or mini, which a small network learns to draw and to tell apart
    #[arg(long, value_name = "WORLD", default_value = "rich", value_parser = world)]
    world: World,
    /// What they are drawn from; the same seed gives the same bytes
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Width and height, in pixels
    #[arg(long, default_value_t = 64)]
    size: u32,
    /// Scenes in a tar
    #[arg(long, default_value_t = 1000)]
    per_tar: u64,
}

fn world(name: &str) -> Result<World, String> {
    let found = World::NAMES.iter().find(|(known, _)| *known == name).map(|(_, world)| *world);
    found.ok_or_else(|| format!("no such world; there are {}", World::NAMES.map(|(known, _)| known).join(", ")))
}

impl Scenes {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let Self { count, world, seed, size, per_tar, .. } = *self;
        let config = ScenesConfig { count, world, seed, size, per_tar, ..ScenesConfig::default() };
        let mut meter = Meter::new("scenes", count);
        let made = write(&self.out, &config, &mut |done| meter.at(done, ""))?;
        drop(meter);
        out.result(&made, || {
            format!(
                "{} scenes with {} objects in {} tars ({}): {}",
                made.scenes,
                made.objects,
                made.tars,
                bytes(made.bytes),
                self.out.display()
            )
        });
        Ok(DONE)
    }
}
