//! `ella forward`: one network on tensors from a file, for parity checks and porting.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ella_model::forward::{Net, Options, forward};
use ella_model::params::Layout;
use serde_json::json;
use tch::{Device, Kind};

use crate::embed::Layers;
use crate::lora::Loras;
use crate::ui::{DONE, Fail, Out, note};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Forward {
    /// Which network
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(Net::NAMES.map(|(name, _)| name)))]
    net: String,
    /// The network's folder, or a single-file checkpoint that holds it; for the connector a safetensors file, whose kind is told by the
    /// names of its tensors
    #[arg(long, value_name = "M")]
    model: PathBuf,
    /// Safetensors file with the inputs
    #[arg(long, value_name = "F")]
    inputs: PathBuf,
    /// Safetensors file that is written
    #[arg(long, value_name = "F")]
    outputs: PathBuf,
    /// Take `grad_output` too, and give gradients (connector, unet)
    #[arg(long)]
    grad: bool,
    /// Compute the gradients block by block, in less memory (unet)
    #[arg(long, requires = "grad")]
    checkpoint: bool,
    /// Work in tiles on what is larger than the VAE's pictures in training, one at a time (vae-encode, vae-decode)
    #[arg(long)]
    tiling: bool,
    /// Keep a pixel's channels beside each other in memory (unet, vae-encode, vae-decode) [default: where that is faster]
    #[arg(long)]
    channels_last: bool,
    /// What to compute in
    #[arg(long, value_enum, default_value_t = Dtype::Fp32)]
    dtype: Dtype,
    /// The connector's attention heads [default: as its file says; 8 if it does not]
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..=1024))]
    heads: Option<i64>,
    /// With average, a text encoder gives the layer-normalized average over all layers too, as `features`
    #[arg(long, value_enum, default_value_t = Layers::Last)]
    layers: Layers,
    #[command(flatten)]
    loras: Loras,
}

/// Number formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// 32-bit floats
    Fp32,
    /// IEEE half
    Fp16,
    /// bfloat16
    Bf16,
}

impl Dtype {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Dtype::Fp32 => Kind::Float,
            Dtype::Fp16 => Kind::Half,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }
}

impl Forward {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let net: Net = self.net.parse()?;
        whole::replaceable(&self.outputs)?;
        let (kind, device, loras) = (self.dtype.kind(), Device::Cpu, self.loras.open()?);
        let layout = self.channels_last.then_some(Layout::ChannelsLast);
        let (grad, checkpoint, tiling) = (self.grad, self.checkpoint, self.tiling);
        let (heads, layers) = (self.heads, self.layers.into());
        let options = Options { grad, checkpoint, tiling, layout, kind, heads, layers, device, loras: &loras };
        if forward(net, &self.model, &self.inputs, &self.outputs, &options)? != kind {
            note("computed in float32: this VAE's config.json has force_upcast, because float16 overflows in it");
        }
        out.result(&json!({ "net": self.net, "outputs": self.outputs }), || format!("{}: {}", self.net, self.outputs.display()));
        Ok(DONE)
    }
}
