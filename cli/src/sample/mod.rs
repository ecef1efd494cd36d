//! `ella sample`: pictures from prompts.

mod draw;
mod grid;
mod label;
mod plan;
mod result;

use std::path::{Path, PathBuf};

use clap::Args;
use draw::{Settings, Studio};
use ella_model::base::Base;
use ella_model::connector::Connector;
use ella_model::part::Part;
use ella_model::text::TextConfig;
use ella_model::unet::UNetConfig;
use ella_proto::config::Size;
use ella_worker::draw::{self as drawing, BaseText, Noise, Script, check_fit};
use ella_worker::gpu::fault::{Fault, first_line};
use ella_worker::text::{TextEncoder, TextOptions};
use ella_worker::trained::{Reads, Trained};
use ella_worker::{device, models};
use plan::{Plan, Seeds};
use result::Drawn;
use tch::Kind;

use crate::lora::Loras;
use crate::sampling::{HowDrawn, HowRead};
use crate::ui::{DONE, Fail, Meter, Out, note};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Sample {
    /// The trained connector: a safetensors file, or org/name/file.safetensors on the hub; its kind is told by the names of its tensors
    #[arg(long, value_name = "FILE")]
    connector: String,
    /// The diffusion model: a folder (unet/, vae/, scheduler/, and for its own CLIP text_encoder/ and tokenizer/), a single-file checkpoint
    /// (for its own CLIP with tokenizer/ beside it), or a hub id (org/name, org/name@revision)
    #[arg(long, value_name = "MODEL")]
    base: String,
    #[command(flatten)]
    loras: Loras,
    /// The text encoder: a folder, or a hub id
    #[arg(long, value_name = "MODEL")]
    text: String,

    /// What to draw; may be given more than once
    #[arg(long, num_args = 1.., value_name = "P", required_unless_present = "prompts", help_heading = "What to draw")]
    prompt: Vec<String>,
    /// A file with a prompt on each line
    #[arg(long, value_name = "FILE", help_heading = "What to draw")]
    prompts: Option<PathBuf>,
    /// What not to draw [default: the empty text]
    #[arg(long, value_name = "N", help_heading = "What to draw")]
    negative: Option<String>,
    /// Pictures of each prompt [default: 1, or as many as --seeds has for each]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "What to draw")]
    images: Option<u32>,
    /// Seed of each prompt's first picture; its next ones count up. All of a picture's noise depends on its seed only
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "What to draw")]
    seed: u64,
    /// A seed for each picture, prompt by prompt
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', conflicts_with = "seed", help_heading = "What to draw")]
    seeds: Vec<u64>,
    /// Width and height in pixels, such as 768x512; one number for a square. Multiples of the VAE's 8 [default: the base's own]
    #[arg(long, value_name = "WxH", help_heading = "What to draw")]
    size: Option<Size>,
    /// Take the first noise from the tensor `latents` [pictures, 4, h, w] of this safetensors file
    #[arg(long, value_name = "FILE", conflicts_with = "size", help_heading = "What to draw")]
    latents: Option<PathBuf>,

    #[command(flatten)]
    read: HowRead,
    /// --with-clip, with this text for CLIP instead of each prompt
    #[arg(long, value_name = "P", help_heading = "How texts are read")]
    clip_prompt: Option<String>,

    #[command(flatten)]
    how: HowDrawn,

    /// Beside each picture, what the base draws by its own CLIP from the same noise: columns CLIP and ELLA
    #[arg(long, help_heading = "What is written")]
    compare: bool,
    /// One PNG of all pictures
    #[arg(long, default_value = "grid.png", value_name = "FILE", help_heading = "What is written")]
    out: PathBuf,
    /// A PNG for each picture, in this folder, instead of one of all
    #[arg(long, value_name = "DIR", conflicts_with = "out", help_heading = "What is written")]
    out_dir: Option<PathBuf>,
}

/// Of a failed device what to do, and not libtorch's stack.
fn of_device(fail: Fail) -> Fail {
    let hint = match Fault::of(&fail.message) {
        None => return fail,
        Some(Fault::OutOfMemory) => {
            "use a smaller --batch or --size, --dtype fp16 or bf16, or for very long prompts a smaller --max-tokens"
        }
        Some(fault) => fault.hint(),
    };
    Fail { message: format!("{}: {hint}", first_line(&fail.message)), ..fail }
}

impl Sample {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        self.draw(out).map_err(of_device)
    }

    fn draw(&self, out: Out) -> Result<u8, Fail> {
        if !self.how.guidance.is_finite() {
            return Err(Fail::usage(format_args!("--guidance must be a finite number (found {})", self.how.guidance)));
        }
        if self.out_dir.is_none() && !self.out.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png")) {
            return Err(Fail::usage(format_args!("--out {}: the ending must be .png", self.out.display())));
        }
        let seeds = if self.seeds.is_empty() { Seeds::From(self.seed) } else { Seeds::Each(&self.seeds) };
        let plan = Plan::new(&self.all_prompts()?, self.images.map(|n| n as usize), &seeds)?;
        self.check_folder()?;
        let base = Base::open(&models::locate("--base", &self.base)?)?.predicting(self.how.prediction);
        let text = models::locate("--text", &self.text)?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let place = (device::kind(self.how.dtype.into()), device::set_up(self.how.device.into(), threads)?);
        let noise = match &self.latents {
            Some(file) => Noise::given(&base, file, plan.shots.len()),
            None => Noise::seeded(&base, self.size),
        };
        let noise = noise?;
        let loras = self.loras.open()?;
        let connector = Connector::open(&models::locate("--connector", &self.connector)?)?;
        // Told of the file as it is read: a run may delete it meanwhile.
        let (file, digest, trained) = (connector.path().to_owned(), connector.digest(), Trained::told(&connector)?);
        let connector = Connector::from_weights(connector, self.how.heads.map(i64::from), Kind::Float, place.1)?;
        let takes = TextConfig::load(&text)?;
        check_fit((&file, connector.config()), (&base, &UNetConfig::read(base.unet_part()?.config)?), (&text, &takes))?;
        let reads = self.reads(&trained, &file, (&text, &takes))?;
        let (ella, clip) = self.scripts(&plan, (&base, &text), reads, place)?;
        let how = drawing::Settings { method: self.how.sampler, steps: self.how.steps as usize, guidance: self.how.guidance };
        let settings = Settings { how, batch: self.how.batch as usize };
        let mut studio = Studio::load((&base, &loras), connector, &settings, place)?;
        let scripts = [clip.as_ref(), Some(&ella)];
        let columns = scripts.iter().flatten().count() as u64;
        let mut meter = Meter::new("sample", columns * studio.total_steps(plan.shots.len()));
        let mut done = 0;
        let mut step = || {
            done += 1;
            meter.at(done, "steps");
        };
        let mut pictures = |script: &Script| studio.draw(&plan.shots, script, &noise, &mut step);
        let compared = clip.as_ref().map(&mut pictures).transpose()?;
        let drawn = Drawn { ella: pictures(&ella)?, clip: compared };
        drop(meter);
        self.write((&plan, digest, reads), &drawn, (&ella, clip.as_ref()), out)?;
        Ok(DONE)
    }

    /// How texts are read before a connector that was trained so. Warns of what is asked for otherwise.
    fn reads(&self, trained: &Trained, file: &Path, (model, takes): (&Path, &TextConfig)) -> Result<Reads, Fail> {
        // Whoever has nothing to compare it with need not read all of the text encoder's bytes.
        let text = trained.text.as_ref().map(|_| Part::open(model).map(|part| part.fingerprint())).transpose()?;
        let asked = Trained { text, ..self.read.asked() };
        for told in trained.differences(&asked, &self.text) {
            note(format_args!("WARNING: {} {told}", file.display()));
        }
        Ok(trained.reads(&asked, self.read.negative_padding.map(Into::into), takes.max_positions(), self.how.dtype.into()))
    }

    /// What all texts tell through the connector, and for a comparison what they tell the base by its own CLIP. What encodes them is gone
    /// before the pictures are drawn.
    fn scripts(
        &self,
        plan: &Plan,
        (base, model): (&Base, &Path),
        Reads { prompt, negative, layers, dtype }: Reads,
        (kind, device): (Kind, tch::Device),
    ) -> Result<(Script, Option<Script>), Fail> {
        let options = TextOptions { model: model.to_owned(), max_tokens: prompt.most, padding: prompt.padding, layers, dtype };
        let encoder = TextEncoder::load(&options, device)?;
        let none = self.negative.as_deref().unwrap_or_default();
        let mut ella = Script::features(&encoder, (&plan.texts, prompt), (none, negative))?;
        drop(encoder);

        let hybrid = self.read.with_clip || self.clip_prompt.is_some();
        if !(hybrid || self.compare) {
            return Ok((ella, None));
        }
        let own = BaseText::load(base, &UNetConfig::read(base.unet_part()?.config)?, (kind, device))?;
        let tell = |texts: &[String]| Script::clip(&own, texts, self.negative.as_deref());
        if hybrid {
            let texts = self.clip_prompt.as_ref().map_or(plan.texts.clone(), |text| vec![text.clone(); plan.texts.len()]);
            ella = ella.with_clip(tell(&texts)?);
        }
        Ok((ella, if self.compare { Some(tell(&plan.texts)?) } else { None }))
    }

    fn all_prompts(&self) -> Result<Vec<String>, Fail> {
        let mut prompts = self.prompt.clone();
        if let Some(file) = &self.prompts {
            let text = std::fs::read_to_string(file).map_err(|error| Fail::io(file, "read", &error))?;
            // Editors of Windows put a mark before the first line.
            let text = text.trim_start_matches('\u{feff}');
            prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
            if prompts.is_empty() {
                return Err(Fail::lasting(format_args!("{}: no prompt is there (expected one on each line)", file.display())));
            }
        }
        Ok(prompts)
    }

    /// Before minutes of work, not after them.
    fn check_folder(&self) -> Result<(), Fail> {
        let file = &self.out;
        match (&self.out_dir, file.parent().filter(|folder| !folder.as_os_str().is_empty())) {
            (Some(folder), _) => {
                std::fs::create_dir_all(folder).map_err(|error| Fail::io(folder, "created", &error))?;
                whole::partial(&folder.join("0000.png")).map(drop)
            }
            (None, _) if file.is_dir() => {
                Err(Fail::lasting(format_args!("{}: is a folder; name a file, or give the folder as --out-dir", file.display())))
            }
            (None, Some(folder)) if !folder.is_dir() => {
                Err(Fail::lasting(format_args!("{}: its folder is not there; make it, or name another file with --out", file.display())))
            }
            // A link's file is written where it lies; a pipe takes the bytes as they come.
            (None, _) if file.exists() && !file.is_file() => Ok(()),
            (None, _) => whole::partial(&std::fs::canonicalize(file).unwrap_or_else(|_| file.clone())).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_full_memory_it_is_said_what_to_do_and_no_stack() {
        let said =
            "libtorch: Internal torch error: CUDA out of memory. Tried to allocate 2.50 GiB.\nException raised from malloc at x.cpp:1";
        let fail = of_device(Fail::failed(said));
        assert!(fail.message.contains("2.50 GiB.: use a smaller --batch") && !fail.message.contains("Exception"), "{}", fail.message);
        assert_eq!(of_device(Fail::lasting("x: not found\ny")).message, "x: not found\ny");
    }
}
