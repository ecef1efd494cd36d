//! `ella scenes`: the built-in data set.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Args;
use ella_dataset::scenes::{ScenesConfig, Suite, World, write};
use serde_json::json;

use crate::ui::{DONE, Fail, Meter, Out, bytes};

#[derive(Debug, Args)]
pub(crate) struct Scenes {
    /// Folder that the tars are written to, or the prompts
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
    /// Objects in a scene, as in 1-4 [default: 1-6, of the world mini 1-4]
    #[arg(long, value_name = "A-B", value_parser = range)]
    objects: Option<RangeInclusive<u32>>,
    /// Every N-th scene gets its short caption instead of the dense one; 0: none does
    #[arg(long, value_name = "N", default_value_t = 0)]
    short_every: u64,
    /// Write no pictures, but what ella dpg draws and scores: dense/ and short/ with a prompt for each scene, and their questions in dense.csv and short.csv
    #[arg(long, conflicts_with_all = ["size", "per_tar", "short_every"])]
    prompts: bool,
}

fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |part: &str| part.trim().parse::<u32>().ok();
    let found = number(first).zip(number(last));
    found.map(|(first, last)| first..=last).ok_or_else(|| "expected two numbers, as in 1-4".to_owned())
}

fn world(name: &str) -> Result<World, String> {
    let found = World::NAMES.iter().find(|(known, _)| *known == name).map(|(_, world)| *world);
    found.ok_or_else(|| format!("no such world; there are {}", World::NAMES.map(|(known, _)| known).join(", ")))
}

impl Scenes {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let Self { count, world, seed, size, per_tar, short_every, .. } = *self;
        let objects = self.objects.clone().unwrap_or(1..=world.most_objects());
        if self.prompts {
            Suite::new(world, seed, count, objects).write(&self.out)?;
            out.result(&json!({ "prompts": count, "out": self.out }), || {
                format!("{count} scenes to draw and to ask about: {}", self.out.display())
            });
            return Ok(DONE);
        }
        let config = ScenesConfig { count, world, seed, size, per_tar, objects, short_every };
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
