//! `ella dpg look`: answers to questions about the built-in scenes, by the detector that finds what is in their pictures.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ella_dataset::decode_rgb;
use ella_dataset::scenes::{Question, Sight, Suite, Telling};
use ella_worker::sight::{Accuracy, Eyes, from_bytes};
use serde_json::json;
use tch::{Device, Tensor};

use super::{TILES, bad};
use crate::ui::{DONE, Fail, Meter, Out, count};
use crate::whole;

/// The seed of the scenes that the detector itself is tried on, apart from every seed that people type.
const TRIED_SEED: u64 = 777_777;

#[derive(Debug, Args)]
pub(crate) struct LookArgs {
    /// The folder that ella scenes --prompts wrote
    #[arg(long, value_name = "DIR")]
    suite: PathBuf,
    /// Which of its prompts were drawn
    #[arg(long, value_enum, default_value_t = Prompts::Dense)]
    prompts: Prompts,
    /// The folder with a grid of four pictures for each prompt, as ella dpg generate writes it
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The detector's folder
    #[arg(long, value_name = "DIR", default_value = "mini/detector")]
    detector: PathBuf,
    /// The file that is written, for ella dpg score: JSON lines of item_id, tile, proposition_id and answer
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Scenes, rendered in each of six styles, that the detector itself is tried on; 0: it is not tried
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(..=100_000))]
    tried: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Prompts {
    /// Those that tell all
    Dense,
    /// Those that tell a little
    Short,
}

impl From<Prompts> for Telling {
    fn from(prompts: Prompts) -> Self {
        match prompts {
            Prompts::Dense => Self::Dense,
            Prompts::Short => Self::Short,
        }
    }
}

impl LookArgs {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let suite = Suite::read(&self.suite).map_err(bad)?;
        let eyes = Eyes::load(&self.detector, Device::Cpu);
        let eyes = eyes.map_err(|error| bad(format_args!("--detector {}: {error}", self.detector.display())))?;
        let telling = Telling::from(self.prompts);
        let (mut lines, mut missing, mut yes, mut asked, mut side) = (String::new(), Vec::new(), 0, 0, 0);
        let mut meter = Meter::new("pictures", suite.count);
        for (at, (key, scene)) in suite.scenes().enumerate() {
            meter.at(at as u64, &key);
            let file = self.images.join(format!("{key}.png"));
            if !file.is_file() {
                missing.push(key);
                continue;
            }
            let tiles = tiles(&file)?;
            side = tiles.size()[3];
            for (tile, sight) in eyes.look(&tiles).map_err(bad)?.iter().enumerate() {
                for question in telling.questions(&scene) {
                    yes += usize::from(question.is_so(sight));
                    asked += 1;
                    lines += &line(&key, tile, &question, sight);
                }
            }
        }
        drop(meter);
        if asked == 0 {
            let hint = "draw them with ella dpg generate --prompts";
            return Err(bad(format_args!("{}: has no grid of any prompt of {}; {hint}", self.images.display(), self.suite.display())));
        }
        whole::write(&self.out, lines.as_bytes())?;
        let accuracy = match self.tried {
            0 => Vec::new(),
            tried => {
                let tried = Suite::new(ella_dataset::scenes::World::Mini, TRIED_SEED, tried, suite.objects.clone());
                eyes.accuracy(&tried, side as u32).map_err(bad)?
            }
        };
        let made = json!({ "out": self.out, "answers": asked, "yes": yes, "missing": missing, "accuracy": accuracy });
        out.result(&made, || self.text((asked, yes), &missing, &accuracy));
        Ok(DONE)
    }

    fn text(&self, (asked, yes): (usize, usize), missing: &[String], accuracy: &[Accuracy]) -> String {
        let mut text = format!("{} in {}, {yes} of them yes\n", count(asked, "answer"), self.out.display());
        if !missing.is_empty() {
            text += &format!("{} without a picture: {}\n", count(missing.len(), "prompt"), super::named(missing));
        }
        if !accuracy.is_empty() {
            text += "the detector itself, on rendered scenes of the same kind (right of: cells, objects, questions):\n";
        }
        for Accuracy { style, cells, objects, questions, .. } in accuracy {
            let name = format!("{style:?}").to_lowercase();
            text += &format!("{name:>10}  {:6.2} % {:6.2} % {:6.2} %\n", 100.0 * cells, 100.0 * objects, 100.0 * questions);
        }
        text
    }
}

fn line(key: &str, tile: usize, question: &Question, sight: &Sight) -> String {
    let answer = if question.is_so(sight) { "yes" } else { "no" };
    format!("{}\n", json!({ "item_id": key, "tile": tile, "proposition_id": question.proposition_id, "answer": answer }))
}

/// The four tiles of a grid, `[4, 3, S, S]`: upper left, upper right, lower left, lower right.
fn tiles(file: &Path) -> Result<Tensor, Fail> {
    let bytes = fs::read(file).map_err(|error| Fail::io(file, "read", &error))?;
    let (pixels, width, height) = decode_rgb(&bytes).map_err(|refusal| bad(format_args!("{}: {refusal}", file.display())))?;
    if width != height || width % 2 != 0 {
        return Err(bad(format_args!("{}: is {width}×{height}, not two rows of two square tiles", file.display())));
    }
    let side = i64::from(width / 2);
    let whole = from_bytes(&pixels, (1, 2 * side, 2 * side))?;
    // [3, row, S, column, S] to [row, column, 3, S, S].
    Ok(whole.f_view([3, 2, side, 2, side])?.f_permute([1, 3, 0, 2, 4])?.f_reshape([i64::from(TILES), 3, side, side])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_dataset::scenes::World;

    #[test]
    fn tiles_come_in_the_order_of_the_questions() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("grid.png");
        let colour = |x: u32, y: u32| match (x < 8, y < 8) {
            (true, true) => [255, 0, 0],
            (false, true) => [0, 255, 0],
            (true, false) => [0, 0, 255],
            (false, false) => [255, 255, 255],
        };
        let bytes: Vec<u8> = (0..16).flat_map(|y| (0..16).flat_map(move |x| colour(x, y))).collect();
        let mut encoder = png::Encoder::new(fs::File::create(&file).unwrap(), 16, 16);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(&bytes).unwrap();
        let tiles = tiles(&file).unwrap();
        assert_eq!(tiles.size(), [4, 3, 8, 8]);
        for (tile, expected) in [[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]].into_iter().enumerate() {
            let pixel: Vec<f64> = (0..3).map(|channel| tiles.double_value(&[tile as i64, channel, 3, 4])).collect();
            assert_eq!(pixel, expected);
        }
    }

    #[test]
    fn an_answer_is_a_line_that_the_scorer_reads() {
        let suite = Suite::new(World::Mini, 3, 1, 2..=2);
        let (key, scene) = suite.scenes().next().unwrap();
        let question = &scene.questions()[0];
        let of = |sight: &Sight| serde_json::from_str::<serde_json::Value>(&line(&key, 2, question, sight)).unwrap();
        assert_eq!(of(&scene.sight()), json!({ "item_id": key, "tile": 2, "proposition_id": 1, "answer": "yes" }));
        assert_eq!(of(&Sight::default())["answer"], "no");
    }
}
