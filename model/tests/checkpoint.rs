//! Gradients made block by block are those of the whole graph.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, folder, relative, tensors};
use ella_model::forward::{self, Net, Options};
use ella_model::unet::{Added, UNet};
use ella_model::{ModelError, weights};
use tch::{Device, Kind, Tensor};

const UNETS: [&str; 5] = ["unet-sd15", "unet-linear", "unet-sd2", "unet-sdxl", "unet-uneven"];

/// A case's conditions, where the network takes them; the pooled text requires gradients if asked.
fn added(golden: &Golden, case: &str, pooled: bool) -> Option<Added> {
    golden.0.shape(&format!("{case}.text_embeds"))?;
    let get = |name| golden.get(&format!("{case}.{name}"));
    Some(Added { text_embeds: get("text_embeds").set_requires_grad(pooled), time_ids: get("time_ids") })
}

/// In float32 they differ by the order of sums. In the 16-bit kinds, where autograd rounds the sum over blocks each time and this does not,
/// by a few of their steps.
#[test]
fn gradients_equal_those_of_the_whole_graph() {
    for (kind, most) in [(Kind::Float, 1e-6), (Kind::BFloat16, 5e-2), (Kind::Half, 5e-3)] {
        for name in UNETS {
            let (net, golden) = (UNet::load(&folder(name), kind, Device::Cpu).unwrap(), Golden::open(name));
            for (case, pooled) in [("even", false), ("odd", false), ("even", true), ("odd", true)] {
                let get = |name: &str| golden.get(&format!("{case}.{name}"));
                let (sample, timesteps, grad_output) = (get("sample"), get("timesteps"), get("grad_output"));
                let (states, conditions) = (get("hidden_states").set_requires_grad(true), added(&golden, case, pooled));
                let output = net.forward_added(&sample, &timesteps, &states, conditions.as_ref()).unwrap();
                (output.to_kind(Kind::Float) * &grad_output).sum(Kind::Float).backward();

                let pass = net.forward_checkpointed(&sample, &timesteps, &states, conditions.as_ref()).unwrap();
                assert!(pass.prediction().equal(&output) && !pass.prediction().requires_grad(), "{name} {case} {kind:?}");
                let found = pass.gradients(&grad_output).unwrap();
                assert_eq!(found.hidden_states.kind(), Kind::Float);
                let error = relative(&found.hidden_states, &states.grad());
                assert!(error <= most, "{name} {case} {kind:?}: {error:.1e}");
                let wanted = conditions.filter(|_| pooled);
                assert_eq!(found.text_embeds.is_some(), wanted.is_some());
                if let (Some(found), Some(added)) = (found.text_embeds, wanted) {
                    let error = relative(&found, &added.text_embeds.grad());
                    assert!(error <= most, "{name} {case} {kind:?} text_embeds: {error:.1e}");
                }
            }
        }
    }
}

#[test]
fn a_gradient_of_another_shape_is_refused() {
    let (net, golden) = (UNet::load(&folder("unet-sd15"), Kind::Float, Device::Cpu).unwrap(), Golden::open("unet-sd15"));
    let get = |name: &str| golden.get(&format!("odd.{name}"));
    let pass = net.forward_checkpointed(&get("sample"), &get("timesteps"), &get("hidden_states"), None).unwrap();
    let error = pass.gradients(&get("grad_output").narrow(3, 0, 1)).unwrap_err().to_string();
    assert_eq!(error, "grad_prediction must be [3, 4, 9, 7] (found [3, 4, 9, 1] Float)");
}

/// The outputs of `ella forward` on a case, by name.
fn run(net: Net, model: &str, options: Options) -> ella_model::Result<Vec<(String, Tensor)>> {
    let (dir, golden) = (tempfile::tempdir().unwrap(), Golden::open(model));
    let (from, to) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let names = ["sample", "timesteps", "hidden_states", "text_embeds", "time_ids", "grad_output"];
    let there = names.into_iter().filter(|name| golden.0.shape(&format!("odd.{name}")).is_some());
    let inputs: Vec<_> = there.map(|name| (name.to_owned(), golden.get(&format!("odd.{name}")))).collect();
    weights::save(&from, &inputs).unwrap();
    forward::forward(net, &folder(model), &from, &to, &options)?;
    Ok(tensors(&to))
}

#[test]
fn forward_gives_the_same_with_and_without() {
    for (model, expected) in [("unet-sd15", 2), ("unet-sdxl", 3)] {
        let grad = Options { grad: true, ..Options::default() };
        let (whole, blocks) = (run(Net::Unet, model, grad).unwrap(), run(Net::Unet, model, Options { checkpoint: true, ..grad }).unwrap());
        assert_eq!((whole.len(), blocks.len()), (expected, expected));
        for ((name, a), (same, b)) in whole.iter().zip(&blocks) {
            assert_eq!(name, same);
            let error = relative(b, a);
            assert!(error <= 1e-6, "{model} {name}: {error:.1e}");
        }
    }
    for (net, grad) in [(Net::Connector, true), (Net::Unet, false)] {
        let error = run(net, "unet-sd15", Options { grad, checkpoint: true, ..Options::default() }).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    }
}
