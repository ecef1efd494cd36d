//! The step's arithmetic: the loss by its formula, and the gradient as the sum of lanes.

use crate::world::{EPOCH, LANES, config, difference, fed, load, path, sdxl, text};
use ella_proto::config::RunConfig;
use ella_worker::models::Loaded;
use ella_worker::train::lane::{LaneBatch, Networks};
use ella_worker::train::split::Split;
use tch::{Kind, Tensor};

pub(crate) fn batches(config: &RunConfig, step: u64) -> Vec<LaneBatch> {
    let input = fed(config, 0..LANES, step..step + 1).next_step().unwrap();
    input.lanes.into_iter().filter_map(|lane| lane.batch).collect()
}

/// Lanes as one batch; features of ragged rows are filled up.
fn together(lanes: &[LaneBatch]) -> LaneBatch {
    let cat = |field: fn(&LaneBatch) -> &Tensor| Tensor::cat(&lanes.iter().map(field).collect::<Vec<_>>(), 0);
    let longest = lanes.iter().map(|lane| lane.features.size()[1]).max().unwrap();
    let missing = |lane: &LaneBatch| longest - lane.features.size()[1];
    let features: Vec<Tensor> = lanes.iter().map(|lane| lane.features.constant_pad_nd([0, 0, 0, missing(lane)])).collect();
    let masks: Option<Vec<Tensor>> = lanes.iter().map(|lane| Some(lane.mask.as_ref()?.constant_pad_nd([0, missing(lane)]))).collect();
    LaneBatch {
        latents: cat(|b| &b.latents),
        noise: cat(|b| &b.noise),
        timesteps: cat(|b| &b.timesteps),
        features: Tensor::cat(&features, 0),
        mask: masks.map(|masks| Tensor::cat(&masks, 0)),
        time_ids: cat(|b| &b.time_ids),
    }
}

fn number(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

pub(crate) fn sum_of_lanes(networks: &Networks, lanes: &[LaneBatch], samples: u64) -> (Tensor, f64) {
    let each: Vec<_> = lanes.iter().map(|lane| networks.gradient(lane, samples).unwrap()).collect();
    (Tensor::stack(&each.iter().map(|g| &g.grad).collect::<Vec<_>>(), 0).sum_dim_intlist([0i64].as_slice(), false, Kind::Float), {
        each.iter().map(|g| number(&g.loss_sum)).sum()
    })
}

/// Full lanes, and an epoch's last step with lanes of 1, 1, 1 and 0 samples; masked too, and weighted.
#[test]
fn the_sum_over_lanes_is_the_gradient_of_the_mean_over_the_whole_batch() {
    for set in [&[][..], &["text.padding=none"], &["train.snr_gamma=5.0"], &[sdxl().as_str()]] {
        let config = config(set);
        let networks = load(&config).networks;
        for (step, expected) in [(0, 8), (EPOCH - 1, 3)] {
            let lanes = batches(&config, step);
            let whole = together(&lanes);
            let samples = whole.len() as u64;
            assert_eq!(samples, expected);
            let (sum, loss) = sum_of_lanes(&networks, &lanes, samples);
            let one = networks.gradient(&whole, samples).unwrap();
            let found = difference(&sum, &one.grad);
            assert!(found < 1e-4, "{set:?}, step {step}: {found}");
            let expected = number(&one.loss_sum);
            assert!((loss - expected).abs() < 1e-4 * expected);
            assert!((number(&networks.evaluate(&whole).unwrap()) - expected).abs() < 1e-5 * expected);
            assert!(one.grad.abs().max().double_value(&[]) > 0.0);
        }
    }
}

/// A lane whose pass through the U-Net is cut to fit a GPU's memory: the same loss and gradient but for rounding, on every path.
#[test]
fn a_lane_in_pieces_has_the_gradient_of_the_whole() {
    for set in [&[][..], &["train.gradient_checkpointing=true"], &["text.padding=none"], &[sdxl().as_str()]] {
        let config = config(set);
        let mut networks = load(&config).networks;
        let lane = together(&batches(&config, 0));
        let whole = networks.gradient(&lane, 8).unwrap();
        for most in [5, 3, 1] {
            networks.split = Split::found(most);
            let pieces = networks.gradient(&lane, 8).unwrap();
            let found = difference(&pieces.grad, &whole.grad);
            assert!(found < 1e-4, "{set:?}, at most {most}: {found}");
            assert!((number(&pieces.loss_sum) - number(&whole.loss_sum)).abs() < 1e-5 * number(&whole.loss_sum));
        }
    }
}

/// The same loss, and the same gradient but for the order of sums; with loss scaling too.
#[test]
fn a_gradient_made_block_by_block_is_that_of_the_whole_graph() {
    let (nano, sdxl) = (format!("base.model={}", text(path("base"))), sdxl());
    for (base, dtype, most) in [(&nano, "base.dtype=fp32", 1e-5), (&nano, "base.dtype=fp16", 2e-2), (&sdxl, "base.dtype=fp32", 1e-5)] {
        let (whole, blocks) = (config(&[base, dtype]), config(&[base, dtype, "train.gradient_checkpointing=true"]));
        assert_eq!(whole.binding_differences(&blocks), ["train.gradient_checkpointing"]);
        let lane = &batches(&whole, 0)[0];
        let gradient = |config: &RunConfig| load(config).networks.gradient(lane, 8).unwrap();
        let (whole, blocks) = (gradient(&whole), gradient(&blocks));
        assert_eq!(number(&whole.loss_sum), number(&blocks.loss_sum), "{base} {dtype}");
        let found = difference(&blocks.grad, &whole.grad);
        assert!(found < most, "{base} {dtype}: {found}");
    }
}

/// The pooled head's gradient, which comes through the U-Net's time embedding only, against differences of the loss; and the sizes count.
#[test]
fn a_base_of_sdxl_s_kind_trains_the_pooled_head_and_heeds_sizes() {
    let config = config(&[&sdxl()]);
    let Loaded { networks, state, .. } = load(&config);
    let batch = together(&batches(&config, 0));
    let gradient = networks.gradient(&batch, 1).unwrap().grad;
    for name in ["pool.c_proj.weight", "pool.q_proj.bias", "pool.positional_embedding"] {
        let entry = state.layout.entries().iter().find(|entry| entry.name == name).unwrap();
        let part = gradient.narrow(0, entry.offset, entry.len);
        // Along the gradient, the loss grows by its length.
        let (length, params) = (part.norm().double_value(&[]), state.buffers.params.narrow(0, entry.offset, entry.len));
        let (before, way) = (params.copy(), &part / length * 0.05);
        let at = |sign: f64| {
            tch::no_grad(|| params.shallow_clone().copy_(&(&before + &way * sign)));
            number(&networks.evaluate(&batch).unwrap())
        };
        let slope = (at(1.0) - at(-1.0)) / 0.1;
        at(0.0);
        println!("{name}: gradient {length:.4e}, difference {slope:.4e}");
        assert!(length > 1e-4 && (slope / length - 1.0).abs() < 0.05, "{name}: gradient {length}, difference {slope}");
    }
    let cropped = LaneBatch { time_ids: &batch.time_ids + 8.0, ..batch.shallow_clone() };
    assert_ne!(number(&networks.evaluate(&cropped).unwrap()), number(&networks.evaluate(&batch).unwrap()));
}

/// A base like the world's whose scheduler says this.
fn base_with(name: &str, key: &str, value: serde_json::Value) -> String {
    let base = path(name);
    std::fs::create_dir_all(base.join("scheduler")).unwrap();
    for part in ["unet", "vae"] {
        let _ = std::os::unix::fs::symlink(path("base").join(part), base.join(part));
    }
    let from = std::fs::read(path("base/scheduler/scheduler_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&from).unwrap();
    config[key] = value;
    std::fs::write(base.join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    format!("base.model={}", text(base))
}

/// ε and v, with and without min-SNR-5, against the formulas in float64 (paper §2; arXiv 2303.09556 §3.4; Imagen Video §2.4).
#[test]
fn losses_follow_their_formulas() {
    let velocity = base_with("velocity", "prediction_type", "v_prediction".into());
    for (set, is_velocity, gamma) in [
        (vec![], false, None),
        (vec!["train.snr_gamma=5.0"], false, Some(5.0)),
        (vec![velocity.as_str()], true, None),
        (vec![velocity.as_str(), "train.snr_gamma=5.0"], true, Some(5.0)),
    ] {
        let config = config(&set);
        let networks = load(&config).networks;
        let batch = together(&batches(&config, 0));
        let found = tch::no_grad(|| networks.losses(&batch)).unwrap();
        for row in 0..batch.len() {
            let one = |x: &Tensor| x.narrow(0, row, 1);
            let (x0, noise) = (one(&batch.latents), one(&batch.noise));
            let a = f64::from(networks.schedule.alphas_cumprod()[batch.timesteps.int64_value(&[row]) as usize]);
            let noisy = &x0 * a.sqrt() + &noise * (1.0 - a).sqrt();
            let t = one(&batch.timesteps);
            let predicted = tch::no_grad(|| {
                let states = networks.connector.forward(&one(&batch.features), &t, None).unwrap().states;
                networks.unet.forward(&noisy, &t, &states).unwrap()
            });
            let target = if is_velocity { &noise * a.sqrt() - &x0 * (1.0 - a).sqrt() } else { noise };
            let mean = (predicted - target).to_kind(Kind::Double).square().mean(Kind::Double).double_value(&[]);
            let snr = a / (1.0 - a);
            let weight = gamma.map_or(1.0, |gamma: f64| snr.min(gamma) / if is_velocity { snr + 1.0 } else { snr });
            let got = found.double_value(&[row]);
            assert!((got - weight * mean).abs() < 1e-4 * (weight * mean), "{set:?}, row {row}: {got}, expected {}", weight * mean);
        }
    }
}

/// How alike two gradients point.
fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    (a.dot(&b) / (a.norm() * b.norm())).double_value(&[])
}

/// Frozen networks in half precision give the gradient of float32 but for their rounding. A global batch of millions makes gradients
/// smaller than float16 can hold: they must survive the way through the U-Net all the same.
#[test]
fn frozen_networks_in_half_precision_give_the_same_gradient_nearly() {
    let exact = config(&[]);
    let lanes = batches(&exact, 0);
    let networks = load(&exact).networks;
    for (dtype, kind) in [("base.dtype=bf16", Kind::BFloat16), ("base.dtype=fp16", Kind::Half)] {
        let half = load(&config(&[dtype])).networks;
        assert_eq!(half.kind, kind);
        for samples in [8, 1 << 24] {
            let (expected, found) = (networks.gradient(&lanes[0], samples).unwrap(), half.gradient(&lanes[0], samples).unwrap());
            assert_eq!(found.grad.kind(), Kind::Float);
            let (alike, ratio) = (cosine(&found.grad, &expected.grad), (found.grad.norm() / expected.grad.norm()).double_value(&[]));
            assert!(alike > 0.98 && (ratio - 1.0).abs() < 0.05, "{dtype}, {samples} samples: {alike} {ratio}");
            assert!((number(&found.loss_sum) / number(&expected.loss_sum) - 1.0).abs() < 0.05);
        }
    }
}

/// A connector that computes in bfloat16 gives the gradient of float32 but for its rounding, in float32.
#[test]
fn a_connector_in_bfloat16_gives_the_same_gradient_nearly() {
    let (exact, short) = (config(&["connector.layers=3"]), config(&["connector.layers=3", "connector.dtype=bf16"]));
    assert_eq!(exact.binding_differences(&short), ["connector.dtype"]);
    let lanes = batches(&exact, 0);
    let [expected, found] = [&exact, &short].map(|config| load(config).networks.gradient(&lanes[0], 8).unwrap());
    assert_eq!((found.grad.kind(), found.grad.size()), (Kind::Float, expected.grad.size()));
    assert!((number(&found.loss_sum) / number(&expected.loss_sum) - 1.0).abs() < 2e-2);
    let off = ((&found.grad - &expected.grad).norm() / expected.grad.norm()).double_value(&[]);
    println!("bfloat16 connector: gradient off by {off:.1e}");
    assert!(off > 0.0 && off < 2e-2, "{off}");
}
