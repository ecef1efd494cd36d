//! What becomes of the pictures: files, each saying how it was made, and a result for people and scripts.

use std::path::{Path, PathBuf};

use ella_worker::draw::{Made, Picture, Reader, Script, Shot};
use ella_worker::trained::Reads;
use serde_json::json;

use super::Sample;
use super::grid::{comparison, grid};
use super::plan::Plan;
use crate::ui::{Fail, Out, count};
use crate::whole;

/// The names of a comparison's columns.
const COLUMNS: [&str; 2] = ["CLIP", "ELLA"];

/// The pictures, in the order of the plan's shots.
#[derive(Debug)]
pub(super) struct Drawn {
    /// Through the connector.
    pub(super) ella: Vec<Picture>,
    /// By the base's own CLIP, for a comparison.
    pub(super) clip: Option<Vec<Picture>>,
}

impl Sample {
    /// Writes the files and gives the result. `connector` is the BLAKE3 of its file, before which texts are read so.
    pub(super) fn write(
        &self,
        (plan, connector, reads): (&Plan, String, Reads),
        drawn: &Drawn,
        (ella, clip): (&Script, Option<&Script>),
        out: Out,
    ) -> Result<(), Fail> {
        let made = Files { sample: self, plan, connector, reads };
        let files = match &self.out_dir {
            None => vec![made.one(drawn, &self.out)?],
            Some(folder) => made.each(drawn, folder)?,
        };
        let (width, height) = drawn.ella.first().map_or((0, 0), |picture| (picture.width, picture.height));
        let seeded = self.latents.is_none() || self.how.sampler.is_random();
        let result = json!({
            "files": files, "pictures": plan.json(seeded), "width": width, "height": height, "negative": self.negative,
            "sampler": self.how.sampler.to_string(), "steps": self.how.steps, "guidance": self.how.guidance, "connector": made.connector, "loras": self.loras.named().collect::<Vec<_>>(),
            "truncated": ella.cut, "negative_truncated": ella.negative_cut,
            "compare": clip.map(|clip| json!({
                "columns": COLUMNS, "max_tokens": clip.most, "truncated": clip.cut, "negative_truncated": clip.negative_cut,
            })),
        });
        out.result(&result, || {
            let mut text = format!("{} of {width}×{height}", count(plan.shots.len(), "picture"));
            for (whose, script) in [("the text encoder", Some(ella)), ("CLIP", clip)] {
                text += &script.map_or(String::new(), |script| shortened(whose, script));
            }
            files.iter().fold(text, |text, file| text + &format!("\n{}", file.display()))
        });
        Ok(())
    }
}

/// What people are told of texts that were too long.
fn shortened(whose: &str, script: &Script) -> String {
    let (total, most) = (count(script.prompts.len(), "prompt"), script.most);
    let prompts = if script.cut > 0 { format!("\n{} of {total} cut at {whose}'s {most} tokens", script.cut) } else { String::new() };
    let negative = if script.negative_cut { format!("\nthe negative prompt cut at {whose}'s {most} tokens") } else { String::new() };
    prompts + &negative
}

/// What the pictures were made of.
struct Files<'a> {
    sample: &'a Sample,
    plan: &'a Plan,
    /// BLAKE3 of the connector's file.
    connector: String,
    reads: Reads,
}

impl Files<'_> {
    /// One file of all.
    fn one(&self, drawn: &Drawn, file: &Path) -> Result<PathBuf, Fail> {
        let sheet = match &drawn.clip {
            None => grid(&drawn.ella),
            Some(clip) => {
                let prompts: Vec<&str> = self.plan.shots.iter().map(|shot| self.plan.texts[shot.text].as_str()).collect();
                comparison(&[(COLUMNS[0], clip), (COLUMNS[1], &drawn.ella)], &prompts)
            }
        };
        let all: Vec<String> = self.plan.shots.iter().map(|shot| self.parameters(shot, true)).collect();
        save(&sheet, file, &all.join("\n\n"))?;
        Ok(file.to_owned())
    }

    /// A file for each.
    fn each(&self, drawn: &Drawn, folder: &Path) -> Result<Vec<PathBuf>, Fail> {
        let mut files = Vec::new();
        let mut write = |name: String, picture: &Picture, parameters: &str| {
            let file = folder.join(name);
            save(picture, &file, parameters).map(|()| files.push(file))
        };
        for (number, (shot, ella)) in self.plan.shots.iter().zip(&drawn.ella).enumerate() {
            match drawn.clip.as_ref().and_then(|clip| clip.get(number)) {
                None => write(format!("{number:04}.png"), ella, &self.parameters(shot, true))?,
                Some(clip) => {
                    write(format!("{number:04}-clip.png"), clip, &self.parameters(shot, false))?;
                    write(format!("{number:04}-ella.png"), ella, &self.parameters(shot, true))?;
                }
            }
        }
        Ok(files)
    }

    /// How a picture was made.
    fn parameters(&self, shot: &Shot, by_ella: bool) -> String {
        let s = self.sample;
        let connector = || match &s.clip_prompt {
            Some(prompt) => format!("{}, CLIP prompt: {prompt:?}", self.connector),
            None if s.read.with_clip => format!("{}, CLIP: prompt", self.connector),
            None => self.connector.clone(),
        };
        let (layers, padding) = (self.reads.layers, self.reads.prompt.padding);
        let reader = || Reader { text: &s.text, layers, padding, connector: connector() };
        let made = Made {
            prompt: &self.plan.texts[shot.text],
            negative: s.negative.as_deref(),
            steps: s.how.steps,
            sampler: s.how.sampler,
            guidance: s.how.guidance,
            seed: shot.seed,
            noise: s.latents.as_ref().map(|file| file.display().to_string()),
            base: &s.base,
            loras: s.loras.named().collect(),
            by: by_ella.then(reader),
        };
        made.to_string()
    }
}

/// Writes a PNG that says how it was made.
fn save(picture: &Picture, file: &Path, parameters: &str) -> Result<(), Fail> {
    let bytes = picture.png(parameters);
    let bytes = bytes.map_err(|error| Fail::failed(format_args!("{}: cannot be encoded ({error})", file.display())))?;
    whole::write(file, &bytes).map(drop)
}
