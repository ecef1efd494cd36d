//! A calm run, then the same job under kills: prepare, then embed.

use crate::Size;
use crate::check::{Tree, accounted, counted, once, same, tree};
use crate::cluster::{Cluster, Environment, logs};
use crate::kills::{Ground, Harassed, draw};
use crate::sources::PIXELS;
use anyhow::{Context as _, Result, ensure};
use ella_tests::{Dice, World, ella};
use std::path::PathBuf;

/// Width and height of prepared pictures.
const RESOLUTION: &str = "384";

/// Where a trial takes place.
pub(crate) struct Trial<'a> {
    pub(crate) size: Size,
    pub(crate) world: &'a World,
    /// Where the tars are: a path or URL.
    pub(crate) tars: String,
    /// Samples in them that are no duplicates.
    pub(crate) samples: u64,
    /// Where the calm run's data set goes, and the other.
    pub(crate) calm: String,
    pub(crate) chaos: String,
    pub(crate) ground: Ground<'a>,
    /// Of each worker.
    pub(crate) environments: Vec<Environment>,
}

impl Trial<'_> {
    /// Prepares and embeds, and checks what came out.
    pub(crate) fn run(&self, dice: &mut Dice) -> Result<()> {
        let [prepare, embed] = [Self::prepare, Self::embed];
        let mut before = Tree::new();
        for (name, arguments, kills) in [("prepare", prepare, self.size.kills[0]), ("embed", embed, self.size.kills[1])] {
            ella(&arguments(self, &self.calm, None))?;
            let calm = tree(&self.calm)?;
            accounted(&calm, self.samples).context("the calm run")?;
            self.harass(name, &arguments(self, &self.chaos, Some(self.job(name))), kills, calm.len() - before.len(), dice)
                .with_context(|| format!("{name} under kills"))?;
            let chaos = tree(&self.chaos)?;
            same(&calm, &chaos).with_context(|| format!("after {name}"))?;
            accounted(&chaos, self.samples)?;
            before = calm;
        }
        ella(&["verify", &self.chaos])?;
        Ok(())
    }

    fn harass(&self, name: &str, write_job: &[String], kills: usize, objects: usize, dice: &mut Dice) -> Result<()> {
        ella(write_job)?;
        let folder = self.world.path(&format!("{name}-logs"));
        let before = self.ground.made();
        let faults = if let Ground::Server(proxy) = self.ground { proxy.faults() } else { Default::default() };
        let drawn = draw(kills, objects, self.ground, dice);
        let cluster = Cluster::start(&self.job(name), &folder, &self.environments)?;
        let (mut report, said) = Harassed::new(cluster, self.ground, before, dice.split()).run(&drawn)?;
        report.add(&said, &logs(&folder)?);
        if let Ground::Server(proxy) = self.ground {
            report.add_faults(proxy, &faults);
            once(&proxy.seen())?;
        }
        println!("{name}, {} tars, {} workers: {report}", self.size.tars, self.size.workers);
        ensure!(report.workers_killed() == kills, "{} kills of {kills}", report.workers_killed());
        counted(&said)
    }

    fn job(&self, name: &str) -> PathBuf {
        self.world.path(&format!("{name}.toml"))
    }

    fn prepare(&self, out: &str, job: Option<PathBuf>) -> Vec<String> {
        // Enlarged, and in the slower format: a part then takes a moment, which a kill can hit, and its shard is large enough for a tree.
        let slow = ["--resolution", RESOLUTION, "--min-edge", PIXELS, "--format", "webp"];
        let fixed = ["prepare", &self.tars, "--out", out, "--key-prefix", "--threads", "1"];
        with_job(&[&fixed[..], &slow].concat(), job)
    }

    fn embed(&self, data: &str, job: Option<PathBuf>) -> Vec<String> {
        let text = self.world.path("models/text").display().to_string();
        with_job(&["embed", data, "--text", &text, "--max-tokens", "64", "--batch", "1"], job)
    }
}

fn with_job(fixed: &[&str], job: Option<PathBuf>) -> Vec<String> {
    let job = job.map(|file| ["--write-job".to_owned(), file.display().to_string()]);
    fixed.iter().map(|s| (*s).to_owned()).chain(job.into_iter().flatten()).collect()
}
