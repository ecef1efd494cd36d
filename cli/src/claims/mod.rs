//! `ella claims`: what the paper claims, measured in the miniature: a base that was trained on short captions, connectors trained here, and pictures
//! whose content is known.
//!
//! [`recipe`] says how much of everything; [`lab`] has it done by this very program (`ella scenes`, `prepare`, `embed`, `train`, `dpg`), each under a name of its
//! own below the output folder, so that every number can be traced to its files, and so that a run that was stopped goes on. [`measure`] compares the
//! marks of pictures, [`attention`] looks into the connectors, [`page`] shows all of it.

mod attention;
mod lab;
mod measure;
mod page;
mod pictures;
mod recipe;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use self::lab::Lab;
use self::measure::{Compared, Marked};
use self::recipe::{Kind, Recipe};
use crate::ui::{DONE, Fail, Out, span};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Claims {
    /// The miniature's folder, with base/, text/, detector/ and lora/
    #[arg(long, value_name = "DIR", default_value = "mini")]
    mini: PathBuf,
    /// Folder that everything is made in: data, runs, pictures, answers, claims.json and report.html
    #[arg(long, value_name = "DIR", default_value = "claims")]
    out: PathBuf,
    /// One kind, one seed, fewer scenes and pictures: sooner done, and with wider intervals
    #[arg(long)]
    quick: bool,
    /// Updates of each training, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    steps: Option<u64>,
    /// Scenes to train on, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(128..=10_000_000))]
    scenes: Option<u64>,
    /// Kinds of connectors that are compared, instead of the recipe's; tsc is always among them
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Prompts of each kind, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=100_000))]
    prompts: Option<u64>,
}

/// All that was measured.
#[derive(Debug, serde::Serialize)]
struct Findings {
    recipe: Recipe,
    /// What the parts that ended took, in however many starts.
    seconds: f64,
    /// Of the detector, in each style.
    detector: serde_json::Value,
    /// (a): the marks of the base and of its connectors, by what is counted, and by the number of objects.
    dense: Vec<Compared>,
    /// (b): every kind's marks, by what is counted.
    kinds: Vec<(Kind, BTreeMap<String, measure::Spread>)>,
    /// (c).
    attention: attention::Map,
    /// (d).
    lora: Option<Lora>,
    /// (e): as (a), of short prompts.
    short: Vec<Compared>,
    /// The last held-out loss of every training.
    losses: BTreeMap<String, Option<f64>>,
}

/// What a LoRA does to pictures, and what it does not.
#[derive(Debug, serde::Serialize)]
struct Lora {
    /// The share of pictures on its mint background: base, base with it, connector, connector with it.
    mint: [f64; 4],
    /// The marks of connectors with it, compared with the same without.
    marks: Vec<Compared>,
}

impl Claims {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let mut recipe = if self.quick { Recipe::quick() } else { Recipe::full() };
        for (own, given) in [(&mut recipe.steps, self.steps), (&mut recipe.scenes, self.scenes), (&mut recipe.prompts, self.prompts)] {
            *own = given.unwrap_or(*own);
        }
        if !self.kinds.is_empty() {
            recipe.kinds = Kind::ALL.into_iter().filter(|kind| *kind == Kind::Tsc || self.kinds.contains(kind)).collect();
        }
        let lab = Lab::open(&self.mini, &self.out, recipe)?;
        let findings = findings(&lab)?;
        let value = json!(findings);
        whole::write(&lab.at("claims.json"), format!("{value:#}\n").as_bytes())?;
        let report = lab.at("report.html");
        whole::write(&report, page::html(&lab, &findings)?.as_bytes())?;
        out.result(&value, || format!("{}report: {}", summary(&findings), report.display()));
        Ok(DONE)
    }
}

fn findings(lab: &Lab) -> Result<Findings, Fail> {
    let recipe = lab.recipe.clone();
    lab.prepare()?;
    let mut losses = BTreeMap::new();
    // The last kind first: what everything but the ablation is about.
    for kind in recipe.kinds.iter().rev() {
        for seed in &recipe.seeds {
            let name = kind.run(*seed);
            losses.insert(name, lab.train(*kind, *seed)?);
        }
    }
    let bases: Vec<Marked> = recipe.seeds.iter().map(|seed| lab.drawn_by_base(*seed, None)).collect::<Result<_, _>>()?;
    let mut by_kind = Vec::new();
    for kind in &recipe.kinds {
        let marks = recipe.seeds.iter().map(|seed| lab.drawn(*kind, *seed, None)).collect::<Result<Vec<_>, Fail>>()?;
        by_kind.push((*kind, marks));
    }
    let of = |kind: Kind| by_kind.iter().find(|(known, _)| *known == kind).map(|(_, marks)| marks.as_slice()).unwrap_or_default();
    let connectors = of(Kind::Tsc);
    let lora = lab.lora().map(|file| lora(lab, &file, connectors)).transpose()?;
    Ok(Findings {
        dense: measure::compare(&bases, connectors, |marked| &marked.dense),
        short: measure::compare(&bases, connectors, |marked| &marked.short),
        kinds: by_kind.iter().map(|(kind, marks)| (*kind, measure::spreads(marks))).collect(),
        attention: attention::map(lab)?,
        detector: lab.detector()?,
        lora,
        losses,
        recipe,
        seconds: lab.all_seconds(),
    })
}

fn lora(lab: &Lab, file: &std::path::Path, connectors: &[Marked]) -> Result<Lora, Fail> {
    let seeds = &lab.recipe.seeds;
    let with = seeds.iter().map(|seed| lab.drawn(Kind::Tsc, *seed, Some(file))).collect::<Result<Vec<_>, Fail>>()?;
    lab.drawn_by_base(seeds[0], Some(file))?;
    let first = Kind::Tsc.run(seeds[0]);
    let base = recipe::base_run(seeds[0]);
    let names = [base.clone(), recipe::with_lora(&base), first.clone(), recipe::with_lora(&first)];
    let [a, b, c, d] = names.map(|name| pictures::on_mint(&lab.at(&format!("drawn/{name}/dense"))));
    Ok(Lora { mint: [a?, b?, c?, d?], marks: measure::compare(connectors, &with, |marked| &marked.dense) })
}

fn summary(findings: &Findings) -> String {
    let mut text = String::new();
    for (title, compared) in [("dense prompts", &findings.dense), ("short prompts", &findings.short)] {
        text += &format!("{title}: per cent of questions right, base and connector, difference with its 95 % interval\n");
        for Compared { name, before, after, difference, interval } in compared {
            text += &format!("{name:>12} {before:7.1} {after:7.1}  {difference:+6.1} [{:+.1}, {:+.1}]\n", interval[0], interval[1]);
        }
    }
    text + &format!("{} in all\n", span(findings.seconds))
}
