//! What the miniature learns from: scenes, each seen once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use anyhow::{Context, Result};
use ella_dataset::scenes::{Background, Place, Scene, World, scene_of};
use ella_model::detector::DetectorConfig;
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_worker::sight::rendered;
use tch::{Device, Tensor};

/// The miniature's world.
pub(crate) const WORLD: World = World::Mini;

/// Pixels a side.
pub(crate) const SIDE: u32 = 64;

/// What no stage trains on.
pub(crate) const HELD_OUT: u64 = 1_000_003;

/// Seeds of what stages train on.
pub(crate) const LEARNT: u64 = 1;

/// Marks in targets what is not asked.
pub(crate) const UNASKED: i64 = -100;

/// Scenes of a seed.
pub(crate) fn scenes(seed: u64, range: Range<u64>) -> Vec<Scene> {
    range.map(|index| scene_of(WORLD, seed, index)).collect()
}

/// Their pictures, `[B, 3, SIDE, SIDE]` in −1…1.
pub(crate) fn pictures(scenes: &[Scene], device: Device) -> Result<Tensor> {
    Ok(rendered(scenes, SIDE)?.f_to_device(device)?.f_contiguous()?)
}

/// Answers in order of a detector's logits.
#[derive(Debug)]
pub(crate) struct Truth {
    /// `[B, places]` each, of [`ella_model::detector::Found::cells`].
    pub(crate) cells: [Tensor; 4],
    /// `[B]`.
    pub(crate) backdrop: Tensor,
}

/// What the scenes hold; of objects whose place `told` leaves out, nothing.
pub(crate) fn truth(scenes: &[Scene], told: Option<&[String]>, device: Device) -> Result<Truth> {
    let (mut cells, mut backdrops) = ([(); 4].map(|()| Vec::new()), Vec::new());
    for (row, scene) in scenes.iter().enumerate() {
        let named = told.map_or_else(|| vec![true; scene.objects.len()], |told| scene.named(&told[row]));
        for place in WORLD.places() {
            let object = scene.objects.iter().zip(&named).find(|(object, named)| object.place == place && **named);
            let answers = object.map_or([0, UNASKED, UNASKED, UNASKED], |(object, _)| {
                [
                    1 + at(WORLD.shapes(), object.shape),
                    at(WORLD.colors(), object.color),
                    at(WORLD.sizes(), object.size),
                    at(WORLD.textures(), object.texture),
                ]
            });
            cells.iter_mut().zip(answers).for_each(|(cells, answer)| cells.push(answer));
        }
        let Background::Plain { color } = scene.background else { anyhow::bail!("a background of the miniature is not plain") };
        let said = told.is_none_or(|told| told[row].contains(color.name()));
        backdrops.push(if said { at(WORLD.backdrops(), color) } else { UNASKED });
    }
    let column = |answers: Vec<i64>| Tensor::f_from_slice(&answers)?.f_view([scenes.len() as i64, -1])?.f_to_device(device);
    let [a, b, c, d] = cells.map(column);
    Ok(Truth { cells: [a?, b?, c?, d?], backdrop: Tensor::f_from_slice(&backdrops)?.f_to_device(device)? })
}

fn at<T: PartialEq>(all: &[T], one: T) -> i64 {
    all.iter().position(|known| *known == one).map_or(UNASKED, |at| at as i64)
}

/// A detector of that world.
pub(crate) fn detector_config() -> DetectorConfig {
    let words = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
    DetectorConfig {
        places: words(WORLD.places().into_iter().map(Place::name).collect()),
        shapes: words(WORLD.shapes().iter().map(|one| one.name()).collect()),
        colors: words(WORLD.colors().iter().map(|one| one.name()).collect()),
        sizes: words(WORLD.sizes().iter().map(|one| one.name()).collect()),
        textures: words(WORLD.textures().iter().map(|one| one.name()).collect()),
        backdrops: words(WORLD.backdrops().iter().map(|one| one.name()).collect()),
        channels: 16,
    }
}

/// Makes batches on a thread of its own, a few ahead of whoever takes them: those of steps from `first` on.
pub(crate) fn ahead<T: Send + 'static>(first: u64, steps: u64, make: impl Fn(u64) -> Result<T> + Send + 'static) -> Receiver<Result<T>> {
    let (sender, receiver) = sync_channel(3);
    thread::spawn(move || (first..steps).try_for_each(|step| sender.send(make(step))));
    receiver
}

/// The next of them.
pub(crate) fn take<T>(batches: &Receiver<Result<T>>) -> Result<T> {
    batches.recv().context("the thread that makes batches has ended")?
}

/// A tokenizer that knows where it cuts.
pub(crate) struct Cutter<'a> {
    tokenizer: &'a TextTokenizer,
    tokens: HashMap<String, usize>,
}

impl<'a> Cutter<'a> {
    pub(crate) fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, tokens: HashMap::new() }
    }

    /// What of a caption is left when it may have `limit` tokens, start and end among them.
    pub(crate) fn cut(&mut self, caption: &str, limit: usize) -> Result<String> {
        let (mut told, mut room) = (Vec::new(), limit - 2);
        for word in caption.split_whitespace() {
            let tokens = match self.tokens.get(word) {
                Some(tokens) => *tokens,
                None => {
                    let tokens = self.tokenizer.encode(&[word], 77, Padding::None)?.lengths[0] - 2;
                    self.tokens.insert(word.to_owned(), tokens);
                    tokens
                }
            };
            match room.checked_sub(tokens) {
                Some(left) => room = left,
                None => break,
            }
            told.push(word);
        }
        Ok(told.join(" "))
    }
}
