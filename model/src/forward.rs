//! One network on tensors from a file: what `ella forward` does. For parity checks and for porting.
//!
//! Letters: B batch, S tokens, E text width, L latents, D width, C channels, H and W pixels.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

use tch::{Device, Kind, Tensor};

use crate::base::Base;
use crate::connector::{Conditions, Connector};
use crate::error::{ModelError, Result};
use crate::layers::inner_product;
use crate::lora::Lora;
use crate::params::{Compute, Layout};
use crate::part::Part;
use crate::text::{Layers, Text, TextOutput};
use crate::unet::{Added, UNet};
use crate::vae::Vae;
use crate::weights::{self, Weights};

/// The networks that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// `text_features` `[B,S,E]`, `timesteps` `[B]` to `hidden_states` `[B,L,D]`; of an MLP, `[B,S,D]`; with a pooled head to `pooled`
    /// `[B,P]` too.
    Connector,
    /// `sample` `[B,C,H,W]`, `timesteps` `[B]`, `hidden_states` `[B,L,D]`, for SDXL `text_embeds` `[B,P]` and `time_ids` `[B,6]` too,
    /// to `sample`.
    Unet,
    /// `input_ids` `[B,S]`, `attention_mask` `[B,S]` to `last_hidden_state` `[B,S,E]`; CLIP also to `penultimate_hidden_state`
    /// `[B,S,E]` and `pooled` `[B,P]`; with averaged layers all of them also to `features` `[B,S,E]`. The model's `config.json` says
    /// which family it is.
    Text,
    /// `image` `[B,3,H,W]` to `mean`, `logvar` `[B,C,H/f,W/f]`.
    VaeEncode,
    /// `latent` `[B,C,H,W]` to `image` `[B,3,fH,fW]`.
    VaeDecode,
}

impl Net {
    /// All networks, by the names that the command line knows them by.
    pub const NAMES: [(&'static str, Net); 5] = [
        ("connector", Net::Connector),
        ("unet", Net::Unet),
        ("text", Net::Text),
        ("vae-encode", Net::VaeEncode),
        ("vae-decode", Net::VaeDecode),
    ];
}

impl FromStr for Net {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Net::NAMES.iter().find(|(known, _)| *known == name).map(|(_, net)| *net);
        found.ok_or_else(|| ModelError::argument("network", Net::NAMES.map(|(known, _)| known).join(", "), name))
    }
}

/// How to run the network.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Take `grad_output` too, and give gradients (connector and U-Net).
    pub grad: bool,
    /// Compute the gradients in the memory of one block at a time (U-Net).
    pub checkpoint: bool,
    /// Encode and decode in tiles what is larger than the VAE's pictures in training (VAE).
    pub tiling: bool,
    /// How feature maps lie in memory (U-Net, VAE); `None`: whatever is fastest.
    pub layout: Option<Layout>,
    /// The kind to compute in, and of the outputs: `Float`, `Half` or `BFloat16`.
    pub kind: Kind,
    /// A connector's attention heads; `None`: those that its file tells, or the released connectors'.
    pub heads: Option<i64>,
    /// Which layers a text encoder's features are made of.
    pub layers: Layers,
    /// Where to compute.
    pub device: Device,
    /// What is merged into a U-Net.
    pub loras: &'a [Lora],
}

impl Default for Options<'_> {
    fn default() -> Self {
        let (kind, heads, layers, device) = (Kind::Float, None, Layers::Last, Device::Cpu);
        Options { grad: false, checkpoint: false, tiling: false, layout: None, kind, heads, layers, device, loras: &[] }
    }
}

impl Options<'_> {
    /// Refuses what `net` has no use for.
    fn check(&self, net: Net) -> Result<()> {
        let vae = matches!(net, Net::VaeEncode | Net::VaeDecode);
        let unused = [
            (self.checkpoint && !(self.grad && net == Net::Unet), "--checkpoint", "unet with --grad"),
            (self.tiling && !vae, "--tiling", "vae-encode or vae-decode"),
            (self.layout.is_some() && !vae && net != Net::Unet, "--channels-last", "unet, vae-encode or vae-decode"),
            (self.layers != Layers::Last && net != Net::Text, "--layers", "text"),
            (!self.loras.is_empty() && net != Net::Unet, "--lora", "unet"),
        ];
        match unused.into_iter().find(|(unused, ..)| *unused) {
            None => Ok(()),
            Some((_, option, runs)) => {
                let what = format!("{option} for this network");
                Err(ModelError::Unsupported { what, instead: format!("leave it out, or run {runs}") })
            }
        }
    }
}

/// Named tensors.
type Named = Vec<(String, Tensor)>;

/// Runs `net`, loaded from `model`, on the tensors of the safetensors file `inputs`, and writes the file `outputs`. Gives the kind that it
/// was computed in: float32 instead of float16 for a VAE with `force_upcast`.
///
/// # Errors
/// Whatever is wrong with the model's files; an input that is missing, surplus, of another shape, type or range than the
/// network takes; `grad` for a network that nothing is trained through; other options for a network that has no use for them.
pub fn forward(net: Net, model: &Path, inputs: &Path, outputs: &Path, options: &Options<'_>) -> Result<Kind> {
    options.check(net)?;
    let inputs = Inputs::open(inputs, options)?;
    let (device, mut kind) = (options.device, options.kind);
    let fastest = Compute::fastest(kind, device)?;
    let compute = Compute { layout: options.layout.unwrap_or(fastest.layout), ..fastest };
    let mut vae = |run: fn(&Vae, &Inputs<'_>) -> Result<Named>| {
        let vae = Vae::computing(part(net, model)?, compute, kind, device)?;
        kind = vae.kind();
        tch::no_grad(|| run(&vae, &inputs))
    };
    let results = match net {
        Net::Connector => connector(&Connector::load(model, options.heads, options.kind, options.device)?, &inputs)?,
        Net::Unet => unet(&UNet::computing(part(net, model)?, options.loras, compute, options.kind, device)?, &inputs)?,
        Net::Text | Net::VaeEncode | Net::VaeDecode if options.grad => {
            let what = "a gradient through a network that stays frozen and has nothing trained before it".to_owned();
            return Err(ModelError::Unsupported { what, instead: "leave --grad out".into() });
        }
        Net::Text => tch::no_grad(|| text(&Text::from_part(part(net, model)?, options.kind, options.device)?, &inputs))?,
        Net::VaeEncode => vae(vae_encode)?,
        Net::VaeDecode => vae(vae_decode)?,
    };
    weights::save(outputs, &results)?;
    Ok(kind)
}

/// What `net` is loaded from: its own folder, or its part of a single-file checkpoint, of text encoders the first.
fn part(net: Net, model: &Path) -> Result<Part> {
    if !model.is_file() {
        return Part::open(model);
    }
    let base = Base::open(model)?;
    match net {
        Net::Unet => base.unet_part(),
        Net::VaeEncode | Net::VaeDecode => base.vae_part(),
        Net::Text | Net::Connector => {
            let first = base.text_encoders()?.into_iter().next();
            let missing = || ModelError::MissingTensor { file: model.into(), key: "text_model.embeddings.token_embedding.weight".into() };
            Ok(first.ok_or_else(missing)?.part)
        }
    }
}

fn connector(connector: &Connector, inputs: &Inputs<'_>) -> Result<Named> {
    let features = inputs.floats("text_features", &[Dim::Any("B"), Dim::Any("S"), Dim::Is(connector.config().text_width)])?;
    let timesteps = inputs.timesteps()?;
    let mut watched = vec![("text_features".to_owned(), features.shallow_clone())];
    watched.extend(connector.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
    inputs.differentiate(watched, || {
        let Conditions { states, pooled } = connector.forward(&features, &timesteps, None)?;
        let pooled = pooled.map(|pooled| ("pooled".to_owned(), pooled));
        Ok([("hidden_states".to_owned(), states)].into_iter().chain(pooled).collect())
    })
}

fn unet(unet: &UNet, inputs: &Inputs<'_>) -> Result<Named> {
    let config = unet.config();
    let sample = [Dim::Any("B"), Dim::Is(config.in_channels), Dim::Any("H"), Dim::Any("W")];
    let sample = inputs.floats("sample", &sample)?;
    let timesteps = inputs.timesteps()?;
    let states = [Dim::Any("B"), Dim::Any("L"), Dim::Is(config.cross_attention_dim)];
    let states = inputs.floats("hidden_states", &states)?;
    let mut watched = vec![("hidden_states".to_owned(), states.shallow_clone())];
    let added = match config.added {
        None => None,
        Some(_) => Some(Added {
            text_embeds: inputs.floats("text_embeds", &[Dim::Any("B"), Dim::Any("P")])?,
            time_ids: inputs.numbers("time_ids", &[Dim::Any("B"), Dim::Any("N")])?,
        }),
    };
    watched.extend(added.as_ref().map(|added| ("text_embeds".to_owned(), added.text_embeds.shallow_clone())));
    if inputs.options.checkpoint {
        let _ = watched.iter_mut().map(|(_, tensor)| tensor.f_set_requires_grad(true)).collect::<std::result::Result<Vec<_>, _>>()?;
        let pass = unet.forward_checkpointed(&sample, &timesteps, &states, added.as_ref())?;
        let output = pass.prediction().shallow_clone();
        let weight = inputs.weight("grad_output", &output)?;
        inputs.finish()?;
        let gradients = pass.gradients(&weight)?;
        let gradients = std::iter::once(gradients.hidden_states).chain(gradients.text_embeds);
        return Ok(with_gradients(vec![("sample".into(), output)], watched.into_iter().map(|(name, _)| name), gradients));
    }
    inputs.differentiate(watched, || Ok(vec![("sample".into(), unet.forward_added(&sample, &timesteps, &states, added.as_ref())?)]))
}

fn text(text: &Text, inputs: &Inputs<'_>) -> Result<Named> {
    let dims = [Dim::Any("B"), Dim::Any("S")];
    let ids = inputs.integers("input_ids", &dims, text.config().vocab_size())?;
    let mask = inputs.integers("attention_mask", &dims, 2)?;
    inputs.finish()?;
    let mut named: Named = match text.forward(&ids, &mask)? {
        TextOutput::States(states) => vec![("last_hidden_state".into(), states)],
        TextOutput::Clip(out) => vec![
            ("last_hidden_state".into(), out.last_hidden_state),
            ("penultimate_hidden_state".into(), out.penultimate_hidden_state),
            ("pooled".into(), out.pooled),
        ],
    };
    if inputs.options.layers == Layers::Average {
        named.push(("features".into(), text.features(&ids, &mask, Layers::Average)?));
    }
    Ok(named)
}

fn vae_encode(vae: &Vae, inputs: &Inputs<'_>) -> Result<Named> {
    let channels = Dim::Is(vae.config().in_channels);
    let image = inputs.floats("image", &[Dim::Any("B"), channels, Dim::Any("H"), Dim::Any("W")])?;
    inputs.finish()?;
    let (mean, logvar) = if inputs.options.tiling { vae.encode_tiled(&image)? } else { vae.encode(&image)? };
    Ok(vec![("mean".into(), mean), ("logvar".into(), logvar)])
}

fn vae_decode(vae: &Vae, inputs: &Inputs<'_>) -> Result<Named> {
    let channels = Dim::Is(vae.config().latent_channels);
    let latent = inputs.floats("latent", &[Dim::Any("B"), channels, Dim::Any("H"), Dim::Any("W")])?;
    inputs.finish()?;
    let image = if inputs.options.tiling { vae.decode_tiled(&latent)? } else { vae.decode(&latent)? };
    Ok(vec![("image".into(), image)])
}

/// The outputs, and the gradients by what has these names.
fn with_gradients(outputs: Named, names: impl Iterator<Item = String>, gradients: impl Iterator<Item = Tensor>) -> Named {
    let gradients = names.map(|name| format!("grad.{name}")).zip(gradients);
    outputs.into_iter().chain(gradients).collect()
}

/// One axis of an input.
#[derive(Clone, Copy, Debug)]
enum Dim {
    /// Fixed by the network.
    Is(i64),
    /// Free, but the same wherever the letter occurs.
    Any(&'static str),
}

/// The tensors of the input file, each of which must be taken.
struct Inputs<'a> {
    file: Weights,
    options: Options<'a>,
    letters: RefCell<BTreeMap<&'static str, i64>>,
    taken: RefCell<BTreeSet<String>>,
}

impl<'a> Inputs<'a> {
    fn open(path: &Path, options: &Options<'a>) -> Result<Self> {
        let file = Weights::open(path)?;
        Ok(Inputs { file, options: *options, letters: RefCell::default(), taken: RefCell::default() })
    }

    fn floats(&self, name: &str, dims: &[Dim]) -> Result<Tensor> {
        self.take(name, dims, self.options.kind)
    }

    /// Floats or integers, as float32 whatever the network computes in: its kind may not tell 1000 from 1001.
    fn numbers(&self, name: &str, dims: &[Dim]) -> Result<Tensor> {
        let (_, stored) = self.file.describe(name)?;
        let floats = matches!(stored, Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16);
        Ok(self.take(name, dims, if floats { Kind::Float } else { Kind::Int64 })?.f_to_kind(Kind::Float)?)
    }

    /// Integers from 0 to below `limit`.
    fn integers(&self, name: &str, dims: &[Dim], limit: i64) -> Result<Tensor> {
        let tensor = self.take(name, dims, Kind::Int64)?;
        let (low, high) = (i64::try_from(tensor.f_min()?)?, i64::try_from(tensor.f_max()?)?);
        if low < 0 || high >= limit {
            let rule = format!("integers from 0 to {}", limit - 1);
            return Err(self.wrong(name, rule, format!("{low} to {high}")));
        }
        Ok(tensor)
    }

    fn timesteps(&self) -> Result<Tensor> {
        // float32's sinusoid tells integers apart up to here; schedules have 1000.
        self.integers("timesteps", &[Dim::Any("B")], 1 << 24)
    }

    fn take(&self, name: &str, dims: &[Dim], kind: Kind) -> Result<Tensor> {
        let (shape, _) = self.file.describe(name)?;
        self.check(name, dims, shape)?;
        self.taken.borrow_mut().insert(name.to_owned());
        self.file.load(name, shape, kind, self.options.device)
    }

    fn check(&self, name: &str, dims: &[Dim], shape: &[i64]) -> Result<()> {
        let mut letters = self.letters.borrow_mut();
        let fits = |(dim, &size): (&Dim, &i64)| match *dim {
            Dim::Is(expected) => size == expected,
            Dim::Any(letter) => size >= 1 && *letters.entry(letter).or_insert(size) == size,
        };
        if dims.len() == shape.len() && dims.iter().zip(shape).all(fits) {
            return Ok(());
        }
        let words = dims.iter().map(|dim| match *dim {
            Dim::Is(size) => size.to_string(),
            Dim::Any(letter) => letters.get(letter).map_or(letter.to_owned(), |size| format!("{letter}={size}")),
        });
        let expected = format!("of shape [{}]", words.collect::<Vec<_>>().join(", "));
        Err(self.wrong(name, expected, format!("{shape:?}")))
    }

    /// Refuses inputs that the network did not take.
    fn finish(&self) -> Result<()> {
        let taken = self.taken.borrow();
        match self.file.names().find(|name| !taken.contains(*name)) {
            None => Ok(()),
            Some(name) => {
                let expected = taken.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                Err(self.wrong("inputs", format!("{expected} and no other"), name.to_owned()))
            }
        }
    }

    /// The network's outputs and, where asked for, the gradients of Σ output · `grad_output` by what is `watched`. A second output's weight
    /// is `grad_output.NAME`, and 0 if that is left out.
    fn differentiate(&self, watched: Named, run: impl FnOnce() -> Result<Named>) -> Result<Named> {
        if !self.options.grad {
            self.finish()?;
            return tch::no_grad(run);
        }
        // A tensor that requires gradients shares the flag with its shallow clones, which the network holds.
        let (names, leaves): (Vec<String>, Vec<Tensor>) =
            watched.into_iter().map(|(name, tensor)| (name, tensor.set_requires_grad(true))).unzip();
        let outputs = run()?;
        let losses: Vec<Tensor> =
            outputs.iter().enumerate().map(|(n, (name, output))| self.weighted(n, name, output)).collect::<Result<_>>()?;
        self.finish()?;
        let gradients = Tensor::f_run_backward(&losses, &leaves, false, false)?;
        Ok(with_gradients(outputs, names.into_iter(), gradients.into_iter()))
    }

    /// Σ output · weight, in float32.
    fn weighted(&self, number: usize, name: &str, output: &Tensor) -> Result<Tensor> {
        let key = if number == 0 { "grad_output".to_owned() } else { format!("grad_output.{name}") };
        if number > 0 && self.file.shape(&key).is_none() {
            return inner_product(output, &output.f_zeros_like()?);
        }
        inner_product(output, &self.weight(&key, output)?)
    }

    /// The input `key`, of an output's shape.
    fn weight(&self, key: &str, output: &Tensor) -> Result<Tensor> {
        let dims: Vec<Dim> = output.size().into_iter().map(Dim::Is).collect();
        self.floats(key, &dims)
    }

    fn wrong(&self, name: &str, expected: String, found: String) -> ModelError {
        ModelError::FileInput { file: self.file.path().to_owned(), what: name.to_owned(), expected, found }
    }
}
