//! The text encoders: each learns to read, which is to say what lies where by a caption alone.
//!
//! What a caption says is asked by a head of queries, one for each place and one for the background, that attend to the encoder's states; it is thrown away
//! afterwards. CLIP's kind is given captions cut at its limit, and asked only for what they name. T5's is given whole ones, and guesses
//! hidden words besides, as language models learn.

use anyhow::Result;
use ella_model::clip::{Clip, ClipConfig};
use ella_model::detector::{DetectorConfig, Found};
use ella_model::layers::{LayerNorm, Linear, attend, gelu};
use ella_model::params::{Init, Params};
use ella_model::t5::{T5, T5Config};
use ella_model::text::TextConfig;
use ella_model::tokenizer::{Padding, TextTokenizer};
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};

use crate::detector::{loss, right};
use crate::learner::{Course, Learner, fresh};
use crate::scenes::{Cutter, HELD_OUT, LEARNT, Truth, UNASKED, ahead, detector_config, scenes, take, truth};
use crate::{Place, save_network};

/// The longest whole caption in tokens.
pub(crate) const WHOLE: usize = 128;

/// Of the tokens that T5's kind reads, so many are hidden.
const HIDDEN: f64 = 0.15;

/// What is thrown away.
struct Head {
    queries: Tensor,
    attention: [(Linear, Linear, Linear, Linear); 2],
    norms: [LayerNorm; 3],
    inner: (Linear, Linear),
    cell: Linear,
    backdrop: Linear,
    widths: [i64; 4],
}

const HEADS: i64 = 4;

impl Head {
    fn new(config: &DetectorConfig, width: i64, p: &Params) -> ella_model::Result<Self> {
        let attention = |n: i64| {
            let p = p.at("attention").at(n);
            let map = |name: &str| Linear::new(&p.at(name), width, width);
            Ok::<_, ella_model::ModelError>((map("q")?, map("k")?, map("v")?, map("out")?))
        };
        let norm = |n: i64| LayerNorm::new(&p.at("norm").at(n), width, 1e-5);
        let widths = config.widths();
        Ok(Self {
            queries: p.get("queries", &[config.places.len() as i64 + 1, width], Init::Normal { std: 0.05 })?,
            attention: [attention(0)?, attention(1)?],
            norms: [norm(0)?, norm(1)?, norm(2)?],
            inner: (Linear::new(&p.at("fc1"), width, 2 * width)?, Linear::new(&p.at("fc2"), 2 * width, width)?),
            cell: Linear::new(&p.at("cell"), width, widths.iter().sum())?,
            backdrop: Linear::new(&p.at("backdrop"), width, config.backdrops.len() as i64)?,
            widths,
        })
    }

    /// `states` `[B, S, E]`, `hidden` `[B, 1, 1, S]` bool.
    fn forward(&self, states: &Tensor, hidden: &Tensor) -> Result<Found> {
        let ((batch, tokens, width), (queries, _)) = (states.size3()?, self.queries.size2()?);
        let split = |x: Tensor, count: i64| x.f_reshape([batch, count, HEADS, width / HEADS])?.f_transpose(1, 2);
        let mut x = self.queries.f_unsqueeze(0)?.f_expand([batch, queries, width], false)?;
        for (n, (q, k, v, out)) in self.attention.iter().enumerate() {
            let (q, k, v) = (q.forward(&self.norms[n].forward(&x)?)?, k.forward(states)?, v.forward(states)?);
            let told = attend(&split(q, queries)?, &split(k, tokens)?, &split(v, tokens)?, hidden)?;
            x = x.f_add(&out.forward(&told)?)?;
            if n == 0 {
                x = x.f_add(&self.inner.1.forward(&gelu(&self.inner.0.forward(&self.norms[2].forward(&x)?)?)?)?)?;
            }
        }
        let cells = self.cell.forward(&x.f_narrow(1, 0, queries - 1)?)?.f_split_with_sizes(self.widths, -1)?;
        let [a, b, c, d] = [0, 1, 2, 3].map(|n| cells[n].shallow_clone());
        Ok(Found { cells: [a, b, c, d], backdrop: self.backdrop.forward(&x.f_select(1, queries - 1)?)? })
    }
}

/// Captions as token ids and their mask, and what they say.
type Batch = (Tensor, Tensor, Truth);

/// The batch of some scenes; captions longer than `limit` are cut if that is what the encoder does.
fn batch(tokenizer: &TextTokenizer, (seed, from, count): (u64, u64, u64), limit: usize, padding: Padding, device: Device) -> Result<Batch> {
    let scenes = scenes(seed, from..from + count);
    let captions: Vec<String> = scenes.iter().map(|scene| scene.dense_caption()).collect();
    let (ids, mask) = tokenizer.encode(&captions, limit, padding)?.tensors(device)?;
    let mut cutter = Cutter::new(tokenizer);
    let told = match padding {
        Padding::Fixed => captions.iter().map(|caption| cutter.cut(caption, limit)).collect::<Result<Vec<_>>>()?,
        Padding::None => captions,
    };
    Ok((ids, mask, truth(&scenes, Some(&told), device)?))
}

/// The encoder of CLIP's kind, which the base is trained with.
pub(crate) fn train_clip(place: &Place, course: Course) -> Result<()> {
    let folder = place.shape("base/text_encoder");
    let config = ClipConfig::load(&folder)?;
    let (limit, device) = (config.max_positions as usize, place.device);
    let tokenizer = TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?;
    let (words, width) = (detector_config(), config.hidden_size);
    let mut first = fresh("clip", 3, device, |p| Clip::new(&config, p))?;
    first.extend(fresh("head", 4, device, |p| Head::new(&words, width, p))?);
    let mut learner = Learner::open(&place.work("clip"), course, first, device)?;
    let read = |clip: &Clip, head: &Head, (ids, mask, _): &Batch| -> Result<Found> {
        // As the U-Net will see them: all states, those of the filling too.
        let states = clip.forward(ids, &mask.f_ones_like()?)?.last_hidden_state;
        head.forward(&states, &mask.f_zeros_like()?.f_to_kind(Kind::Bool)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
    };
    let (clip, head) = (Clip::new(&config, &learner.params("clip"))?, Head::new(&words, width, &learner.params("head"))?);
    let size = course.batch as u64;
    let own = TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?;
    let batches = ahead(learner.next().unwrap_or(course.steps), course.steps, move |step| {
        batch(&own, (LEARNT, step * size, size), limit, Padding::Fixed, device)
    });
    while learner.next().is_some() {
        let one = take(&batches)?;
        learner.learn(&loss(&read(&clip, &head, &one)?, &one.2)?)?;
    }
    let (clip, head) = (Clip::new(&config, &learner.average("clip")?)?, Head::new(&words, width, &learner.average("head")?)?);
    let held_out = batch(&tokenizer, (HELD_OUT, 0, 2000), limit, Padding::Fixed, device)?;
    let shares = tch::no_grad(|| right(&read(&clip, &head, &held_out)?, &held_out.2))?;
    learner.tell(&json!({ "held_out": shares }))?;
    save_network(place, "base/text_encoder", "model", &learner.averaged("clip")?, &[])
}

/// The encoder of T5's kind, which the connector reads by.
pub(crate) fn train_text(place: &Place, course: Course) -> Result<()> {
    let folder = place.shape("text");
    let config = T5Config::load(&folder)?;
    let device = place.device;
    let tokenizer = TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?;
    let (words, width, vocabulary) = (detector_config(), config.d_model, config.vocab_size);
    let unknown = unknown(&folder)?;
    let mut first = fresh("t5", 5, device, |p| T5::new(&config, p))?;
    first.extend(fresh("head", 6, device, |p| Head::new(&words, width, p))?);
    first.extend(fresh("words", 7, device, |p| Linear::new(p, width, vocabulary))?);
    let mut learner = Learner::open(&place.work("text"), course, first, device)?;
    let t5 = T5::new(&config, &learner.params("t5"))?;
    let (head, guess) = (Head::new(&words, width, &learner.params("head"))?, Linear::new(&learner.params("words"), width, vocabulary)?);
    let read = |states: &Tensor, head: &Head, mask: &Tensor| head.forward(states, &mask.f_eq(0)?.f_unsqueeze(1)?.f_unsqueeze(1)?);
    let size = course.batch as u64;
    let own = TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?;
    let batches = ahead(learner.next().unwrap_or(course.steps), course.steps, move |step| {
        batch(&own, (LEARNT, step * size, size), WHOLE, Padding::None, device)
    });
    while learner.next().is_some() {
        let (ids, mask, truth) = take(&batches)?;
        // Half of the rows have hidden words; the others are read as they will be.
        let half = ids.size()[0] / 2;
        let hidden = Tensor::f_rand(ids.size(), (Kind::Float, device))?.f_lt(HIDDEN)?.f_logical_and(&mask.f_to_kind(Kind::Bool)?)?;
        let _ = hidden.f_narrow(0, half, ids.size()[0] - half)?.f_fill_(0)?;
        let states = t5.forward(&ids.f_masked_fill(&hidden, unknown)?, &mask)?;
        let answers = ids.f_masked_fill(&hidden.f_logical_not()?, UNASKED)?.f_narrow(0, 0, half)?.f_flatten(0, -1)?;
        let guesses = guess.forward(&states.f_narrow(0, 0, half)?)?.f_flatten(0, -2)?;
        let language = guesses.f_cross_entropy_loss(&answers, None::<Tensor>, Reduction::Mean, UNASKED, 0.0)?;
        learner.learn(&loss(&read(&states, &head, &mask)?, &truth)?.f_add(&language)?)?;
    }
    let (t5, head) = (T5::new(&config, &learner.average("t5")?)?, Head::new(&words, width, &learner.average("head")?)?);
    let (ids, mask, truth) = batch(&tokenizer, (HELD_OUT, 0, 1000), WHOLE, Padding::None, device)?;
    let shares = tch::no_grad(|| right(&read(&t5.forward(&ids, &mask)?, &head, &mask)?, &truth))?;
    learner.tell(&json!({ "held_out": shares }))?;
    save_network(place, "text", "model", &learner.averaged("t5")?, &[])
}

/// The id of the token for what a tokenizer does not know, which stands for hidden words.
fn unknown(folder: &std::path::Path) -> Result<i64> {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json"))?)?;
    json["model"]["unk_id"].as_i64().ok_or_else(|| anyhow::anyhow!("{}: its tokenizer names no unknown token", folder.display()))
}
