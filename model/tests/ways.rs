//! Every way of computing a frozen network gives the same goldens: feature maps in either layout, with each fused operator, without each, and with all.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, folder, relative, tensors};
use ella_cuda::fused::Fused;
use ella_model::config::ConfigFile;
use ella_model::params::Params;
use ella_model::params::{Compute, Layout};
use ella_model::part::Part;
use ella_model::text::{Layers, Text};
use ella_model::unet::{Added, UNet, UNetConfig};
use ella_model::vae::Vae;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const UNETS: [&str; 5] = ["unet-sd15", "unet-linear", "unet-sd2", "unet-sdxl", "unet-uneven"];

#[track_caller]
fn within(what: &str, a: &Tensor, b: &Tensor, most: f64) {
    let error = relative(a, b);
    println!("{what}: {error:.1e}");
    assert!(error <= most, "{what}: relative error {error:.1e} exceeds {most:.0e}");
}

/// Each way, with a name.
fn ways() -> Vec<(&'static str, Compute)> {
    type Switch = fn(&mut Fused) -> &mut bool;
    let with = |mut fused: Fused, switch: Switch, on| {
        *switch(&mut fused) = on;
        Compute { layout: Layout::ChannelsLast, fused }
    };
    let (one, but) = (|switch: Switch| with(Fused::NONE, switch, true), |switch: Switch| with(Fused::USUAL, switch, false));
    vec![
        ("channels-last", Compute { layout: Layout::ChannelsLast, fused: Fused::NONE }),
        ("norm", one(|f| &mut f.norm)),
        ("conv", one(|f| &mut f.conv)),
        ("resize", one(|f| &mut f.resize)),
        ("gate", one(|f| &mut f.gate)),
        ("attention", one(|f| &mut f.attention)),
        ("cross", one(|f| &mut f.cross)),
        ("pixels", one(|f| &mut f.pixels)),
        ("all but norm", but(|f| &mut f.norm)),
        ("all but conv", but(|f| &mut f.conv)),
        ("all but resize", but(|f| &mut f.resize)),
        ("all but gate", but(|f| &mut f.gate)),
        ("all but attention", but(|f| &mut f.attention)),
        ("all but cross", but(|f| &mut f.cross)),
        ("all but pixels", but(|f| &mut f.pixels)),
        ("all", Compute::FUSED),
        ("all, channels first", Compute { layout: Layout::ChannelsFirst, fused: Fused::ALL }),
    ]
}

fn unet(name: &str, compute: Compute, kind: Kind) -> UNet {
    UNet::computing(Part::open(&folder(name)).unwrap(), &[], compute, kind, CPU).unwrap()
}

/// Whether the channels of a feature map lie beside each other.
fn is_channels_last(x: &Tensor) -> bool {
    x.permute([0, 2, 3, 1]).is_contiguous()
}

/// Output and gradient of the text features, of every network and case.
fn equal_goldens(what: &str, compute: Compute, kind: Kind, (value, gradient): (f64, f64)) {
    for name in UNETS {
        let (net, golden) = (unet(name, compute, kind), Golden::open(name));
        for case in ["even", "odd"] {
            let get = |name: &str| golden.get(&format!("{case}.{name}"));
            let conditions = || Some(Added { text_embeds: get("text_embeds"), time_ids: get("time_ids") });
            let added = golden.0.shape(&format!("{case}.text_embeds")).and_then(|_| conditions());
            let states = get("hidden_states").set_requires_grad(true);
            let y = net.forward_added(&get("sample"), &get("timesteps"), &states, added.as_ref()).unwrap();
            if compute.layout == Layout::ChannelsLast {
                // From the first convolution through all blocks to the last.
                assert!(is_channels_last(&y), "{what} {name} {case}: {:?}", y.stride());
            }
            (y.to_kind(Kind::Float) * get("grad_output")).sum(Kind::Float).backward();
            within(&format!("{what} {name} {case} {kind:?} output"), &y.detach(), &get("output"), value);
            within(&format!("{what} {name} {case} {kind:?} gradient"), &states.grad(), &get("grad.hidden_states"), gradient);
        }
    }
}

#[test]
fn unets_give_the_same_values_and_gradients() {
    for (what, compute) in ways() {
        equal_goldens(what, compute, Kind::Float, (1e-5, 1e-4));
    }
}

/// The bounds of the plain way (unets.rs).
#[test]
fn in_16_bits_they_stay_as_near() {
    equal_goldens("all", Compute::FUSED, Kind::BFloat16, (2e-2, 5e-2));
    equal_goldens("all", Compute::FUSED, Kind::Half, (1e-2, 2e-2));
}

/// The goldens' heads are narrower than those whose attention is fused: a network with heads of 40 and 80 channels, as SD 1.5's.
#[test]
fn wide_heads_attend_as_the_plain_way_has_it() {
    let config = tempfile::NamedTempFile::new().unwrap();
    let json = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 16, "block_out_channels": [160, 320], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4, "cross_attention_dim": 96, "norm_num_groups": 32}"#;
    std::fs::write(config.path(), json).unwrap();
    let config = UNetConfig::read(ConfigFile::open(config.path()).unwrap()).unwrap();
    let net = |compute, kind| {
        let params = Params::random(3, kind, CPU);
        params.compute_by(compute);
        UNet::new(&config, &params).unwrap()
    };
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, CPU));
    tch::manual_seed(3);
    // As many states as the connector makes, and more than the fused way takes.
    for states in [64, 77] {
        let (sample, states, by) = (random(&[2, 4, 16, 12]), random(&[2, states, 96]), random(&[2, 4, 16, 12]));
        let both = |net: &UNet, kind: Kind| {
            let states = states.detach().set_requires_grad(true);
            let y =
                net.forward(&sample.to_kind(kind), &Tensor::from_slice(&[17i64, 801]), &states.to_kind(kind)).unwrap().to_kind(Kind::Float);
            (&y * &by).sum(Kind::Float).backward();
            [y.detach(), states.grad()]
        };
        let wanted = both(&net(Compute::PLAIN, Kind::Float), Kind::Float);
        let only = |fused| Compute { fused, ..Compute::PLAIN };
        let all = Compute { fused: Fused::ALL, ..Compute::FUSED };
        for (what, compute, kind, bounds) in [
            ("cross", only(Fused { cross: true, ..Fused::NONE }), Kind::Float, [1e-5, 1e-4]),
            ("pixels", only(Fused { pixels: true, ..Fused::NONE }), Kind::Float, [1e-5, 1e-4]),
            ("all but attention", only(Fused { attention: false, ..Fused::ALL }), Kind::Float, [1e-5, 1e-4]),
            ("all but norm", only(Fused { norm: false, ..Fused::ALL }), Kind::Float, [1e-5, 1e-4]),
            ("all", all, Kind::Float, [1e-5, 1e-4]),
            ("all", all, Kind::BFloat16, [2e-2, 5e-2]),
            ("all", all, Kind::Half, [1e-2, 2e-2]),
        ] {
            let found = both(&net(compute, kind), kind);
            if kind == Kind::Float && (what == "pixels" || states.size()[1] <= 64) {
                assert_ne!(found[0], wanted[0], "{what}: the plain way was taken");
            }
            for ((part, bound), (found, wanted)) in ["output", "gradient"].iter().zip(bounds).zip(found.iter().zip(&wanted)) {
                within(&format!("{what} {kind:?}, {} states, {part}", states.size()[1]), found, wanted, bound);
            }
        }
    }
}

#[test]
fn vaes_give_the_same_pictures_and_latents() {
    let golden = Golden::open("vae");
    for (what, compute) in ways() {
        let net = Vae::computing(Part::open(&folder("vae")).unwrap(), compute, Kind::Float, CPU).unwrap();
        let picture = net.decode(&golden.get("even.latent")).unwrap();
        assert_eq!(is_channels_last(&picture), compute.layout == Layout::ChannelsLast || compute.fused.norm, "{what}");
        within(&format!("{what} decoded"), &picture, &golden.get("even.decoded"), 1e-5);
        let (mean, logvar) = net.encode(&golden.get("even.image")).unwrap();
        within(&format!("{what} mean"), &mean, &golden.get("even.mean"), 1e-5);
        within(&format!("{what} logvar"), &logvar, &golden.get("even.logvar"), 1e-5);
    }
}

/// Block by block, and to the pooled text, which goes into every norm by the time.
#[test]
fn checkpointing_and_the_pooled_text_go_with_fused_operators() {
    let (plain, fused) = (unet("unet-sdxl", Compute::PLAIN, Kind::Float), unet("unet-sdxl", Compute::FUSED, Kind::Float));
    let golden = Golden::open("unet-sdxl");
    let get = |name: &str| golden.get(&format!("odd.{name}"));
    let gradients = |net: &UNet, checkpointed: bool| {
        let [states, text_embeds] = ["hidden_states", "text_embeds"].map(|name| get(name).set_requires_grad(true));
        let added = Added { text_embeds: text_embeds.shallow_clone(), time_ids: get("time_ids") };
        if checkpointed {
            let pass = net.forward_checkpointed(&get("sample"), &get("timesteps"), &states, Some(&added)).unwrap();
            let found = pass.gradients(&get("grad_output")).unwrap();
            return [found.hidden_states, found.text_embeds.unwrap()];
        }
        let y = net.forward_added(&get("sample"), &get("timesteps"), &states, Some(&added)).unwrap();
        (y * get("grad_output")).sum(Kind::Float).backward();
        [states.grad(), text_embeds.grad()]
    };
    let wanted = gradients(&plain, false);
    for checkpointed in [false, true] {
        for (what, (found, wanted)) in ["states", "pooled text"].iter().zip(gradients(&fused, checkpointed).iter().zip(&wanted)) {
            within(&format!("{what}, checkpointed {checkpointed}"), found, wanted, 1e-4);
        }
    }
}

/// Text encoders: T5's gated kind and plain one, and a decoder, whose norms are fused too.
#[test]
fn text_encoders_give_the_same_features() {
    for (name, file) in [("t5-gated", "inputs"), ("t5-relu", "inputs"), ("llama-gqa", "inputs-1"), ("qwen3", "inputs-2")] {
        let text = |compute, kind| Text::computing(Part::open(&folder(name)).unwrap(), compute, kind, CPU).unwrap();
        let inputs: Vec<(String, Tensor)> = tensors(&folder(name).join(format!("{file}.safetensors")));
        let input = |name: &str| inputs.iter().find(|(key, _)| key == name).unwrap().1.shallow_clone();
        let features = |net: &Text| {
            let (ids, mask) = (input("input_ids"), input("attention_mask"));
            tch::no_grad(|| net.features(&ids, &mask, Layers::Last)).unwrap()
        };
        let wanted = features(&text(Compute::PLAIN, Kind::Float));
        within(name, &features(&text(Compute::FUSED, Kind::Float)), &wanted, 1e-5);
        // In 16 bits the fused way is no farther from the truth than the plain one, but for what chance makes of it.
        let error = |compute| relative(&features(&text(compute, Kind::BFloat16)).to_kind(Kind::Float), &wanted);
        let (plain, fused) = (error(Compute::PLAIN), error(Compute::FUSED));
        println!("{name} in bfloat16: plain {plain:.1e}, fused {fused:.1e}");
        assert!(fused <= 1.5 * plain, "{name}: {fused:.1e} against {plain:.1e}");
    }
}
