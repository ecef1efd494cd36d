//! The arithmetic of `ella_model::memory` against what libtorch really keeps, on the processor: by the allocator's own count.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

use ella_cuda::fused::Fused;
use ella_model::config::ConfigFile;
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::layers::inner_product;
use ella_model::memory::{Figure, Pass, connector_activations, unet_activations, unet_checkpointed, unet_resized, unet_workspace};
use ella_model::params::{Compute, Layout, Params};
use ella_model::unet::{Added, UNet, UNetConfig};
use serde_json::{Value, json};
use std::sync::Mutex;
use tch::{Device, Kind, Tensor};

/// `struct mallinfo2` of glibc.
#[repr(C)]
struct Mallinfo2([usize; 10]);

unsafe extern "C" {
    safe fn mallinfo2() -> Mallinfo2;
    safe fn mallopt(param: i32, value: i32) -> i32;
}

/// Bytes that this process has from the allocator now: in arenas, and mapped.
fn allocated() -> f64 {
    let Mallinfo2(found) = mallinfo2();
    (found[7] + found[4]) as f64
}

/// The most memory that the process has had since `reset_peak`.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

fn reset_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// One at a time, or one counts what another takes.
static ALONE: Mutex<()> = Mutex::new(());

fn total(figures: &[Figure]) -> f64 {
    figures.iter().map(|figure| figure.bytes).sum::<u64>() as f64
}

#[track_caller]
fn within(what: &str, found: f64, planned: f64, low: f64, high: f64) {
    println!("{what}: {:.1} MB planned, {:.1} MB found, ratio {:.3}", planned / 1e6, found / 1e6, planned / found);
    assert!((low..=high).contains(&(planned / found)), "{what}: planned {planned}, found {found}");
}

fn config(extra: &Value) -> UNetConfig {
    let mut all = json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 32, "block_out_channels": [64, 128, 128], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4, "cross_attention_dim": 96, "norm_num_groups": 32,
    });
    for (key, value) in extra.as_object().unwrap() {
        all[key] = value.clone();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), all.to_string()).unwrap();
    UNetConfig::read(ConfigFile::open(file.path()).unwrap()).unwrap()
}

/// The kinds of U-Net: SD 1's, one whose first level has no transformers (as SDXL's), SDXL's conditions, and one with deeper transformers.
fn configs() -> Vec<(&'static str, UNetConfig)> {
    let sdxl = json!({
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 3],
    });
    let mut pooled = sdxl.clone();
    pooled["addition_embed_type"] = json!("text_time");
    pooled["addition_time_embed_dim"] = json!(8);
    pooled["projection_class_embeddings_input_dim"] = json!(80);
    vec![("sd1", config(&json!({}))), ("late", config(&sdxl)), ("sdxl", config(&pooled))]
}

/// With heads of 40 and 80 channels, whose attention to few keys can be fused.
fn wide() -> UNetConfig {
    config(&json!({ "block_out_channels": [160, 320, 320] }))
}

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// What a lane gives a U-Net.
struct Lane {
    sample: Tensor,
    timesteps: Tensor,
    states: Tensor,
    added: Option<Added>,
}

impl Lane {
    fn new(config: &UNetConfig, pass: Pass) -> Self {
        let (b, h, w) = (pass.samples as i64, pass.size.0 as i64, pass.size.1 as i64);
        let pooled = config.pooled_width().unwrap();
        Self {
            sample: random(&[b, 4, h, w]),
            timesteps: Tensor::from_slice(&vec![500i64; b as usize]),
            states: random(&[b, pass.states as i64, config.cross_attention_dim]).set_requires_grad(true),
            added: pooled.map(|width| Added { text_embeds: random(&[b, width]).set_requires_grad(true), time_ids: random(&[b, 6]) }),
        }
    }

    /// The loss, with its graph.
    fn loss(&self, net: &UNet) -> Tensor {
        let y = net.forward_added(&self.sample, &self.timesteps, &self.states, self.added.as_ref()).unwrap();
        y.to_kind(Kind::Float).f_mse_loss(&random(&self.sample.size()), tch::Reduction::Mean).unwrap()
    }
}

#[test]
fn what_autograd_keeps_of_a_u_net_is_what_was_reckoned() {
    let _alone = ALONE.lock();
    tch::set_num_threads(1);
    let ways = [(Kind::Float, Fused::NONE), (Kind::BFloat16, Fused::NONE), (Kind::Float, Fused::ALL), (Kind::BFloat16, Fused::ALL)];
    let some = [
        Fused { norm: true, ..Fused::NONE },
        Fused { conv: true, ..Fused::NONE },
        Fused { norm: true, conv: true, ..Fused::NONE },
        Fused { resize: true, ..Fused::NONE },
        Fused { gate: true, ..Fused::NONE },
    ];
    // Each operator on its own with one of them, attention to few keys with one whose heads fit.
    let some = some.map(|fused| (Kind::BFloat16, fused));
    let few = [Fused { cross: true, ..Fused::NONE }, Fused::USUAL].map(|fused| (Kind::BFloat16, fused));
    let named =
        configs().into_iter().enumerate().map(|(i, named)| (named, if i == 0 { [&ways[..], &some].concat() } else { ways.to_vec() }));
    for ((name, config), ways) in named.chain([(("wide", wide()), few.to_vec())]) {
        for (kind, fused) in ways {
            let pass = Pass { samples: 6, size: (32, 24), states: 16, kind, fused };
            let params = Params::random(1, kind, Device::Cpu);
            let layout = if fused == Fused::NONE { Layout::ChannelsFirst } else { Layout::ChannelsLast };
            params.compute_by(Compute { layout, fused });
            let net = UNet::new(&config, &params).unwrap();
            let lane = Lane::new(&config, pass);
            // What libraries keep for themselves is taken now.
            drop(lane.loss(&net));
            let before = allocated();
            let loss = lane.loss(&net);
            let kept = allocated() - before;
            drop(loss);
            // The graph itself takes some of the processor's memory: 2 MB for 1000 operations, of tensors as small as these.
            within(&format!("{name} {kind:?} {fused:?}"), kept, total(&unet_activations(&config, pass)), 0.95, 1.01);
        }
    }
}

#[test]
fn changes_of_resolution_hold_the_weights_that_were_reckoned() {
    let _alone = ALONE.lock();
    tch::set_num_threads(1);
    for ((name, config), kind) in configs().into_iter().flat_map(|named| [(named.clone(), Kind::Float), (named, Kind::BFloat16)]) {
        let held = |resize| {
            let params = Params::random(1, kind, Device::Cpu);
            params.compute_by(Compute { layout: Layout::ChannelsLast, fused: Fused { resize, ..Fused::NONE } });
            let before = allocated();
            let net = UNet::new(&config, &params).unwrap();
            drop(params);
            let held = allocated() - before;
            drop(net);
            held
        };
        held(true); // what libraries keep for themselves is taken now
        let further = held(true) - held(false);
        within(&format!("{name} {kind:?}"), further, unet_resized(&config, kind).bytes as f64, 0.95, 1.05);
    }
    // SD 1.5 by hand: halves of 320, 640 and 1280 channels, doubles of 1280, 1280 and 640.
    let config = config(&json!({"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}));
    let squares = (16 * (320 * 320 + 640 * 640 + 1280 * 1280), 32 * (1280 * 1280 + 1280 * 1280 + 640 * 640));
    assert_eq!(unet_resized(&config, Kind::BFloat16).bytes, 2 * (squares.0 + squares.1));
}

#[test]
fn the_peak_of_a_step_stays_within_what_was_reckoned() {
    let _alone = ALONE.lock();
    tch::set_num_threads(1);
    // Every tensor a mapping of its own: what is let go is gone.
    assert_eq!(mallopt(-3, 16 << 10), 1);
    let (_, config) = configs().swap_remove(0);
    let pass = Pass { samples: 4, size: (40, 40), states: 16, kind: Kind::Float, fused: Fused::NONE };
    let net = UNet::new(&config, &Params::random(1, pass.kind, Device::Cpu)).unwrap();
    let lane = Lane::new(&config, pass);
    let workspace = unet_workspace(&config, pass).bytes as f64;
    let backward = || lane.loss(&net).backward();
    let checkpointed = || {
        let pass = net.forward_checkpointed(&lane.sample, &lane.timesteps, &lane.states, None).unwrap();
        let grad = random(&pass.prediction().size());
        drop(pass.gradients(&grad).unwrap());
    };
    let measure = |what: &str, work: &dyn Fn(), figures: &[Figure]| {
        work();
        reset_peak();
        let before = peak();
        work();
        // An upper bound that is not idle.
        within(what, peak() - before, total(figures) + workspace, 0.95, 1.6);
    };
    measure("whole", &backward, &unet_activations(&config, pass));
    measure("block by block", &checkpointed, &unet_checkpointed(&config, pass));
}

#[test]
fn what_autograd_keeps_of_a_connector_is_what_was_reckoned() {
    let _alone = ALONE.lock();
    tch::set_num_threads(1);
    let kinds = [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler, ConnectorKind::Mlp];
    let ways =
        |kind| [Fused::NONE, Fused::ALL].into_iter().flat_map(move |fused| [(kind, Kind::Float, fused), (kind, Kind::BFloat16, fused)]);
    for (kind, dtype, fused) in kinds.into_iter().flat_map(ways) {
        let (samples, tokens) = (16, 48);
        let sizes = ConnectorConfig { layers: 3, latents: 32, ..ConnectorConfig::new(kind, 256, 320) };
        let connector = Connector::init(&sizes, 1, Device::Cpu).unwrap();
        let tensors = connector.tensors().iter().map(|(name, t)| (name.clone(), t.detach().set_requires_grad(true)));
        let compute = Compute { fused, ..Compute::PLAIN };
        let connector = Connector::from_tensors(&sizes, tensors.collect::<Vec<_>>(), compute).unwrap();
        let timesteps = Tensor::from_slice(&vec![500i64; samples]);
        let gradient = random(&[samples as i64, if kind == ConnectorKind::Mlp { tokens } else { 32 }, 256]);
        let forward = || {
            let features = random(&[samples as i64, tokens, 320]).to_kind(dtype);
            inner_product(&connector.forward(&features, &timesteps, None).unwrap().states, &gradient).unwrap()
        };
        forward().backward();
        let before = allocated();
        let loss = forward();
        let kept = allocated() - before;
        drop(loss);
        let number = dtype.elt_size_in_bytes() as u64;
        // In bfloat16 the weights are kept as they were multiplied.
        let weights: i64 = Connector::layout(&sizes).unwrap().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        let weights = if dtype == Kind::Float { 0 } else { number * weights as u64 };
        let planned = connector_activations(&sizes, (samples as u64, tokens as u64), number, fused).bytes + weights;
        // In bfloat16 some of it is shared: an upper bound.
        within(&format!("{kind:?} {dtype:?} {fused:?}"), kept, planned as f64, 0.95, 1.15);
    }
}

/// By hand: SD 1.5 in bfloat16 at 512², one sample with 64 states.
#[test]
fn sd_1_5_keeps_what_a_hand_finds() {
    let config = config(&json!({
        "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }));
    let pass = Pass { samples: 1, size: (64, 64), states: 64, kind: Kind::BFloat16, fused: Fused::NONE };
    let figures = unet_activations(&config, pass);
    let bytes = |name: &str| figures.iter().find(|figure| figure.name == name).unwrap().bytes;
    // A norm, activation and convolution keep 8 bytes a channel; 8 heads 32 bytes of sums a place; a layer norm's moments are 8 bytes.
    // The first resnet and what comes before the text in the first transformer keep nothing.
    let first = 320 * 2 * 2 + 32 + 320 * 2 + 8 + 12 * 320 * 2;
    let layer = 2 * (320 * 2 + 8) + 4 * 320 * 2 + 32 + first;
    let second = 2 * 320 * 8 + 320 * 4 + layer;
    let keys = 2 * 64 * 320 * 2;
    assert_eq!(bytes("down_blocks.0"), 4096 * (first + second + 320 * 2) + 2 * keys);
    // Two residual blocks of 1280 channels on 8 × 8, and nothing else.
    assert_eq!(bytes("down_blocks.3"), 64 * 2 * 2 * 1280 * 8);
    // conv_out: one norm of 320 channels, the prediction in bfloat16, and the two sides of the loss.
    assert_eq!(bytes("conv_out and the loss"), 4096 * (320 * 8 + 4 * 2 + 2 * 4 * 4));
    let all = total(&figures);
    assert!((0.78e9..0.82e9).contains(&all), "{all}");
    // Twice the samples, twice the bytes; float32 more than bfloat16 and less than twice, for norms take float32 in either.
    assert_eq!(total(&unet_activations(&config, Pass { samples: 2, ..pass })), 2.0 * all);
    let float = total(&unet_activations(&config, Pass { kind: Kind::Float, ..pass }));
    assert!((1.5..2.0).contains(&(float / all)), "{float}");
    // What is fused keeps half: of a residual block 4 bytes a channel where it was 16.
    let fused = unet_activations(&config, Pass { fused: Fused::ALL, ..pass });
    assert_eq!(fused[3].bytes, 64 * 2 * 2 * 1280 * 2);
    assert!((1.5..2.0).contains(&(all / total(&fused))), "{}", total(&fused));
    let checkpointed = total(&unet_checkpointed(&config, pass));
    assert!(checkpointed < all / 2.0, "{checkpointed}");
}
