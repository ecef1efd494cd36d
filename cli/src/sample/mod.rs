//! `ella sample`: pictures from prompts.

mod draw;
mod grid;

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use draw::{Drawer, Models, Settings};
use ella_model::connector::DEFAULT_HEADS;
use ella_model::sampler::Method;
use ella_model::weights::Weights;
use ella_proto::config::{self, Device as Choice};
use ella_worker::text::TextOptions;
use ella_worker::{device, models};
use grid::{Grid, Picture};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::embed::{Layers, Padding};
use crate::lora::Loras;
use crate::ui::{DONE, Fail, Meter, Out, count};

#[derive(Debug, Args)]
pub(crate) struct Sample {
    /// The trained connector: a safetensors file; its kind is told by the names of its tensors
    #[arg(long, value_name = "FILE")]
    connector: PathBuf,
    /// The diffusion model: a folder (unet/, vae/, scheduler/), or a hub id (org/name, org/name@revision)
    #[arg(long, value_name = "MODEL")]
    base: String,
    #[command(flatten)]
    loras: Loras,
    /// The text encoder: a folder, or a hub id
    #[arg(long, value_name = "MODEL")]
    text: String,
    /// What to draw; may be given more than once
    #[arg(long, num_args = 1.., value_name = "P", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// A file with a prompt on each line
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What not to draw
    #[arg(long, default_value = "", value_name = "N", hide_default_value = true)]
    negative: String,
    /// How to step from noise to picture
    #[arg(long, default_value_t = Method::Ddim, value_parser = method())]
    sampler: Method,
    /// Steps from noise to picture
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// How much the prompt counts beside the negative one; 1 is no guidance
    #[arg(long, default_value_t = 7.5)]
    guidance: f64,
    /// What the first noise is drawn from, and that of each step of euler-a
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width and height, in pixels [default: the base's own]
    #[arg(long, value_name = "PX")]
    size: Option<i64>,
    /// Take the first noise from the tensor `latents` [B, 4, h, w] of this safetensors file
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    latents: Option<PathBuf>,
    /// Longest prompt in tokens, as in training
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_tokens: u32,
    /// Padding rule, as in training
    #[arg(long, value_enum, default_value_t = Padding::Fixed)]
    padding: Padding,
    /// Which of the text encoder's layers are taken, as in training
    #[arg(long, value_enum, default_value_t = Layers::Last)]
    layers: Layers,
    /// The connector's attention heads, which its file does not tell
    #[arg(long, default_value_t = DEFAULT_HEADS)]
    heads: i64,
    /// One PNG of all pictures
    #[arg(long, default_value = "grid.png", value_name = "FILE")]
    out: PathBuf,
    /// A PNG for each picture, in this folder, instead of one of all
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    out_dir: Option<PathBuf>,
}

impl Sample {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let prompts = self.all_prompts()?;
        if !self.guidance.is_finite() {
            return Err(Fail::usage(format_args!("--guidance must be a finite number (found {})", self.guidance)));
        }
        self.check_folder()?;
        let base = models::locate("--base", &self.base)?;
        let text = models::locate("--text", &self.text)?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let device = device::set_up(Choice::Auto, threads)?;
        let settings = Settings { method: self.sampler, steps: self.steps as usize, guidance: self.guidance, seed: self.seed };
        let mut drawer = Drawer::load(&self.models(&base, text), &self.loras.open()?, &settings, device)?;
        let noise = match &self.latents {
            Some(file) => self.given_noise(file, &drawer, prompts.len())?,
            None => drawer.noise(prompts.len(), self.size)?,
        };
        let mut meter = Meter::new("sample", drawer.total_steps(prompts.len()));
        let drawn = drawer.draw(&prompts, &self.negative, &noise, &mut |done| meter.at(done, "steps"))?;
        drop(meter);
        let files = match &self.out_dir {
            None => vec![self.write_grid(&drawn.pictures)?],
            Some(folder) => write_each(folder, &drawn.pictures)?,
        };
        let seeded = self.latents.is_none() || self.sampler.is_random();
        let made = json!({
            "files": files, "prompts": prompts, "width": drawn.pictures[0].width, "height": drawn.pictures[0].height,
            "sampler": self.sampler.to_string(), "steps": self.steps, "guidance": self.guidance,
            "seed": seeded.then_some(self.seed), "truncated": drawn.truncated,
        });
        out.result(&made, || {
            let mut text = format!("{} of {}×{}", count(prompts.len(), "picture"), drawn.pictures[0].width, drawn.pictures[0].height);
            if drawn.truncated > 0 {
                text += &format!(", {} prompts cut at {} tokens", drawn.truncated, self.max_tokens);
            }
            files.iter().fold(text, |text, file| text + &format!("\n{}", file.display()))
        });
        Ok(DONE)
    }

    fn models<'a>(&'a self, base: &'a Path, text: PathBuf) -> Models<'a> {
        let text = TextOptions {
            model: text,
            max_tokens: self.max_tokens as usize,
            padding: self.padding.into(),
            layers: self.layers.into(),
            dtype: config::Dtype::Fp32,
        };
        Models { connector: &self.connector, heads: self.heads, base, text }
    }

    fn all_prompts(&self) -> Result<Vec<String>, Fail> {
        let mut prompts = self.prompt.clone();
        if let Some(file) = &self.prompts {
            let text = std::fs::read_to_string(file).map_err(|error| Fail::io(file, "read", &error))?;
            prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
            if prompts.is_empty() {
                return Err(Fail::failed(format_args!("{}: no prompt is there (expected one on each line)", file.display())));
            }
        }
        Ok(prompts)
    }

    /// Before minutes of work, not after them.
    fn check_folder(&self) -> Result<(), Fail> {
        let file = &self.out;
        match (&self.out_dir, file.parent().filter(|folder| !folder.as_os_str().is_empty())) {
            (Some(folder), _) => std::fs::create_dir_all(folder).map_err(|error| Fail::io(folder, "created", &error)),
            (None, Some(folder)) if !folder.is_dir() => {
                Err(Fail::failed(format_args!("{}: its folder is not there; make it, or name another file with --out", file.display())))
            }
            (None, _) => Ok(()),
        }
    }

    fn given_noise(&self, file: &Path, drawer: &Drawer, prompts: usize) -> Result<Tensor, Fail> {
        let weights = Weights::open(file)?;
        let shape = weights.describe("latents")?.0.to_vec();
        let (count, channels) = (prompts as i64, drawer.channels());
        if !matches!(shape[..], [b, c, h, w] if b == count && c == channels && h > 0 && w > 0) {
            let expected = format!("expected [{count}, {channels}, h, w], a row for each prompt, found {shape:?}");
            return Err(Fail::failed(format_args!("{}: tensor latents has the wrong shape ({expected})", file.display())));
        }
        Ok(weights.load("latents", &shape, Kind::Float, Device::Cpu)?)
    }

    fn write_grid(&self, pictures: &[Picture]) -> Result<PathBuf, Fail> {
        let grid = Grid::of(pictures);
        grid.compose(pictures).save(&self.out)?;
        Ok(self.out.clone())
    }
}

/// Reads a sampler's name; `--help` and errors list them all.
fn method() -> impl TypedValueParser<Value = Method> {
    PossibleValuesParser::new(Method::NAMES.map(|(name, _)| name)).try_map(|name| name.parse::<Method>())
}

fn write_each(folder: &Path, pictures: &[Picture]) -> Result<Vec<PathBuf>, Fail> {
    let write = |(number, picture): (usize, &Picture)| {
        let file = folder.join(format!("{number:04}.png"));
        picture.save(&file).map(|()| file)
    };
    pictures.iter().enumerate().map(write).collect()
}
