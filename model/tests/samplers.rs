//! The samplers against diffusers. `goldens/samplers.py` made the expected values.
//!
//! The relative error of a latent is max|a − b| / max|b|.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::relative;
use ella_model::config::ConfigFile;
use ella_model::sampler::{Dpm, Method, Sampler};
use ella_model::schedule::{Prediction, Schedule, ScheduleConfig};
use ella_model::weights::Weights;
use ella_model::{ModelError, Result};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

const STEPS: usize = 20;
/// The counts of steps whose timesteps are compared, in the golden's order.
const COUNTS: [usize; 7] = [1, 2, 7, 30, 50, 14, 15];
const TOLERANCE: f64 = 1e-4;

struct Golden {
    weights: Weights,
    configs: Map<String, Value>,
}

impl Golden {
    fn open() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/samplers");
        let configs = serde_json::from_slice(&std::fs::read(folder.join("configs.json")).unwrap()).unwrap();
        Golden { weights: Weights::open(&folder.join("golden.safetensors")).unwrap(), configs }
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let (shape, kind) = self.weights.describe(name).ok()?;
        Some(self.weights.load(name, shape, kind, Device::Cpu).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("no golden {name}"))
    }

    fn schedule(&self, name: &str) -> Schedule {
        schedule(self.configs[name].clone())
    }
}

fn schedule(config: Value) -> Schedule {
    let Value::Object(fields) = config else { panic!("not an object: {config}") };
    let config = ConfigFile::from_map(Path::new("scheduler_config.json"), fields);
    Schedule::new(ScheduleConfig::read(config).unwrap(), Device::Cpu).unwrap()
}

/// What stands in for a U-Net in the goldens.
fn model_output(x: &Tensor, t: f32) -> Tensor {
    (x * 0.7 + f64::from(t) / 1000.0).tanh()
}

/// The latents before the first step and after each.
fn sequence(sampler: &mut dyn Sampler, noise: &Tensor, random: &Tensor) -> Vec<Tensor> {
    let mut latents = vec![noise * sampler.init_sigma()];
    for (index, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
        let x = &latents[index];
        let output = model_output(&sampler.scale_input(x, index).unwrap(), t);
        latents.push(sampler.step(&output, index, x, &mut || Ok(random.get(index as i64))).unwrap());
    }
    latents
}

/// The worst relative error of a sequence.
fn worst(latents: &[Tensor], expected: &Tensor) -> f64 {
    assert_eq!(latents.len() as i64, expected.size()[0]);
    latents.iter().enumerate().map(|(i, x)| relative(x, &expected.get(i as i64))).fold(0.0, f64::max)
}

#[test]
fn latents_equal_diffusers_over_twenty_steps() {
    let golden = Golden::open();
    let (noise, random) = (golden.get("noise"), golden.get("steps"));
    let mut compared = 0;
    for (name, method) in Method::NAMES {
        let mut most: f64 = 0.0;
        for config in golden.configs.keys() {
            let Some(expected) = golden.find(&format!("{config}.{name}")) else {
                // The reference's has no sample prediction.
                assert!(method == Method::EulerAncestral && config.starts_with("sample"), "no golden {config}.{name}");
                continue;
            };
            let mut sampler = method.sampler(&golden.schedule(config), STEPS).unwrap();
            let error = worst(&sequence(sampler.as_mut(), &noise, &random), &expected);
            assert!(error <= TOLERANCE, "{config}, {name}: relative error {error:.2e} exceeds {TOLERANCE:.0e}");
            (most, compared) = (most.max(error), compared + 1);
        }
        println!("{name}: relative error at most {most:.2e} (at most {TOLERANCE:.0e})");
    }
    assert_eq!(compared, golden.configs.len() * Method::NAMES.len() - 3);
}

#[test]
fn the_last_step_of_few_is_of_the_first_order_whatever_it_ends_at() {
    let golden = Golden::open();
    let (noise, random) = (golden.get("noise"), golden.get("steps"));
    for count in [14, 15] {
        let mut sampler = Dpm::new(&golden.schedule("final-sigma"), count).unwrap();
        let error = worst(&sequence(&mut sampler, &noise, &random), &golden.get(&format!("final-sigma.dpm++2m.{count}")));
        assert!(error <= TOLERANCE, "{count} steps: relative error {error:.2e} exceeds {TOLERANCE:.0e}");
    }
}

#[test]
fn timesteps_equal_diffusers() {
    let golden = Golden::open();
    let mut compared = 0;
    for (name, method) in Method::NAMES {
        for config in golden.configs.keys() {
            let Some(expected) = golden.find(&format!("{config}.{name}.timesteps")) else { continue };
            let expected: Vec<f32> = Vec::try_from(expected).unwrap();
            let schedule = golden.schedule(config);
            let found: Vec<f32> = COUNTS.iter().flat_map(|&count| method.sampler(&schedule, count).unwrap().timesteps().to_vec()).collect();
            assert_eq!(found, expected, "{config}, {name}");
            compared += 1;
        }
    }
    assert_eq!(compared, 5 * 4);
}

#[test]
fn what_the_network_predicts_makes_no_difference_to_where_it_leads() {
    let golden = Golden::open();
    let (noise, random) = (golden.get("noise"), golden.get("steps"));
    for (name, method) in Method::NAMES {
        let run = |prediction: Prediction| {
            let mut config = golden.schedule("epsilon-trailing").config().clone();
            config.prediction = prediction;
            let schedule = Schedule::new(config, Device::Cpu).unwrap();
            let mut sampler = method.sampler(&schedule, 10).unwrap();
            let mut x = &noise * sampler.init_sigma();
            for (index, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
                let input = sampler.scale_input(&x, index).unwrap();
                // Euler's timesteps are whole here too; Karras' levels are not those of their timesteps, so the same image is not asked of them.
                let bar = f64::from(schedule.alphas_cumprod()[t as usize]);
                let (signal, sigma) = (bar.sqrt(), (1.0 - bar).sqrt());
                let image = model_output(&input, t);
                let epsilon = (&input - &image * signal) / sigma;
                let output = match prediction {
                    Prediction::Epsilon => epsilon,
                    Prediction::Velocity => epsilon * signal - image * sigma,
                    Prediction::Sample => image,
                };
                x = sampler.step(&output, index, &x, &mut || Ok(random.get(index as i64))).unwrap();
            }
            x
        };
        if method != Method::Dpm2MKarras {
            let expected = run(Prediction::Sample);
            for prediction in [Prediction::Epsilon, Prediction::Velocity] {
                let error = relative(&run(prediction), &expected);
                assert!(error <= TOLERANCE, "{name}, {prediction:?}: relative error {error:.2e}");
            }
        }
    }
}

#[test]
fn an_image_is_what_sample_prediction_trains_towards() {
    let golden = Golden::open();
    let schedule = golden.schedule("sample-leading");
    let (x0, noise, t) = (golden.get("noise"), golden.get("steps").get(0), Tensor::from_slice(&[999i64]));
    assert_eq!(schedule.target(&x0, &noise, &t).unwrap(), x0);
    let bar = f64::from(schedule.alphas_cumprod()[999]);
    let weight = |gamma: f64| schedule.min_snr_weights(&t, gamma).unwrap().double_value(&[0]);
    assert!((weight(5.0) * (1.0 - bar) / bar - 1.0).abs() < 1e-5);
    assert_eq!(weight(0.001953125), 0.001953125);
}

#[test]
fn only_ancestral_steps_ask_for_noise_and_a_sampler_can_start_anew() {
    let golden = Golden::open();
    let (noise, random) = (golden.get("noise"), golden.get("steps"));
    for (name, method) in Method::NAMES {
        let mut sampler = method.sampler(&golden.schedule("epsilon-leading"), 4).unwrap();
        let first = sequence(sampler.as_mut(), &noise, &random);
        assert_eq!(sequence(sampler.as_mut(), &noise, &random), first, "{name}");
        let mut asked = 0;
        for (index, x) in first[..4].iter().enumerate() {
            let mut fresh = || {
                asked += 1;
                Ok(random.get(0))
            };
            let _ = sampler.step(x, index, x, &mut fresh).unwrap();
        }
        // Nothing is added to the last: it ends without noise.
        assert_eq!(asked, if method.is_random() { 3 } else { 0 }, "{name}");
    }
}

#[test]
fn names_are_read_as_they_are_written_and_unknown_ones_refused_with_the_known() {
    for (name, method) in Method::NAMES {
        assert_eq!((name.parse::<Method>().unwrap(), method.to_string().as_str()), (method, name));
    }
    let text = "heun".parse::<Method>().unwrap_err().to_string();
    assert_eq!(text, "sampler must be ddim or euler or euler-a or dpm++2m or dpm++2m-karras (found \"heun\")");
}

fn argument<T: std::fmt::Debug>(result: Result<T>) -> (String, String, String) {
    match result {
        Err(ModelError::Input { what, expected, found }) => (what, expected, found),
        other => panic!("{other:?}"),
    }
}

#[test]
fn counts_of_steps_out_of_range_are_refused() {
    let golden = Golden::open();
    let (leading, trailing) = (golden.schedule("epsilon-leading"), golden.schedule("epsilon-trailing"));
    for (name, method) in Method::NAMES {
        let most = if matches!(method, Method::Dpm2M | Method::Dpm2MKarras) { 999 } else { 1000 };
        for steps in [0, most + 1, usize::MAX] {
            let expected = ("steps".into(), format!("1 to {most}"), steps.to_string());
            assert_eq!(argument(method.sampler(&trailing, steps)), expected, "{name}");
        }
        let sampler = method.sampler(&trailing, most).unwrap();
        assert_eq!(sampler.timesteps().len(), most, "{name}");
        assert!(sampler.timesteps().windows(2).all(|pair| pair[0] >= pair[1]), "{name}");
        // 1000 steps (999 of DPM-Solver++) with an offset of 1 would ask for timestep 1000.
        if method != Method::Dpm2MKarras {
            assert!(argument(method.sampler(&leading, most)).1.contains("steps_offset 1"), "{name}");
        }
    }
}

#[test]
fn steps_that_are_not_there_or_out_of_order_are_refused() {
    let golden = Golden::open();
    let x = golden.get("noise");
    for (name, method) in Method::NAMES {
        let mut sampler = method.sampler(&golden.schedule("epsilon-leading"), 4).unwrap();
        let beyond = ("index".into(), "less than 4".into(), "4".into());
        assert_eq!(argument(sampler.scale_input(&x, 4)), beyond, "{name}");
        assert_eq!(argument(sampler.step(&x, 4, &x, &mut || Ok(x.shallow_clone()))), beyond, "{name}");
    }
    let mut sampler = Dpm::new(&golden.schedule("epsilon-leading"), 4).unwrap();
    let mut step = |index: usize| sampler.step(&x, index, &x, &mut || panic!("takes no noise"));
    assert_eq!(argument(step(1)).0, "index");
    let _ = step(0).unwrap();
    assert_eq!(argument(step(2)), ("index".into(), "0, or one more than the last step's".into(), "2".into()));
    let _ = step(1).unwrap();
}

#[test]
fn noise_that_cannot_be_had_stops_a_step() {
    let golden = Golden::open();
    let x = golden.get("noise");
    let mut sampler = Method::EulerAncestral.sampler(&golden.schedule("epsilon-leading"), 4).unwrap();
    let result = sampler.step(&x, 0, &x, &mut || Err(ModelError::argument("noise", "there", "nothing")));
    assert_eq!(argument(result).0, "noise");
}

#[test]
fn configurations_of_other_samplers_describe_the_same_noise() {
    let named = |class: &str, more: Value| {
        let mut config = json!({"_class_name": class, "beta_schedule": "scaled_linear"});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        schedule(config).alphas_cumprod().to_vec()
    };
    let expected = named("DDIMScheduler", json!({}));
    assert_eq!(named("EulerAncestralDiscreteScheduler", json!({})), expected);
    let dpm = json!({
        "algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": false, "lower_order_final": true,
        "sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "thresholding": false, "use_karras_sigmas": true,
        "use_lu_lambdas": false, "variance_type": null, "use_flow_sigmas": false, "flow_shift": 1.0, "use_dynamic_shifting": false,
    });
    assert_eq!(named("DPMSolverMultistepScheduler", dpm), expected);
}
