//! What texts tell the U-Net: through a connector, by the states of the base's own CLIP, or by both.

use ella_model::ModelError;
use ella_model::connector::{Conditions, Connector};
use ella_proto::config::Padding;
use tch::{Device, Kind, Tensor};

use super::clip::BaseText;
use crate::text::TextEncoder;

/// The longest text in tokens where all are filled up, unless another is said.
const FILLED_UP: usize = 128;
/// The same where none is. T5 takes any length, and others more than a machine has memory for: attention's goes by the square of it.
const LONGEST: usize = 2048;

/// What one text tells, as far as that is the same at every timestep. float32.
#[derive(Debug, Default)]
pub struct Told {
    /// What the connector takes: features of the positions that count, `[S, E]`.
    pub features: Option<Tensor>,
    /// CLIP's states.
    pub clip: Option<ClipTold>,
}

/// What CLIP says of one text.
#[derive(Debug)]
pub struct ClipTold {
    /// What the U-Net attends to, `[77, D]`.
    pub states: Tensor,
    /// The pooled text `[P]`, which SDXL takes besides.
    pub pooled: Option<Tensor>,
}

/// All texts that the pictures need, each worked out once, and which of them were too long.
#[derive(Debug)]
pub struct Script {
    /// The prompts, in the order of the plan's texts.
    pub prompts: Vec<Told>,
    /// What guidance leads away from.
    pub negative: Told,
    /// Prompts that lost their end.
    pub cut: usize,
    /// Whether the negative prompt did.
    pub negative_cut: bool,
    /// The longest text in tokens.
    pub most: usize,
    /// Whether features may differ in length, so that a mask has to tell them from what fills them up.
    pub ragged: bool,
}

/// How long a text counts (paper §4).
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// What becomes of the positions after its end.
    pub padding: Padding,
    /// The longest in tokens.
    pub most: usize,
}

impl Reading {
    /// Texts of so many tokens; left out: 128 where all are filled up, as the released connectors were trained, and else as many as the
    /// encoder takes, which are `longest`, up to 2048.
    pub fn new(padding: Padding, most: Option<usize>, longest: Option<i64>) -> Self {
        let usual = match padding {
            Padding::Fixed => FILLED_UP,
            Padding::None => longest.map_or(LONGEST, |n| LONGEST.min(n as usize)),
        };
        Self { padding, most: most.unwrap_or(usual) }
    }
}

impl Script {
    /// By the text encoder that a connector was trained with.
    ///
    /// # Errors
    /// The encoder's.
    pub fn features(
        encoder: &TextEncoder,
        (texts, prompt): (&[String], Reading),
        (nothing, negative): (&str, Reading),
    ) -> Result<Self, ModelError> {
        let prompts = texts.iter().map(|text| Told::features(encoder, text, prompt)).collect::<Result<_, _>>()?;
        let ragged = [prompt.padding, negative.padding].contains(&Padding::None);
        Ok(Self::told(prompts, Told::features(encoder, nothing, negative)?, (prompt.most, ragged)))
    }

    /// By the base's own CLIP.
    ///
    /// # Errors
    /// CLIP's.
    pub fn clip(base: &BaseText, texts: &[String], negative: Option<&str>) -> Result<Self, ModelError> {
        let prompts = texts.iter().map(|text| Told::clip(base, text)).collect::<Result<_, _>>()?;
        Ok(Self::told(prompts, Told::clip_negative(base, negative)?, (base.most_tokens(), false)))
    }

    /// What some of the prompts tell, and the negative one, on a device: a script of its own.
    ///
    /// # Errors
    /// libtorch's.
    pub fn of(&self, prompts: std::ops::Range<usize>, device: Device) -> Result<Self, ModelError> {
        let prompts = self.prompts[prompts].iter().map(|told| told.to_device(device)).collect::<Result<_, _>>()?;
        Ok(Self { prompts, negative: self.negative.to_device(device)?, ..*self })
    }

    /// What was told, and of each whether its text lost its end.
    pub(crate) fn told(prompts: Vec<(Told, bool)>, (negative, negative_cut): (Told, bool), (most, ragged): (usize, bool)) -> Self {
        let cut = prompts.iter().filter(|(_, cut)| *cut).count();
        Self { prompts: prompts.into_iter().map(|(told, _)| told).collect(), negative, cut, negative_cut, most, ragged }
    }

    /// Adds what CLIP says of as many texts.
    pub fn with_clip(mut self, clip: Self) -> Self {
        let own = self.prompts.iter_mut().chain([&mut self.negative]);
        for (told, more) in own.zip(clip.prompts.into_iter().chain([clip.negative])) {
            told.clip = more.clip;
        }
        self
    }
}

impl Told {
    /// By the text encoder that a connector was trained with; and whether the text lost its end. One by one: the numbers of a text must not
    /// depend on its neighbours.
    ///
    /// # Errors
    /// The encoder's.
    pub fn features(encoder: &TextEncoder, text: &str, how: Reading) -> Result<(Self, bool), ModelError> {
        let rows = encoder.encode_as(&[text], how.padding, how.most)?;
        let features = rows.features.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?;
        Ok((Self { features: Some(features), clip: None }, rows.truncated > 0))
    }

    /// By the base's own CLIP; and whether the text lost its end.
    ///
    /// # Errors
    /// CLIP's.
    pub fn clip(base: &BaseText, text: &str) -> Result<(Self, bool), ModelError> {
        base.tell(text).map(|(clip, cut)| (Self { features: None, clip: Some(clip) }, cut))
    }

    /// The same of what is not to be drawn: SDXL's CLIP takes zeros where no negative prompt is given at all.
    ///
    /// # Errors
    /// CLIP's.
    pub fn clip_negative(base: &BaseText, negative: Option<&str>) -> Result<(Self, bool), ModelError> {
        let (mut told, cut) = Self::clip(base, negative.unwrap_or_default())?;
        if negative.is_none() && base.zeros_for_nothing() {
            told.clip = told.clip.map(|clip| clip.zeros()).transpose()?;
        }
        Ok((told, cut))
    }

    /// The same on a device; where it is there already, no copy.
    ///
    /// # Errors
    /// libtorch's.
    pub fn to_device(&self, device: Device) -> Result<Self, ModelError> {
        let features = self.features.as_ref().map(|features| features.f_to_device(device)).transpose()?;
        let clip = self.clip.as_ref().map(|clip| clip.to_device(device)).transpose()?;
        Ok(Self { features, clip })
    }
}

impl ClipTold {
    fn to_device(&self, device: Device) -> Result<Self, ModelError> {
        let pooled = self.pooled.as_ref().map(|pooled| pooled.f_to_device(device)).transpose()?;
        Ok(Self { states: self.states.f_to_device(device)?, pooled })
    }

    fn zeros(&self) -> Result<Self, ModelError> {
        let pooled = self.pooled.as_ref().map(Tensor::f_zeros_like).transpose()?;
        Ok(Self { states: self.states.f_zeros_like()?, pooled })
    }
}

/// What some texts tell, a row for each.
#[derive(Debug)]
pub struct Rows {
    /// `[B, S, E]` and where a row's own positions are, `[B, S]` bool.
    features: Option<(Tensor, Option<Tensor>)>,
    /// `[B, 77, D]`.
    states: Option<Tensor>,
    /// `[B, P]`.
    pooled: Option<Tensor>,
}

impl Rows {
    /// Of these texts, a row for each. `ragged`: they may differ in length, and need a mask.
    ///
    /// # Errors
    /// libtorch's.
    pub fn of(told: &[&Told], ragged: bool) -> Result<Self, ModelError> {
        let features: Vec<&Tensor> = told.iter().filter_map(|one| one.features.as_ref()).collect();
        let clip = || told.iter().filter_map(|one| one.clip.as_ref());
        let (states, pooled): (Vec<_>, Vec<_>) = (clip().map(|c| &c.states).collect(), clip().filter_map(|c| c.pooled.as_ref()).collect());
        let stack = |rows: &[&Tensor]| (!rows.is_empty()).then(|| Tensor::f_stack(rows, 0)).transpose();
        let features = if features.is_empty() { None } else { Some(side_by_side(&features, ragged)?) };
        Ok(Self { features, states: stack(&states)?, pooled: stack(&pooled)? })
    }

    /// What the U-Net is told at these timesteps. CLIP's states come before the connector's; the U-Net's attention has no positions, so it
    /// would be the same the other way round. Of two pooled texts the connector's counts.
    ///
    /// # Errors
    /// The connector's, or there is none for features.
    pub fn at(&self, connector: Option<&Connector>, timesteps: &Tensor) -> Result<Conditions, ModelError> {
        let own = match (&self.features, connector) {
            (Some((features, mask)), Some(connector)) => Some(connector.forward(features, timesteps, mask.as_ref())?),
            (Some(_), None) => return Err(ModelError::argument("what draws from features", "a connector", "none")),
            (None, _) => None,
        };
        let states: Vec<&Tensor> = self.states.iter().chain(own.iter().map(|own| &own.states)).collect();
        let states = Tensor::f_cat(&states, 1)?; // [B, 77 + L, D]
        let pooled = own.and_then(|own| own.pooled).or_else(|| self.pooled.as_ref().map(Tensor::shallow_clone));
        Ok(Conditions { states, pooled })
    }
}

/// Rows `[S, E]` of any S, filled up with zeros to one tensor `[B, S, E]`, and with `ragged` the mask that tells the zeros apart.
fn side_by_side(rows: &[&Tensor], ragged: bool) -> Result<(Tensor, Option<Tensor>), ModelError> {
    let longest = rows.iter().map(|row| row.size()[0]).max().unwrap_or(0);
    let fill = |row: &&Tensor| row.f_constant_pad_nd([0, 0, 0, longest - row.size()[0]]);
    let features = Tensor::f_stack(&rows.iter().map(fill).collect::<Result<Vec<_>, _>>()?, 0)?;
    if !ragged {
        return Ok((features, None));
    }
    let own: Vec<i64> = rows.iter().map(|row| row.size()[0]).collect();
    let own = Tensor::f_from_slice(&own)?.f_unsqueeze(1)?.f_to_device(features.device())?;
    let places = Tensor::f_arange(longest, (Kind::Int64, features.device()))?.f_unsqueeze(0)?;
    Ok((features, Some(places.f_less_tensor(&own)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::connector::{ConnectorConfig, ConnectorKind};

    fn numbers(name: &str, shape: &[i64]) -> Tensor {
        let count = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&ella_model::rng::CounterRng::new(3, name).normal(count, 1.0)).reshape(shape)
    }

    fn told(name: &str, tokens: i64) -> Told {
        Told { features: Some(numbers(name, &[tokens, 6])), clip: None }
    }

    fn connector(kind: ConnectorKind) -> Connector {
        let config = ConnectorConfig { layers: 2, heads: 2, latents: 3, ..ConnectorConfig::new(kind, 8, 6) };
        Connector::init(&config, 1, Device::Cpu).unwrap()
    }

    #[test]
    fn no_text_is_longer_than_a_machine_bears_unless_it_is_asked_for() {
        let most = |padding, most, longest| Reading::new(padding, most, longest).most;
        assert_eq!([None, Some(77), Some(131_072)].map(|longest| most(Padding::None, None, longest)), [LONGEST, 77, LONGEST]);
        assert_eq!((most(Padding::Fixed, None, None), most(Padding::None, Some(9000), None)), (FILLED_UP, 9000));
    }

    /// The paper's flexible length runs each text through the connector by itself, at its own length and without a mask.
    #[test]
    fn ragged_rows_tell_what_each_text_tells_alone() {
        let connector = connector(ConnectorKind::Tsc);
        let texts = [told("a", 5), told("b", 1), told("c", 9)];
        let at = |texts: &[&Told], ragged| {
            let t = Tensor::full([texts.len() as i64], 400.0, (Kind::Float, Device::Cpu));
            Rows::of(texts, ragged).unwrap().at(Some(&connector), &t).unwrap().states
        };
        let together = at(&texts.iter().collect::<Vec<_>>(), true);
        assert_eq!(together.size(), [3, 3, 8]);
        for (row, text) in texts.iter().enumerate() {
            let alone = at(&[text], false);
            let error = (together.get(row as i64) - alone.get(0)).abs().max().double_value(&[]);
            assert!(error < 1e-6 * alone.abs().max().double_value(&[]).max(1.0), "{error}");
        }
    }

    #[test]
    fn an_mlp_takes_rows_of_one_length_only() {
        let connector = connector(ConnectorKind::Mlp);
        let t = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let (a, b) = (told("a", 4), told("b", 4));
        assert_eq!(Rows::of(&[&a, &b], false).unwrap().at(Some(&connector), &t).unwrap().states.size(), [2, 4, 8]);
        let refused = Rows::of(&[&a, &b], true).unwrap().at(Some(&connector), &t);
        assert!(matches!(refused, Err(ModelError::Unsupported { .. })));
    }

    #[test]
    fn clips_states_stand_beside_the_connectors() {
        let connector = connector(ConnectorKind::TscZero);
        let clip = || ClipTold { states: numbers("clip", &[7, 8]), pooled: Some(numbers("pooled", &[4])) };
        let both = Told { clip: Some(clip()), ..told("a", 5) };
        let t = Tensor::full([2], 9.0, (Kind::Float, Device::Cpu));
        let Conditions { states, pooled } = Rows::of(&[&both, &both], false).unwrap().at(Some(&connector), &t).unwrap();
        assert_eq!((states.size(), pooled.unwrap().size()), (vec![2, 7 + 3, 8], vec![2, 4]));
        assert!(states.get(1).narrow(0, 0, 7).equal(&clip().states));
        let alone = Told { features: None, clip: Some(clip()) };
        assert_eq!(Rows::of(&[&alone], false).unwrap().at(Some(&connector), &t).unwrap().states.size(), [1, 7, 8]);
        let zeros = clip().zeros().unwrap();
        assert_eq!((zeros.states.abs().sum(Kind::Float).double_value(&[]), zeros.pooled.unwrap().size()), (0.0, vec![4]));
    }
}
