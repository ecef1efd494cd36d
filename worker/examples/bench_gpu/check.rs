//! Whether the device computes what the processor does.
//!
//! Networks of goldens run by the code of `ella forward`; a random U-Net of the preset's true shape besides. Errors are max|a − b| /
//! max|b|.

use crate::Setting;
use crate::networks;
use crate::train::Trainer;
use anyhow::{Context as _, Result, ensure};
use ella_model::forward::{Net, Options, forward};
use ella_model::layers::inner_product;
use ella_model::params::{Compute, Params};
use ella_model::unet::UNet;
use ella_model::weights::{self, Weights};
use ella_proto::config::Reduction;
use ella_worker::device;
use ella_worker::precision::Precision;
use ella_worker::reduce::{Collective as _, Nccl, Solo};
use ella_worker::train::TrainError;
use ella_worker::train::graph::Graphs;
use ella_worker::train::lane::{Follow, LaneBatch};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

type Named = Vec<(String, Tensor)>;

/// What is tried, and how far it may be off: float32 without TF32, and bfloat16.
const KINDS: [(Kind, f64); 2] = [(Kind::Float, 1e-4), (Kind::BFloat16, 2e-2)];

/// A network may also be this many times as far off as the processor's own arithmetic in the same kind is: some goldens have attention so
/// sharp that bfloat16 cannot follow it anywhere (transformers' own T5 is 0.15 off).
const AS_THE_PROCESSOR: f64 = 2.0;

/// Updates of each of two runs that are to end with the same bits.
const STEPS: usize = 3;

pub(crate) fn run(setting: &Setting, goldens: Option<&Path>) -> Result<Value> {
    begin(setting.device)?;
    let mut cases = Vec::new();
    match goldens {
        Some(folder) => {
            let tried = golden_cases(folder, setting, &mut cases);
            or_failed("goldens", tried, &mut cases);
        }
        None => cases.push(json!({ "case": "goldens", "skipped": "no --goldens FOLDER is given" })),
    }
    let tried = random_unet(setting, &mut cases);
    or_failed("random U-Net", tried, &mut cases);
    let failed = cases.iter().filter(|case| case["ok"] == json!(false)).count();
    let same = same(setting)?;
    let graphs = graphs(setting).unwrap_or_else(|error| json!({ "ok": false, "error": format!("{error:#}") }));
    let (nccl, tried) = (nccl(setting), cases.len());
    let ok = failed == 0 && [&same, &graphs, &nccl].iter().all(|each| each["ok"] != json!(false));
    Ok(json!({ "ok": ok, "failed": failed, "tried": tried, "same": same, "graphs": graphs, "nccl": nccl, "cases": cases }))
}

/// One that cannot be tried is a case that fails, and the others are tried all the same.
fn or_failed(case: &str, tried: Result<()>, cases: &mut Vec<Value>) {
    cases.extend(tried.err().map(|error| json!({ "case": case, "ok": false, "error": format!("{error:#}") })));
}

/// Hundreds of small shapes, each used once: cuDNN's search would take most of the time, and attentions need not be timed.
fn begin(device: Device) -> Result<()> {
    Precision { tf32: false, deterministic: false }.set(device)?;
    if device.is_cuda() {
        ella_cuda::precision::set_benchmark(false)?;
    }
    Ok(())
}

/// A golden: what to run on what, and what must come out.
struct Golden {
    name: &'static str,
    net: Net,
    model: PathBuf,
    heads: i64,
    inputs: Named,
    expected: Named,
}

/// U-Nets, by folder; each has an even and an odd size.
const UNETS: [&str; 5] = ["unet-sd15", "unet-sd2", "unet-linear", "unet-sdxl", "unet-uneven"];
/// Connectors, and their heads.
const CONNECTORS: [(&str, i64); 5] = [("tsc-8-heads", 8), ("tsc-4-heads", 4), ("tsc-zero", 4), ("resampler", 8), ("tsc-pooled", 4)];
/// Text encoders, and the suffix of their files.
const TEXTS: [(&str, &str); 4] = [("t5-gated", ""), ("t5-relu", ""), ("clip-l", "-0"), ("clip-g", "-0")];

fn golden_cases(folder: &Path, setting: &Setting, cases: &mut Vec<Value>) -> Result<()> {
    for name in UNETS {
        let file = all(&folder.join(name).join("golden.safetensors"))?;
        for case in ["even.", "odd."] {
            let names = ["sample", "timesteps", "hidden_states", "text_embeds", "time_ids", "grad_output"];
            let expected = take(&file, case, &[("output", "sample"), ("grad.hidden_states", "grad.hidden_states")]);
            let inputs = take(&file, case, &names.map(|name| (name, name)));
            compare(&Golden { name, net: Net::Unet, model: folder.join(name), heads: 8, inputs, expected }, setting, cases);
        }
    }
    for (name, heads) in CONNECTORS {
        let file = |of: &str| all(&folder.join(name).join(of));
        let (inputs, expected) = (file("inputs.safetensors")?, file("outputs.safetensors")?);
        let model = folder.join(name).join("connector.safetensors");
        compare(&Golden { name, net: Net::Connector, model, heads, inputs, expected }, setting, cases);
    }
    for (name, number) in TEXTS {
        let file = |of: &str| all(&folder.join(name).join(format!("{of}{number}.safetensors")));
        let (inputs, expected) = (file("inputs")?, file("outputs")?);
        compare(&Golden { name, net: Net::Text, model: folder.join(name), heads: 8, inputs, expected }, setting, cases);
    }
    let file = all(&folder.join("vae/golden.safetensors"))?;
    for case in ["even.", "odd."] {
        let golden = |net, inputs, expected: &[(&str, &str)]| Golden {
            name: "vae",
            net,
            model: folder.join("vae"),
            heads: 8,
            inputs: take(&file, case, &[inputs]),
            expected: take(&file, case, expected),
        };
        let encode = golden(Net::VaeEncode, ("image", "image"), &[("mean", "mean"), ("logvar", "logvar")]);
        compare(&encode, setting, cases);
        compare(&golden(Net::VaeDecode, ("latent", "latent"), &[("decoded", "image")]), setting, cases);
    }
    Ok(())
}

/// All tensors of a file.
fn all(file: &Path) -> Result<Named> {
    let weights = Weights::open(file)?;
    let load = |name: &str| -> Result<(String, Tensor)> {
        let (shape, kind) = weights.describe(name)?;
        Ok((name.to_owned(), weights.load(name, shape, kind, Device::Cpu)?))
    };
    weights.names().map(load).collect()
}

/// Those of a case, under other names; what is not there is left out.
fn take(file: &Named, case: &str, names: &[(&str, &str)]) -> Named {
    let find = |name: &str| file.iter().find(|(known, _)| known.strip_prefix(case) == Some(name));
    names.iter().filter_map(|(name, to)| find(name).map(|(_, tensor)| ((*to).to_owned(), tensor.shallow_clone()))).collect()
}

fn compare(golden: &Golden, setting: &Setting, cases: &mut Vec<Value>) {
    let tried = compared(golden, setting, cases);
    or_failed(golden.name, tried, cases);
}

fn compared(golden: &Golden, setting: &Setting, cases: &mut Vec<Value>) -> Result<()> {
    let run = |kind, device| golden.run(kind, device).with_context(|| format!("{} on {device:?} in {kind:?}", golden.name));
    let largest = largest_gradient(&golden.expected);
    for (kind, limit) in KINDS {
        let (processor, device) = (run(kind, Device::Cpu)?, run(kind, setting.device)?);
        let mut outputs = Vec::new();
        for (name, expected) in &golden.expected {
            let of = |found: &Named| found.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.shallow_clone());
            let (own, found) = of(&processor).zip(of(&device)).with_context(|| format!("{} gave no {name}", golden.name))?;
            let errors = (relative(name, &found, expected, largest)?, relative(name, &own, expected, largest)?);
            outputs.push((name.as_str(), errors));
        }
        cases.push(verdict(golden.name, kind, &outputs, limit));
    }
    Ok(())
}

impl Golden {
    fn run(&self, kind: Kind, device: Device) -> Result<Named> {
        let folder = tempfile::tempdir()?;
        let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
        weights::save(&from, &self.inputs)?;
        let grad = matches!(self.net, Net::Unet | Net::Connector);
        forward(self.net, &self.model, &from, &to, &Options { grad, kind, device, heads: Some(self.heads), ..Options::default() })?;
        all(&to)
    }
}

/// What a network's outputs and gradients are off by, each with what the processor's own are: the one that comes nearest to its bound
/// stands for all.
fn verdict(case: &str, kind: Kind, outputs: &[(&str, (f64, f64))], limit: f64) -> Value {
    let bound = |own: f64| limit.max(AS_THE_PROCESSOR * own);
    let share = |&(_, (error, own)): &(&str, (f64, f64))| error / bound(own);
    let worst = outputs.iter().max_by(|a, b| share(a).total_cmp(&share(b)));
    let Some((output, (error, own))) = worst else { return json!({ "case": case, "ok": false, "error": "it has no outputs" }) };
    json!({
        "case": case, "dtype": networks::kind_name(kind), "outputs": outputs.len(), "worst": output, "error": error, "processor_error": own,
        "bound": bound(*own), "ok": *error <= bound(*own),
    })
}

fn most(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.f_abs()?.f_max()?.f_double_value(&[])?)
}

fn largest_gradient(expected: &Named) -> f64 {
    expected.iter().filter(|(name, _)| name.starts_with("grad.")).filter_map(|(_, tensor)| most(tensor).ok()).fold(0.0, f64::max)
}

/// max|a − b| / max|b|. A gradient that is 0 but for rounding, such as that of a bias of all keys, is measured by the largest one beside
/// it.
fn relative(name: &str, found: &Tensor, expected: &Tensor, largest: f64) -> Result<f64> {
    ensure!(found.size() == expected.size(), "{name} is {:?} (expected {:?})", found.size(), expected.size());
    let wide = |tensor: &Tensor| tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
    let (found, expected) = (wide(found)?, wide(expected)?);
    let vanishes = name.starts_with("grad.") && most(&expected)? < 1e-6 * largest;
    let error = if vanishes { most(&found)? / largest } else { most(&found.f_sub(&expected)?)? / most(&expected)? };
    // What is not a number is as far off as can be, and stays a number in JSON.
    Ok(if error.is_finite() { error } else { f64::MAX })
}

/// The preset's U-Net with random weights, at half its size: the processor has to do it as well.
fn random_unet(setting: &Setting, cases: &mut Vec<Value>) -> Result<()> {
    let config = setting.preset().unet()?;
    let build = |p: &Params| UNet::new(&config, p);
    let values = networks::values(build, Device::Cpu)?;
    let (size, width) = (setting.latent() / 2, config.cross_attention_dim);
    let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, Device::Cpu));
    let inputs = [random(&[1, 4, size, size])?, random(&[1, 64, width])?, random(&[1, 4, size, size])?];
    let run = |kind, device, compute| -> Result<[Tensor; 2]> {
        let unet = networks::network(build, &values, (kind, device), compute)?;
        let [sample, states, weight] = inputs.each_ref().map(|tensor| tensor.to_device(device));
        let states = states.f_set_requires_grad(true)?;
        let output = unet.forward(&sample, &Tensor::f_from_slice(&[500i64])?.f_to_device(device)?, &states)?;
        let gradient = Tensor::f_run_backward(&[inner_product(&output, &weight)?], &[&states], false, false)?.swap_remove(0);
        Ok([output.f_detach()?, gradient])
    };
    let expected = run(Kind::Float, Device::Cpu, Compute::PLAIN)?;
    for (kind, limit) in KINDS {
        let own =
            if kind == Kind::Float { expected.each_ref().map(Tensor::shallow_clone) } else { run(kind, Device::Cpu, Compute::PLAIN)? };
        let found = run(kind, setting.device, Compute::fastest(kind, setting.device)?)?;
        let error = |of: &[Tensor; 2], i: usize, name| relative(name, &of[i], &expected[i], 0.0);
        let both = |i, name| Ok::<_, anyhow::Error>((name, (error(&found, i, name)?, error(&own, i, name)?)));
        cases.push(verdict("random U-Net", kind, &[both(0, "sample")?, both(1, "grad.hidden_states")?], limit));
    }
    Ok(())
}

/// SAME: two runs of a few steps in deterministic mode, from the same seeds, have the same bits.
fn same(setting: &Setting) -> Result<Value> {
    let small = Setting { micro_batch: setting.micro_batch.min(4), reduction: Reduction::Exact, ..*setting };
    let run = || -> Result<Tensor> {
        tch::manual_seed(7);
        let mut trainer = Trainer::new(&small, 1)?;
        for _ in 0..STEPS {
            let batch = trainer.batch()?;
            trainer.step(&batch)?;
        }
        Ok(trainer.state.buffers.params.f_to_device(Device::Cpu)?)
    };
    let ended = run().and_then(|first| Ok(first.f_equal(&run()?)?));
    Ok(match ended {
        Ok(same) => json!({ "ok": same, "steps": STEPS, "micro_batch": small.micro_batch }),
        // An operator that has no deterministic form says so.
        Err(error) => json!({ "ok": false, "error": format!("{error:#}") }),
    })
}

/// A recorded lane's gradient has the bits of the plain one, again and again, from samples that were not there when it was recorded.
fn graphs(setting: &Setting) -> Result<Value> {
    if !setting.device.is_cuda() {
        return Ok(json!({ "skipped": "a processor records no lanes" }));
    }
    let small = Setting { micro_batch: setting.micro_batch.min(4), ..*setting };
    let (networks, _) = networks::step(&small, 1)?;
    let batches = (0..6).map(|_| networks::to_device(&networks::samples(&small)?, setting.device)).collect::<Result<Vec<_>>>()?;
    Precision { tf32: false, deterministic: true }.set(setting.device)?;
    let mut recorded = Graphs::new(setting.device);
    let compare = |batch: &LaneBatch| -> Result<bool> {
        let plain = networks.gradient(batch, 4)?;
        let mut parts = Parts::default();
        let loss = recorded.gradient_in_parts(&networks, batch, 4, &mut parts)?;
        parts.0.reverse();
        Ok(Tensor::f_cat(&parts.0, 0)?.f_equal(&plain.grad)? && loss.f_equal(&plain.loss_sum)?)
    };
    let same = batches.iter().map(compare).collect::<Result<Vec<_>>>();
    begin(setting.device)?;
    let (same, count) = (same?, recorded.count());
    Ok(json!({ "ok": count == 1 && same.iter().all(|same| *same), "recorded": count, "same_bits": same }))
}

/// A gradient's stretches, the last first.
#[derive(Default)]
struct Parts(Vec<Tensor>);

impl Follow for Parts {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn part(&mut self, _: std::ops::Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        self.0.push(gradient.copy());
        Ok(())
    }
}

/// A sum of the connector's size by ella's own NCCL engine, in a world of one.
fn nccl(setting: &Setting) -> Value {
    let Device::Cuda(ordinal) = setting.device else { return json!({ "skipped": "NCCL sums tensors of a GPU only" }) };
    let library = match device::nccl() {
        Ok(library) => library,
        Err(error) => return json!({ "skipped": error.to_string() }),
    };
    let tried = || -> Result<Value> {
        let mut ranks = Nccl::connect(Box::new(Solo::default()), &library, ordinal as u32, Duration::from_secs(60))?;
        let mut ok = true;
        for kind in [Kind::Float, Kind::Int64, Kind::BFloat16] {
            // Numbers that all of them have.
            let expected = Tensor::f_randint(256, [66_820_608], (kind, setting.device))?;
            let mut sum = expected.copy();
            ranks.sum_tensor(&mut sum)?;
            ok &= sum.f_equal(&expected)?;
        }
        let mut buffer = Tensor::f_randn([66_820_608], (Kind::Float, setting.device))?;
        let begin = Instant::now();
        ranks.sum_tensor(&mut buffer)?;
        Ok(json!({ "ok": ok, "world": 1, "ms": 1e3 * begin.elapsed().as_secs_f64(), "bytes": 4 * buffer.numel() }))
    };
    tried().unwrap_or_else(|error| json!({ "ok": false, "error": format!("{error:#}") }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole part on a processor, where every case is as good as the processor's own.
    #[test]
    fn the_processor_passes_its_own_check() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens");
        let setting = Setting::nano(Duration::from_millis(20));
        let found = run(&setting, Some(&goldens)).unwrap();
        let cases = found["cases"].as_array().unwrap();
        // Ten of U-Nets, five connectors, four encoders, four of the VAE, the random U-Net; each in both dtypes.
        assert_eq!(cases.len(), 2 * (10 + 5 + 4 + 4 + 1));
        let bad: Vec<_> = cases.iter().filter(|case| case["ok"] != json!(true)).collect();
        assert!(bad.is_empty() && found["ok"] == json!(true), "{bad:?} {}", found["same"]);
        assert!(found["nccl"]["skipped"].is_string());
    }

    #[test]
    fn what_cannot_be_tried_fails_alone() {
        let setting = Setting::nano(Duration::from_millis(20));
        let mut cases = Vec::new();
        let golden =
            Golden { name: "vae", net: Net::VaeDecode, model: "/nowhere".into(), heads: 8, inputs: Vec::new(), expected: Vec::new() };
        compare(&golden, &setting, &mut cases);
        let error = cases[0]["error"].as_str().unwrap();
        assert!(cases.len() == 1 && cases[0]["ok"] == json!(false) && error.starts_with("vae on Cpu in Float: "), "{error}");
    }

    #[test]
    fn what_is_off_fails_and_what_the_processor_cannot_either_does_not() {
        let of = |outputs: &[(&str, (f64, f64))]| verdict("x", Kind::BFloat16, outputs, 2e-2);
        assert_eq!(of(&[("a", (3e-2, 1e-3)), ("b", (0.2, 0.15))])["ok"], false);
        assert_eq!(of(&[("a", (3e-2, 1e-3)), ("b", (0.2, 0.15))])["worst"], "a");
        assert_eq!((of(&[("b", (0.2, 0.15))])["ok"].clone(), of(&[])["ok"].clone()), (json!(true), json!(false)));
        let (a, nan) = (Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[1f32, f32::NAN]));
        assert_eq!(relative("a", &nan, &a, 0.0).unwrap(), f64::MAX);
        assert!(relative("a", &a, &a.narrow(0, 0, 1), 0.0).is_err());
    }
}
