//! Random models to try things on, written as diffusers and transformers write theirs.
//!
//! `DIR/base` holds a U-Net, a VAE, a scheduler, and one or two CLIP text encoders with tokenizers; `DIR/text` a T5 encoder and its tokenizer.
//! Tokenizers are trained on given captions. Values are a pure
//! function of the seed. Untrained networks of this kind hardly listen to their text and give latents of any size; here both
//! are set right, so that training a connector on them has something to learn.

mod spec;

use std::path::Path;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::bpe::{self, END};
use crate::clip::{Clip, ClipConfig};
use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::params::Params;
use crate::rng::CounterRng;
use crate::schedule::Schedule;
use crate::t5::{T5, T5Config};
use crate::unet::{UNet, UNetConfig};
use crate::vae::{Vae, VaeConfig};
use crate::{unigram, weights};
pub use spec::Preset;
use spec::{Spec, tokenizer_config};

/// Writes `out/base` and `out/text`; files of the same names are replaced.
///
/// # Errors
/// No caption has a word, or a file cannot be written.
pub fn init_base(preset: Preset, seed: u64, captions: &[String], out: &Path) -> Result<()> {
    let spec = preset.spec();
    // First what can fail for the captions given.
    let (tokenizer, pieces) = (unigram::train(captions, spec.vocabulary)?, bpe::train(captions, spec.vocabulary)?);
    let (base, text) = (out.join("base"), out.join("text"));
    write_json(&base.join("model_index.json"), &spec.model_index)?;
    write_json(&base.join("scheduler/scheduler_config.json"), &spec.scheduler)?;
    // Equal names in two networks must not mean equal values.
    let seed = |part: &str| CounterRng::new(seed, part).bits(0);
    unet(&base.join("unet"), &spec, seed("unet"))?;
    vae(&base.join("vae"), &spec, seed("vae"))?;
    for (config, (number, pad)) in spec.clips.iter().zip([("", END), ("_2", "!")]) {
        let folder = base.join(format!("text_encoder{number}"));
        clip(&folder, (config, spec.kind), &pieces, seed(&format!("clip{number}")))?;
        tokenizer_files(&base.join(format!("tokenizer{number}")), &pieces, pad, &config["max_position_embeddings"])?;
    }
    t5(&text, &spec, seed("text"))?;
    write(&text.join("tokenizer.json"), tokenizer.as_bytes())?;
    write_json(&text.join("tokenizer_config.json"), &tokenizer_config())
}

impl Preset {
    /// The U-Net's shape.
    pub fn unet(self) -> Result<UNetConfig> {
        UNetConfig::read(in_memory(self.spec().unet))
    }

    /// The VAE's shape.
    pub fn vae(self) -> Result<VaeConfig> {
        VaeConfig::read(in_memory(self.spec().vae))
    }

    /// The text encoder's shape.
    pub fn text(self) -> Result<T5Config> {
        T5Config::read(in_memory(self.spec().text))
    }

    /// The noise schedule.
    pub fn schedule(self, device: Device) -> Result<Schedule> {
        Schedule::read(in_memory(self.spec().scheduler), device)
    }
}

/// A preset's configuration as if it had been read.
fn in_memory(config: Value) -> ConfigFile {
    let fields = if let Value::Object(fields) = config { fields } else { serde_json::Map::new() };
    ConfigFile::from_map(Path::new("the preset"), fields)
}

fn unet(folder: &Path, spec: &Spec, seed: u64) -> Result<()> {
    write_json(&folder.join("config.json"), &spec.unet)?;
    let config = UNetConfig::load(folder)?;
    let p = Params::random(seed, spec.kind, Device::Cpu);
    UNet::new(&config, &p)?;
    let tensors = p.taken();
    for (name, tensor) in &tensors {
        if let Some((_, gain)) = UNET_GAINS.iter().find(|(end, _)| name.ends_with(end)) {
            let _ = tensor.shallow_clone().f_mul_scalar_(*gain)?;
        }
    }
    pass_through(&tensors, &config)?;
    weights::save(&folder.join("diffusion_pytorch_model.safetensors"), &tensors)
}

/// What the U-Net's usual initial values are multiplied with. They shrink their input at every layer, and an average over many text states
/// shrinks it again; so what the text says is amplified where it enters, to about the strength of the picture's own features.
const UNET_GAINS: [(&str, f64); 4] =
    [("attn2.to_q.weight", 2.0), ("attn2.to_k.weight", 2.0), ("attn2.to_v.weight", 4.0), ("attn2.to_out.0.weight", 4.0)];

/// Lets the noisy sample through to the prediction, beside all that is random. Most of a noisy sample is noise, so such a U-Net predicts
/// noise after a fashion, and a connector that tells it what the picture shows makes it better; one that predicts nothing could
/// only be silenced. The way leads over the outermost skip connection, in pairs of channels +x and −x, for silu(x) − silu(−x) = x.
fn pass_through(tensors: &[(String, Tensor)], config: &UNetConfig) -> Result<()> {
    let last = config.halvings();
    let shortcut = format!("up_blocks.{last}.resnets.{}.conv_shortcut", config.layers_per_block[0]);
    let n = config.in_channels;
    let identity = Tensor::f_eye(n, (Kind::Float, Device::Cpu))?;
    let pairs = Tensor::f_cat(&[&identity, &identity.f_neg()?], 0)?; // [2n, n]
    // The skip's channels are the last of those that the shortcut takes.
    let width = config.block_out_channels[0];
    for (name, tensor) in tensors {
        let middle = tensor.size().last().map_or(0, |kernel| kernel / 2);
        // [out, in] of the kernel's middle.
        let tap = || tensor.f_select(3, middle)?.f_select(2, middle);
        match name.strip_suffix(".weight") {
            Some("conv_in") => {
                let _ = tensor.f_narrow(0, 0, 2 * n)?.f_zero_()?;
                tap()?.f_narrow(0, 0, 2 * n)?.f_copy_(&pairs)?;
            }
            Some(name) if name == shortcut => {
                let _ = tensor.f_narrow(0, 0, 2 * n)?.f_zero_()?;
                let own = tap()?.f_narrow(0, 0, 2 * n)?.f_narrow(1, tensor.size()[1] - width, 2 * n)?;
                let _ = own.f_diagonal(0, 0, 1)?.f_fill_(SKIP_GAIN)?;
            }
            Some("conv_out") => {
                let _ = tensor.f_narrow(1, 0, 2 * n)?.f_zero_()?;
                tap()?.f_narrow(1, 0, 2 * n)?.f_copy_(&pairs.f_tr()?)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// How much stronger the sample is on its way through than the random features that are added to it.
const SKIP_GAIN: f64 = 2.0;

fn vae(folder: &Path, spec: &Spec, seed: u64) -> Result<()> {
    write_json(&folder.join("config.json"), &spec.vae)?;
    let config = VaeConfig::load(folder)?;
    let p = Params::random(seed, Kind::Float, Device::Cpu);
    let vae = Vae::new(&config, &p)?;
    let tensors = p.taken();
    let find = |name: &str| tensors.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.shallow_clone());
    if let (Some(weight), Some(bias)) = (find("quant_conv.weight"), find("quant_conv.bias")) {
        calibrate(&vae, &weight, &bias, seed)?;
    }
    let convert = |(name, tensor): (String, Tensor)| Ok((name, tensor.f_to_kind(spec.kind)?));
    let tensors = tensors.into_iter().map(convert).collect::<Result<Vec<_>>>()?;
    weights::save(&folder.join("diffusion_pytorch_model.safetensors"), &tensors)
}

/// Changes the encoder's last layer, in place, so that scaled latents of pictures have mean 0 and deviation 1 in every channel, and so that
/// their distributions are narrow.
fn calibrate(vae: &Vae, weight: &Tensor, bias: &Tensor, seed: u64) -> Result<()> {
    let channels = vae.config().latent_channels;
    let (mean, _) = vae.encode(&pictures(seed, 16 * vae.config().downscale())?)?;
    // In double and then rounded, so that the last bits of the convolutions, which depend on the machine, do not show.
    let by_channel = mean.f_to_kind(Kind::Double)?.f_transpose(0, 1)?.f_reshape([channels, -1])?;
    let centre = rounded(&by_channel.f_mean_dim(1i64, false, Kind::Double)?)?;
    let spread = rounded(&by_channel.f_std_dim(1i64, true, false)?)?.f_clamp_min(1e-3)?;
    let gain = spread.f_mul_scalar(vae.config().scaling_factor)?.f_reciprocal()?;
    let mut own = weight.f_narrow(0, 0, channels)?;
    let _ = own.f_mul_(&gain.f_reshape([channels, 1, 1, 1])?)?;
    let mut own = bias.f_narrow(0, 0, channels)?;
    let _ = own.f_sub_(&centre)?.f_mul_(&gain)?;
    // Log-variances near that of a hundredth of the latents' deviation.
    let narrow = -2.0 * (100.0 * vae.config().scaling_factor).ln();
    let _ = weight.f_narrow(0, channels, channels)?.f_mul_scalar_(0.1)?;
    let _ = bias.f_narrow(0, channels, channels)?.f_fill_(narrow)?;
    Ok(())
}

fn rounded(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_mul_scalar(1024.0)?.f_round()?.f_div_scalar(1024.0)?.f_to_kind(Kind::Float)?)
}

/// Pictures with areas of colour, sharp and soft, `[8, 3, size, size]` in −1…1.
fn pictures(seed: u64, size: i64) -> Result<Tensor> {
    let colours = |name: &str, cells: i64| -> Result<Tensor> {
        let values = CounterRng::new(seed, name).uniform((4 * 3 * cells * cells) as usize, 1.0);
        Ok(Tensor::f_from_slice(&values)?.f_reshape([4, 3, cells, cells])?)
    };
    let sharp = colours("sharp pictures", 4)?.f_upsample_nearest2d([size, size], None, None)?;
    let soft = colours("soft pictures", 3)?.f_upsample_bilinear2d([size, size], false, None, None)?;
    Ok(Tensor::f_cat(&[sharp, soft], 0)?)
}

fn clip(folder: &Path, (config, kind): (&Value, Kind), pieces: &bpe::Files, seed: u64) -> Result<()> {
    let mut config = config.clone();
    for (field, id) in [("bos_token_id", pieces.end - 1), ("eos_token_id", pieces.end), ("pad_token_id", pieces.end)] {
        config[field] = json!(id);
    }
    write_json(&folder.join("config.json"), &config)?;
    let p = Params::random(seed, kind, Device::Cpu);
    Clip::new(&ClipConfig::load(folder)?, &p)?;
    weights::save(&folder.join("model.safetensors"), &p.taken())
}

/// CLIP's tokenizer, which fills rows up with `pad`: SDXL's second one has a token of its own for that.
fn tokenizer_files(folder: &Path, pieces: &bpe::Files, pad: &str, longest: &Value) -> Result<()> {
    let mut config = pieces.config.clone();
    config["pad_token"] = json!(pad);
    config["model_max_length"] = longest.clone();
    write_json(&folder.join("vocab.json"), &pieces.vocab)?;
    write(&folder.join("merges.txt"), pieces.merges.as_bytes())?;
    write_json(&folder.join("tokenizer_config.json"), &config)
}

fn t5(folder: &Path, spec: &Spec, seed: u64) -> Result<()> {
    write_json(&folder.join("config.json"), &spec.text)?;
    let p = Params::random(seed, spec.kind, Device::Cpu);
    T5::new(&T5Config::load(folder)?, &p)?;
    weights::save(&folder.join("model.safetensors"), &p.taken())
}

fn write_json(file: &Path, value: &Value) -> Result<()> {
    write(file, format!("{value:#}\n").as_bytes())
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        // Half a file would be taken for one.
        .and_then(|()| std::fs::write(file, bytes).inspect_err(|_| drop(std::fs::remove_file(file))))
        .map_err(|source| ModelError::Unwritable { file: file.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Base;
    use crate::connector::{Conditions, Connector, ConnectorConfig, ConnectorKind};
    use crate::tokenizer::{Padding, TextTokenizer};
    use crate::unet::Added;

    const COLOURS: [&str; 4] = ["red", "green", "blue", "white"];

    fn captions() -> Vec<String> {
        COLOURS.iter().map(|colour| format!("A large {colour} square lies on a dark background.")).collect()
    }

    fn made(preset: Preset, seed: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        init_base(preset, seed, &captions(), dir.path()).unwrap();
        dir
    }

    /// What SDXL's U-Net is told besides, of samples with this pooled text.
    fn added(unet: &UNet, pooled: Option<Tensor>) -> Option<Added> {
        let time_ids = Tensor::from_slice(&[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]).expand([4, 6], false);
        let width = unet.config().pooled_width().unwrap()?;
        Some(Added { text_embeds: pooled.unwrap_or_else(|| Tensor::zeros([4, width], (Kind::Float, Device::Cpu))), time_ids })
    }

    fn normal(name: &str, shape: &[i64]) -> Tensor {
        let count = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&CounterRng::new(5, name).normal(count, 1.0)).reshape(shape)
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
        let (a, b, c) = (made(Preset::Nano, 7), made(Preset::Nano, 7), made(Preset::Nano, 8));
        for file in ["base/unet/diffusion_pytorch_model", "base/vae/diffusion_pytorch_model", "base/text_encoder/model", "text/model"] {
            let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join(format!("{file}.safetensors"))).unwrap();
            assert!(read(&a) == read(&b), "{file}");
            assert!(read(&a) != read(&c), "{file}");
        }
    }

    #[test]
    fn what_cannot_be_made_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let no_words = init_base(Preset::Nano, 7, &[String::new()], dir.path());
        assert!(matches!(no_words, Err(ModelError::Input { what, .. }) if what == "captions"));
        std::fs::write(dir.path().join("file"), "").unwrap();
        let in_file = init_base(Preset::Nano, 7, &captions(), &dir.path().join("file"));
        assert!(matches!(in_file, Err(ModelError::Unwritable { .. })));
        assert!(matches!("sd3".parse::<Preset>(), Err(ModelError::Input { .. })));
        assert_eq!("sd15".parse::<Preset>().unwrap(), Preset::Sd15);
    }

    #[test]
    fn bases_have_clips_of_their_own() {
        for (preset, widths) in [(Preset::Nano, &[64][..]), (Preset::NanoSdxl, &[24, 40])] {
            let dir = made(preset, 7);
            let own = Base::open(&dir.path().join("base")).unwrap().text_encoders().unwrap();
            assert_eq!(own.len(), widths.len());
            for (own, &width) in own.into_iter().zip(widths) {
                let clip = Clip::from_part(own.part, Kind::Float, Device::Cpu).unwrap();
                let tokenizer = own.tokenizer.unwrap();
                tokenizer.check_vocabulary(clip.config().vocab_size).unwrap();
                let (ids, mask) = tokenizer.encode(&captions(), 77, Padding::Fixed).unwrap().tensors(Device::Cpu).unwrap();
                let out = clip.forward(&ids, &mask.ones_like()).unwrap();
                assert_eq!(out.last_hidden_state.size(), [4, 77, width]);
                assert!((out.last_hidden_state.std(true).double_value(&[]) - 1.0).abs() < 0.1);
                assert_eq!(ids.get(0).eq(clip.config().end.unwrap()).sum(Kind::Int64).int64_value(&[]) == 1, width == 40);
                let pooled = if width == 40 { 32 } else { width };
                assert_eq!(out.pooled.size(), [4, pooled]);
            }
        }
    }

    #[test]
    fn presets_have_the_true_sizes_where_they_say_so() {
        let parameters = |preset: Preset| {
            let (spec, unet, vae) = (preset.spec(), Params::shapes(), Params::shapes());
            UNet::new(&preset.unet().unwrap(), &unet).unwrap();
            Vae::new(&preset.vae().unwrap(), &vae).unwrap();
            let clip = Params::shapes();
            for mut one in spec.clips {
                one["eos_token_id"] = json!(9);
                Clip::new(&ClipConfig::read(in_memory(one)).unwrap(), &clip.at("x")).unwrap();
            }
            [unet, vae, clip].map(|p| p.taken().iter().map(|(_, tensor)| tensor.numel()).sum::<usize>())
        };
        assert_eq!(parameters(Preset::Sd15), [859_520_964, 83_653_863, 123_060_480]);
        assert_eq!(parameters(Preset::Sdxl), [2_567_463_684, 83_653_863, 123_060_480 + 694_659_840]);
    }

    #[test]
    fn scaled_latents_of_pictures_have_unit_deviation() {
        let dir = made(Preset::Nano, 7);
        let vae = Vae::load(&dir.path().join("base/vae"), Kind::Float, Device::Cpu).unwrap();
        let (mean, logvar) = vae.encode(&pictures(99, 64).unwrap()).unwrap();
        assert_eq!(mean.size(), [8, 4, 8, 8]);
        let std = vae.scale(&mean).unwrap().std(true).double_value(&[]);
        assert!((0.6..1.5).contains(&std), "{std}");
        assert!(vae.scale(&(logvar * 0.5).exp()).unwrap().max().double_value(&[]) < 0.1);
    }

    #[test]
    fn the_text_moves_the_u_net_s_output_about_as_much_as_the_picture() {
        // SDXL's outermost blocks do not attend: what the text says enters at a quarter of the places.
        for (preset, least) in [(Preset::Nano, 0.3), (Preset::NanoSdxl, 0.1)] {
            let dir = made(preset, 7);
            let unet = UNet::load(&dir.path().join("base/unet"), Kind::Float, Device::Cpu).unwrap();
            let t = Tensor::from_slice(&[500i64; 4]);
            let (x, text) = (normal("x", &[4, 4, 8, 8]), normal("text", &[4, 64, 64]));
            let same = |x: &Tensor| x.narrow(0, 0, 1).expand_as(x);
            let spread = |x: &Tensor, text: &Tensor, pooled: Option<Tensor>| {
                let y = unet.forward_added(x, &t, text, added(&unet, pooled).as_ref()).unwrap();
                y.std_dim(0i64, true, false).mean(Kind::Float).double_value(&[])
            };
            let (by_text, by_picture) = (spread(&same(&x), &text, None), spread(&x, &same(&text), None));
            println!("{preset:?}: spread by text {by_text:.3}, by picture {by_picture:.3}");
            assert!(by_text > least * by_picture, "{preset:?}: {by_text} {by_picture}");
            if let Some(width) = unet.config().pooled_width().unwrap() {
                let by_pooled = spread(&same(&x), &same(&text), Some(normal("pooled", &[4, width])));
                println!("by pooled text {by_pooled:.3}");
                assert!(by_pooled > 0.02 * by_picture, "{by_pooled} {by_picture}");
            }
        }
    }

    /// A connector on a nano base, trained by plain Adam on four pictures of one colour each: the loss falls.
    #[test]
    fn a_connector_on_such_a_base_learns() {
        // Tests run side by side; more threads each would only wait for one another.
        tch::set_num_threads(1);
        for preset in [Preset::Nano, Preset::NanoSdxl] {
            let (first, last) = losses(preset);
            println!("{preset:?}: loss {first:.3} to {last:.3}");
            assert!(last < 0.9 * first, "{preset:?}: {first} {last}");
        }
    }

    /// The mean of the first losses, and of the last.
    fn losses(preset: Preset) -> (f64, f64) {
        let dir = made(preset, 7);
        let at = |name: &str| dir.path().join(name);
        let unet = UNet::load(&at("base/unet"), Kind::Float, Device::Cpu).unwrap();
        let vae = Vae::load(&at("base/vae"), Kind::Float, Device::Cpu).unwrap();
        let schedule = Schedule::load(&at("base/scheduler"), Device::Cpu).unwrap();
        let tokenizer = TextTokenizer::t5(&at("text")).unwrap();
        let t5 = T5::load(&at("text"), Kind::Float, Device::Cpu).unwrap();
        tokenizer.check_vocabulary(t5.config().vocab_size).unwrap();
        let (ids, mask) = tokenizer.encode(&captions(), 24, Padding::Fixed).unwrap().tensors(Device::Cpu).unwrap();
        let features = t5.forward(&ids, &mask).unwrap();
        let (mean, _) = vae.encode(&pictures(3, 64).unwrap().narrow(0, 0, 4)).unwrap();
        let latents = vae.scale(&mean).unwrap();

        let pooled = unet.config().pooled_width().unwrap();
        let config = ConnectorConfig { layers: 2, pooled, ..ConnectorConfig::new(ConnectorKind::Tsc, 64, 64) };
        let tsc = Connector::init(&config, 1, Device::Cpu).unwrap();
        let mut state: Vec<(Tensor, Tensor, Tensor)> =
            tsc.tensors().iter().map(|(_, w)| (w.shallow_clone().set_requires_grad(true), w.zeros_like(), w.zeros_like())).collect();
        let mut losses = Vec::new();
        for step in 1..=60 {
            let noise = normal(&format!("noise {step}"), &[4, 4, 8, 8]);
            let t = Tensor::from_slice(&CounterRng::new(step, "t").uniform(4, 499.0)).to_kind(Kind::Int64) + 500;
            let noisy = schedule.add_noise(&latents, &noise, &t).unwrap();
            let Conditions { states, pooled } = tsc.forward(&features, &t, None).unwrap();
            let predicted = unet.forward_added(&noisy, &t, &states, added(&unet, pooled).as_ref()).unwrap();
            let loss = (predicted - noise).square().mean(Kind::Float);
            losses.push(loss.double_value(&[]));
            let weights: Vec<&Tensor> = state.iter().map(|(w, _, _)| w).collect();
            let gradients = Tensor::run_backward(&[loss], &weights, false, false);
            tch::no_grad(|| {
                for ((w, m, v), g) in state.iter_mut().zip(gradients) {
                    *m = &*m * 0.9 + &g * 0.1;
                    *v = &*v * 0.99 + g.square() * 0.01;
                    let rate = 1e-3 * (1.0 - 0.99f64.powi(step as i32)).sqrt() / (1.0 - 0.9f64.powi(step as i32));
                    let _ = w.g_sub_(&(&*m / (v.sqrt() + 1e-8) * rate));
                }
            });
        }
        let average = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        (average(&losses[..6]), average(&losses[54..]))
    }
}
