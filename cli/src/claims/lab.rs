//! What is made for the claims, by this very program: each part under a name of its own in the output folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use ella_dataset::scenes::{Suite, Telling};
use ella_model::unet::UNetConfig;
use serde_json::Value;

use super::measure::{Marked, Prompt};
use super::recipe::{Kind, Recipe, base_run, with_lora};
use crate::dpg::{Marks, bad, marks};
use crate::ui::{Fail, note, span};
use crate::whole;

/// What training scenes and the scenes of prompts are drawn from. The miniature learnt from others.
const TRAINING_SEED: u64 = 11;
const PROMPTS_SEED: u64 = 2024;

/// Of so many training scenes, one has its short caption.
const SHORT_EVERY: u64 = 6;

/// The longest caption in tokens.
const MAX_TOKENS: u32 = 96;

/// The connectors' queries.
const LATENTS: u32 = 16;

/// What each part took, of all starts of the command.
const SECONDS: &str = "logs/seconds.json";

pub(super) struct Lab {
    pub(super) recipe: Recipe,
    mini: PathBuf,
    out: PathBuf,
    program: PathBuf,
}

impl Lab {
    pub(super) fn open(mini: &Path, out: &Path, recipe: Recipe) -> Result<Self, Fail> {
        let program =
            std::env::current_exe().map_err(|error| Fail::failed(format_args!("the folder of this program is unknown ({error})")))?;
        // What a miniature without its parts would be noticed by only after minutes.
        UNetConfig::load(&mini.join("base/unet")).map_err(|error| {
            let fail = Fail::from(error);
            Fail { message: format!("--mini {}: {}", mini.display(), fail.message), ..fail }
        })?;
        let lab = Self { recipe, mini: mini.into(), out: out.into(), program };
        for folder in ["logs", "runs", "drawn", "answers"] {
            fs::create_dir_all(lab.at(folder)).map_err(|error| Fail::io(lab.at(folder), "made", &error))?;
        }
        lab.is_ours()?;
        Ok(lab)
    }

    /// Numbers of one recipe must not be mixed with those of another.
    fn is_ours(&self) -> Result<(), Fail> {
        let (path, own) = (self.at("recipe.json"), serde_json::json!(self.recipe).to_string());
        match fs::read_to_string(&path) {
            Ok(before) if before != own => {
                Err(Fail::usage(format_args!("{}: holds claims of another recipe; choose another --out, or remove it", self.out.display())))
            }
            Ok(_) => Ok(()),
            Err(_) => whole::write(&path, own.as_bytes()).map(drop),
        }
    }

    /// In the output folder.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// Of the miniature.
    pub(super) fn mini(&self, name: &str) -> PathBuf {
        self.mini.join(name)
    }

    /// The LoRA that comes with the miniature.
    pub(super) fn lora(&self) -> Option<PathBuf> {
        Some(self.mini("lora/mint.safetensors")).filter(|file| file.is_file())
    }

    pub(super) fn max_tokens() -> usize {
        MAX_TOKENS as usize
    }

    /// Scenes, their data set and features, and the prompts.
    pub(super) fn prepare(&self) -> Result<(), Fail> {
        let (count, prompts) = (self.recipe.scenes.to_string(), self.recipe.prompts.to_string());
        let (scenes, data, suite) = (self.path("scenes"), self.path("data"), self.path("suite"));
        let (training, asked) = (TRAINING_SEED.to_string(), PROMPTS_SEED.to_string());
        let (every, base, text, tokens) =
            (SHORT_EVERY.to_string(), text(&self.mini("base")), text(&self.mini("text")), MAX_TOKENS.to_string());
        if !self.at("data/manifest.json").is_file() {
            let of = ["--world", "mini", "--size", "64", "--seed", &training, "--count", &count, "--short-every", &every];
            self.ella("scenes", &[&["scenes", "--out", &scenes][..], &of].concat())?;
            let how = ["--resolution", "64", "--min-edge", "64", "--latents", &base];
            self.ella("prepare", &[&["prepare", &scenes, "--out", &data][..], &how].concat())?;
        }
        let paddings: BTreeSet<_> = self.recipe.kinds.iter().map(|kind| kind.padding()).collect();
        for padding in paddings {
            let name = format!("embed-{padding}");
            self.ella(&name, &["embed", &data, "--text", &text, "--max-tokens", &tokens, "--padding", padding])?;
        }
        let of = ["--world", "mini", "--seed", &asked, "--count", &prompts];
        self.ella("prompts", &[&["scenes", "--prompts", "--out", &suite][..], &of].concat()).map(drop)
    }

    /// Trains a connector, or goes on with it; its last held-out loss.
    pub(super) fn train(&self, kind: Kind, seed: u64) -> Result<Option<f64>, Fail> {
        let (name, padding, (kind, layers)) = (kind.run(seed), kind.padding(), kind.settings());
        let (run, config) = (self.path(&format!("runs/{name}")), self.at(&format!("runs/{name}.toml")));
        let Recipe { steps, batch, lr, .. } = self.recipe;
        let micro = batch / 2;
        let text = format!(
            "[run]\noutput = {run:?}\nseed = {seed}\n\n[base]\nmodel = {base:?}\n\n[text]\nmodel = {text:?}\nmax_tokens = {MAX_TOKENS}\npadding = {padding:?}\n\n\
             [data]\npath = {data:?}\n\n[connector]\nkind = {kind:?}\nlayers = {layers}\nlatents = {LATENTS}\n\n\
             [train]\nsteps = {steps}\nglobal_batch = {batch}\nmicro_batch = {micro}\neval_every = {eval}\neval_samples = 128\nema_decay = 0.99\n\n\
             [train.optimizer]\nlr = {lr:e}\nbetas = [0.9, 0.99]\n\n[train.schedule]\nkind = \"cosine\"\nwarmup = 30\n\n[checkpoint]\nevery = 200\nkeep = 1\n\n\
             [workers]\ncount = 2\ndevice = \"cpu\"\n",
            base = text(&self.mini("base")),
            text = text(&self.mini("text")),
            data = self.path("data"),
            eval = (steps / 12).max(1),
        );
        whole::write(&config, text.as_bytes())?;
        self.ella(&name, &["train", &config.display().to_string()])?;
        let file = self.at(&format!("runs/{name}.safetensors"));
        self.ella(&format!("{name}-export"), &["export", &run, "--out", &file.display().to_string()])?;
        let status = self.ella(&format!("{name}-status"), &["status", &run])?;
        Ok(status["held_out_loss"].as_f64())
    }

    /// The connector that a training gave.
    pub(super) fn connector(&self, kind: Kind, seed: u64) -> PathBuf {
        self.at(&format!("runs/{}.safetensors", kind.run(seed)))
    }

    /// What a connector's pictures got.
    pub(super) fn drawn(&self, kind: Kind, seed: u64, lora: Option<&Path>) -> Result<Marked, Fail> {
        let (file, model) = (text(&self.connector(kind, seed)), text(&self.mini("text")));
        self.marked(&kind.run(seed), seed, &["--connector", &file, "--text", &model], lora)
    }

    /// What the base's own pictures got.
    pub(super) fn drawn_by_base(&self, seed: u64, lora: Option<&Path>) -> Result<Marked, Fail> {
        self.marked(&base_run(seed), seed, &["--only-clip"], lora)
    }

    fn marked(&self, run: &str, seed: u64, with: &[&str], lora: Option<&Path>) -> Result<Marked, Fail> {
        let name = if lora.is_some() { with_lora(run) } else { run.to_owned() };
        let of = |telling: Telling| {
            let (told, label) = (telling.name(), format!("{name}-{}", telling.name()));
            let (prompts, images) = (self.path(&format!("suite/{told}")), self.path(&format!("drawn/{name}/{told}")));
            let (answers, csv) = (self.at(&format!("answers/{label}.jsonl")), self.at(&format!("suite/{told}.csv")));
            let (base, seed, steps, guidance) =
                (text(&self.mini("base")), seed.to_string(), self.recipe.sampling_steps.to_string(), self.recipe.guidance.to_string());
            let how = ["--base", &base, "--seed", &seed, "--steps", &steps, "--guidance", &guidance, "--batch", "64", "--workers", "2"];
            let mut generate = [&["dpg", "generate", "--prompts", &prompts, "--out", &images][..], &how, with].concat();
            let file = lora.map(text);
            generate.extend(file.iter().flat_map(|file| ["--lora", file]));
            self.ella(&format!("{label}-generate"), &generate)?;
            let (detector, suite, out) = (text(&self.mini("detector")), self.path("suite"), text(&answers));
            let look = ["dpg", "look", "--suite", &suite, "--prompts", told, "--images", &images, "--detector", &detector, "--out", &out];
            let name = format!("{label}-look");
            // The detector is tried once.
            let tried: &[&str] = if name == self.tells_of_detector() { &[] } else { &["--tried", "0"] };
            self.ella(&name, &[&look[..], tried].concat())?;
            self.counted(marks(&csv, &answers)?)
        };
        Ok(Marked { dense: of(Telling::Dense)?, short: of(Telling::Short)? })
    }

    /// Marks, each with the number of its scene's objects.
    fn counted(&self, marks: Vec<Marks>) -> Result<Vec<Prompt>, Fail> {
        let suite = Suite::read(&self.at("suite")).map_err(bad)?;
        let objects: HashMap<String, u64> = suite.scenes().map(|(key, scene)| (key, scene.objects.len() as u64)).collect();
        Ok(marks.into_iter().map(|marks| Prompt { objects: objects.get(&marks.item).copied().unwrap_or(0), marks }).collect())
    }

    /// Of the parts that have the detector look, the one that tries it too.
    fn tells_of_detector(&self) -> String {
        format!("{}-dense-look", base_run(self.recipe.seeds[0]))
    }

    /// How far the detector can be trusted, as it was found when it looked.
    pub(super) fn detector(&self) -> Result<Value, Fail> {
        let path = self.at(&format!("logs/{}.json", self.tells_of_detector()));
        let text = fs::read(&path).map_err(|error| Fail::io(&path, "read", &error))?;
        let value: Value = serde_json::from_slice(&text).map_err(|error| Fail::failed(format_args!("{}: {error}", path.display())))?;
        Ok(value["accuracy"].clone())
    }

    /// Seconds of every part, those of earlier starts too.
    fn seconds(&self) -> BTreeMap<String, f64> {
        fs::read(self.at(SECONDS)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn took(&self, name: &str, seconds: f64) -> Result<(), Fail> {
        let mut all = self.seconds();
        *all.entry(name.to_owned()).or_default() += seconds;
        whole::write(&self.at(SECONDS), serde_json::json!(all).to_string().as_bytes()).map(drop)
    }

    /// How long all parts took, in however many starts.
    pub(super) fn all_seconds(&self) -> f64 {
        self.seconds().values().sum()
    }

    fn path(&self, name: &str) -> String {
        text(&self.at(name))
    }

    /// Runs this program with `--json`; what it says goes to `logs/NAME.log`, its result to `logs/NAME.json`.
    fn ella(&self, name: &str, arguments: &[&str]) -> Result<Value, Fail> {
        let (begin, log) = (Instant::now(), self.at(&format!("logs/{name}.log")));
        let stderr = File::create(&log).map_err(|error| Fail::io(&log, "written", &error))?;
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--json").stdin(Stdio::null()).stderr(stderr);
        leaves_with_us(&mut command);
        let made = command.output().map_err(|error| Fail::io(&self.program, "started", &error))?;
        let path = self.at(&format!("logs/{name}.json"));
        whole::write(&path, &made.stdout)?;
        if !made.status.success() {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
            let code = made.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::ui::FAILED);
            return Err(Fail { code, message: format!("{name}: {last} (the whole of it: {})", log.display()) });
        }
        let seconds = begin.elapsed().as_secs_f64();
        note(format_args!("{name}: {}", span(seconds)));
        self.took(name, seconds)?;
        serde_json::from_slice(&made.stdout).map_err(|error| Fail::failed(format_args!("{}: {error}", path.display())))
    }
}

/// Has a part leave when this process ends, however that comes about: else it would go on by itself, beside the next start's. A training
/// commits first.
fn leaves_with_us(command: &mut Command) {
    let ask = || {
        // SAFETY: prctl with PR_SET_PDEATHSIG takes a signal number and touches no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    /// To the kernel, the thread that started a process is its parent.
    #[test]
    fn a_part_leaves_when_whoever_started_it_is_gone() {
        let started = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("60");
            leaves_with_us(&mut command);
            command.spawn().unwrap()
        });
        assert_eq!(started.join().unwrap().wait().unwrap().signal(), Some(libc::SIGTERM));
    }
}
