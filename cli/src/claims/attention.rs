//! Which words a connector's queries look at, at which timestep (the paper's Fig. 8).

use std::collections::HashMap;
use std::fs;

use ella_model::connector::Connector;
use ella_proto::config::{Dtype, Layers, Padding};
use ella_worker::text::{TextEncoder, TextOptions};
use serde::Serialize;
use tch::{Device, Kind as Dt, Tensor};

use super::lab::Lab;
use super::recipe::Kind;
use crate::ui::Fail;

/// Dense prompts whose words are looked at.
const PROMPTS: usize = 40;

/// From the most noise to the least.
const TIMESTEPS: [i64; 11] = [999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0];

/// Words by what they tell.
const WORDS: [(&str, &[&str]); 6] = [
    (
        "place",
        &[
            "top", "bottom", "left", "right", "center", "middle", "upper", "lower", "corner", "side", "above", "below", "higher", "down",
            "up",
        ],
    ),
    ("number", &["one", "two", "three", "four", "single", "just"]),
    ("shape", &["circle", "square", "triangle", "star", "ring", "cross"]),
    ("colour", &["red", "orange", "yellow", "green", "blue", "purple", "black", "white"]),
    ("size", &["medium-sized", "mid-sized", "large", "big", "larger", "smaller", "size"]),
    ("surface", &["plain", "solid", "checkered", "surface", "pattern", "chessboard", "squares", "filled", "even"]),
];

/// The kind of all other words.
const OTHER: &str = "other";

/// Attention by kind of word and timestep.
#[derive(Debug, Serialize)]
pub(super) struct Map {
    pub(super) timesteps: Vec<i64>,
    /// Of each kind of word: how many tokens were looked at, and at each timestep the attention that one of them gets of all text, where the mean token
    /// gets 1. The mean over prompts, queries, blocks and trainings.
    pub(super) kinds: Vec<(&'static str, u64, Vec<f64>)>,
}

fn kind_of(word: &str) -> usize {
    let word = word.trim_end_matches(['.', ',']).to_lowercase();
    WORDS.iter().position(|(_, words)| words.contains(&word.as_str())).unwrap_or(WORDS.len())
}

/// Looks into the TSCs of all seeds.
pub(super) fn map(lab: &Lab) -> Result<Map, Fail> {
    let device = Device::Cpu;
    let options = TextOptions {
        model: lab.mini("text"),
        max_tokens: Lab::max_tokens(),
        padding: Padding::None,
        layers: Layers::Last,
        dtype: Dtype::Fp32,
    };
    let encoder = TextEncoder::load(&options, device)?;
    let captions = captions(lab)?;
    let kinds = token_kinds(&encoder, &captions)?;
    let rows = encoder.encode(&captions)?;
    let read = (&rows.features, &rows.mask()?);
    let mut sums = vec![vec![0.0; TIMESTEPS.len()]; WORDS.len() + 1];
    let mut counts = vec![0u64; WORDS.len() + 1];
    kinds.iter().flatten().for_each(|kind| counts[*kind] += 1);
    for seed in &lab.recipe.seeds {
        let connector = Connector::load(&lab.connector(Kind::Tsc, *seed), None, Dt::Float, device)?;
        for (at, timestep) in TIMESTEPS.iter().enumerate() {
            let tokens = tch::no_grad(|| per_token(&connector, read, *timestep))?;
            for (row, kinds) in kinds.iter().enumerate() {
                let own: Vec<f64> = (0..kinds.len()).map(|token| tokens.double_value(&[row as i64, token as i64])).collect();
                let mean = own.iter().sum::<f64>() / own.len().max(1) as f64;
                own.iter().zip(kinds).for_each(|(share, kind)| sums[*kind][at] += share / mean / lab.recipe.seeds.len() as f64);
            }
        }
    }
    let names = WORDS.iter().map(|(name, _)| *name).chain([OTHER]);
    let of =
        |((name, sums), count): ((&'static str, Vec<f64>), u64)| (name, count, sums.iter().map(|sum| sum / count.max(1) as f64).collect());
    Ok(Map { timesteps: TIMESTEPS.to_vec(), kinds: names.zip(sums).zip(counts).map(of).collect() })
}

/// What each position of the text gets of all queries' attention in all blocks, `[B, S]`.
fn per_token(connector: &Connector, (features, mask): (&Tensor, &Tensor), timestep: i64) -> Result<Tensor, Fail> {
    let t = Tensor::f_full([features.size()[0]], timestep, (Dt::Int64, Device::Cpu))?;
    let latents = connector.config().latents;
    let mut sum = Tensor::from(0f32);
    for block in connector.attention(features, &t, Some(mask))? {
        let text = block.f_narrow(2, latents, block.size()[2] - latents)?;
        sum = sum.f_add(&text.f_mean_dim(1i64, false, Dt::Float)?)?;
    }
    Ok(sum)
}

/// The first dense prompts.
fn captions(lab: &Lab) -> Result<Vec<String>, Fail> {
    let folder = lab.at("suite/dense");
    let failed = |error: std::io::Error| Fail::io(&folder, "read", &error);
    let mut files = fs::read_dir(&folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    files.sort();
    files.truncate(PROMPTS);
    files.iter().map(|file| fs::read_to_string(file).map_err(|error| Fail::io(file, "read", &error))).collect()
}

/// The kind of word that each of a caption's tokens is part of. A word's last token of several is its punctuation where it has one.
fn token_kinds(encoder: &TextEncoder, captions: &[String]) -> Result<Vec<Vec<usize>>, Fail> {
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut tokens = |word: &str| -> Result<usize, Fail> {
        if let Some(count) = known.get(word) {
            return Ok(*count);
        }
        let count = encoder.lengths(&[word])?[0].saturating_sub(1); // the end mark
        known.insert(word.to_owned(), count);
        Ok(count)
    };
    let mut all = Vec::new();
    for caption in captions {
        let mut kinds = Vec::new();
        for word in caption.split_whitespace() {
            let (count, kind) = (tokens(word)?, kind_of(word));
            let punctuation = usize::from(count > 1 && word.ends_with(['.', ',']));
            kinds.extend(std::iter::repeat_n(kind, count - punctuation));
            kinds.extend(std::iter::repeat_n(WORDS.len(), punctuation));
        }
        kinds.truncate(Lab::max_tokens());
        all.push(kinds);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_told_apart_by_what_they_tell() {
        let kind = |word| WORDS.get(kind_of(word)).map_or(OTHER, |(name, _)| *name);
        assert_eq!(
            ["Three", "left.", "blue", "star,", "large", "checkered", "the"].map(kind),
            ["number", "place", "colour", "shape", "size", "surface", OTHER]
        );
    }
}
