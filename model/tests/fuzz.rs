//! Damaged files of every kind that is read: a typed error or success, never a panic, never memory that the file does not account for.
//!
//! Seeded: a failure names its seed. `ELLA_FUZZ_ROUNDS` asks for more rounds than the few hundred of each kind.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::{folder, tensors};
use ella_model::base::Base;
use ella_model::clip::{Clip, ClipConfig};
use ella_model::config::ConfigFile;
use ella_model::connector::Connector;
use ella_model::params::Params;
use ella_model::part::Part;
use ella_model::schedule::Schedule;
use ella_model::text::{Text, TextConfig};
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights::{self, Weights};
use ella_model::{ModelError, Result, clip_tokenizer, unigram};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const ROUNDS: u64 = 300;
/// More than all the tests here need at once, and far less than a forged size asks for.
const MEMORY_KIB: u64 = 3 << 20;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Runs `case` with many seeds, each in the same folder.
fn fuzz(what: &str, case: impl Fn(&mut Rng, &Path) -> Result<()>) {
    let rounds = std::env::var("ELLA_FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for seed in 0..rounds {
        let outcome = catch_unwind(AssertUnwindSafe(|| case(&mut Rng(seed), dir.path())));
        match outcome.unwrap_or_else(|_| panic!("{what}: panics with seed {seed}")) {
            Ok(()) => {}
            Err(ModelError::Torch(error)) => panic!("{what}: seed {seed} gets as far as libtorch: {error}"),
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(text.len() < 4000, "{what}: seed {seed} is told at length: {} bytes", text.len());
            }
        }
    }
    println!("{what}: {refused} of {rounds} refused");
    assert!(refused > 0, "{what}: nothing was refused");
    if let Some(peak) = peak_kib() {
        assert!(peak < MEMORY_KIB, "{what}: {peak} KiB");
    }
}

/// The most memory that this process has had.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

/// Bytes flipped, cut off, repeated or put in.
fn damage(rng: &mut Rng, bytes: &mut Vec<u8>) {
    // Headers lie in front, and matter most.
    let within = if rng.below(2) == 0 { bytes.len() } else { bytes.len().min(64) };
    let at = rng.below(within);
    match rng.below(5) {
        0 => bytes.truncate(at),
        1 => {
            let chunk = bytes[at..bytes.len().min(at + 1 + rng.below(64))].to_vec();
            bytes.splice(at..at, chunk);
        }
        2 => drop(bytes.drain(at..bytes.len().min(at + 1 + rng.below(64)))),
        3 if bytes.len() >= 8 => {
            let length = [0, 1, 7, u64::MAX, i64::MAX as u64, 1 << 32, bytes.len() as u64, rng.next()][rng.below(8)];
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        _ => {
            for _ in 0..=rng.below(8) {
                let at = rng.below(within);
                bytes[at] ^= 1 << rng.below(8);
            }
        }
    }
}

fn odd(rng: &mut Rng) -> Value {
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(1u64 << 31),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!(-0.5),
        json!(""),
        json!("\u{0}é"),
        json!("F32"),
        json!("F4"),
        json!([]),
        json!({}),
        json!([0, 0]),
        json!([1 << 20, 1 << 20]),
        json!([-1]),
        json!([[[1]], "x"]),
        json!({ "a": [1] }),
    ];
    values[rng.below(values.len())].clone()
}

/// A value somewhere inside changed, or a field renamed or taken away.
fn distort(rng: &mut Rng, value: &mut Value) {
    match value {
        Value::Object(fields) if !fields.is_empty() && rng.below(8) != 0 => {
            let key = fields.keys().nth(rng.below(fields.len())).unwrap().clone();
            let other = fields.keys().nth(rng.below(fields.len())).unwrap().clone();
            match rng.below(8) {
                0 => drop(fields.remove(&key)),
                1 => {
                    let moved = fields.remove(&key).unwrap();
                    fields.insert(format!("{other}x"), moved);
                }
                2 => {
                    let copy = fields[&other].clone();
                    fields.insert(key, copy);
                }
                _ => distort(rng, &mut fields[&key]),
            }
        }
        Value::Array(items) if !items.is_empty() && rng.below(4) != 0 => {
            let at = rng.below(items.len());
            match rng.below(4) {
                0 => drop(items.remove(at)),
                1 => items.insert(at, items[at].clone()),
                _ => distort(rng, &mut items[at]),
            }
        }
        other => *other = odd(rng),
    }
}

/// Bytes damaged, or the JSON in them distorted, which gets further.
fn damaged_json(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    if rng.below(4) == 0 {
        let mut bytes = bytes.to_vec();
        damage(rng, &mut bytes);
        return bytes;
    }
    let mut value = serde_json::from_slice(bytes).unwrap();
    for _ in 0..=rng.below(2) {
        distort(rng, &mut value);
    }
    value.to_string().into_bytes()
}

/// A safetensors file with its bytes damaged, or its header distorted.
fn damaged_tensors(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    let length = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    if rng.below(4) == 0 {
        let mut bytes = bytes.to_vec();
        damage(rng, &mut bytes);
        return bytes;
    }
    let header = damaged_json(rng, &bytes[8..length]);
    [&(header.len() as u64).to_le_bytes(), &header[..], &bytes[length..]].concat()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Loads all that the header lists.
fn load_all(weights: &Weights) -> Result<()> {
    for name in weights.names() {
        let (shape, kind) = weights.describe(name)?;
        let _ = weights.load(name, shape, kind, CPU)?;
    }
    weights.digest();
    Ok(())
}

#[test]
fn safetensors() {
    let good = read(&folder("tsc-4-heads").join("connector.safetensors"));
    fuzz("safetensors", |rng, dir| {
        let file = dir.join("connector.safetensors");
        std::fs::write(&file, damaged_tensors(rng, &good)).unwrap();
        load_all(&Weights::open(&file)?)?;
        Connector::load(&file, 4, Kind::Float, CPU).map(drop)
    });
}

#[test]
fn indices() {
    let index = json!({ "metadata": { "total_size": 8 }, "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors" } });
    fuzz("index", |rng, dir| {
        for (name, shard) in [("a", "model-1.safetensors"), ("b", "model-2.safetensors")] {
            weights::save(&dir.join(shard), &[(name.to_owned(), Tensor::from_slice(&[1f32]))]).unwrap();
        }
        std::fs::write(dir.join("model.safetensors.index.json"), damaged_json(rng, index.to_string().as_bytes())).unwrap();
        load_all(&Weights::open(dir)?)
    });
}

/// Network folders, each with a damaged configuration and now and then a damaged header too.
#[test]
fn networks() {
    for (name, build) in [
        ("unet-sd15", (|part| UNet::from_part(part, Kind::Float, CPU).map(drop)) as fn(Part) -> Result<()>),
        ("unet-sdxl", |part| UNet::from_part(part, Kind::Float, CPU).map(drop)),
        ("unet-uneven", |part| UNet::from_part(part, Kind::Float, CPU).map(drop)),
        ("vae", |part| Vae::from_part(part, Kind::Float, CPU).map(drop)),
        ("t5-gated", |part| Text::from_part(part, Kind::Float, CPU).map(drop)),
        ("clip-g", |part| Text::from_part(part, Kind::Float, CPU).map(drop)),
        ("llama3", |part| Text::from_part(part, Kind::Float, CPU).map(drop)),
        ("qwen3", |part| Text::from_part(part, Kind::Float, CPU).map(drop)),
    ] {
        let weights = Weights::open(&folder(name)).unwrap();
        let config = read(&folder(name).join("config.json"));
        fuzz(name, |rng, dir| {
            std::fs::write(dir.join("config.json"), damaged_json(rng, &config)).unwrap();
            build(Part { config: ConfigFile::open(&dir.join("config.json"))?, weights: weights.clone() })
        });
    }
}

#[test]
fn schedules() {
    let config = read(&folder("schedules/v-trailing").join("scheduler_config.json"));
    fuzz("scheduler", |rng, dir| {
        std::fs::write(dir.join("scheduler_config.json"), damaged_json(rng, &config)).unwrap();
        Schedule::load(dir, CPU).map(drop)
    });
}

/// The header of a family's small single file, without its tensors: (key, shape).
fn checkpoint(family: &str) -> Vec<(String, Vec<i64>)> {
    let golden: Value = serde_json::from_slice(&read(&folder("single-file").join(format!("{family}.json")))).unwrap();
    let mut shapes = HashMap::new();
    for (part, config) in golden["configs"].as_object().unwrap() {
        let config = ConfigFile::from_map(Path::new(part), config.as_object().unwrap().clone());
        let p = Params::shapes();
        match part.as_str() {
            "unet" => drop(UNet::new(&UNetConfig::read(config).unwrap(), &p).unwrap()),
            "vae" => drop(Vae::new(&VaeConfig::read(config).unwrap(), &p).unwrap()),
            _ => drop(Clip::new(&ClipConfig::read(config).unwrap(), &p).unwrap()),
        }
        shapes.extend(p.taken().into_iter().map(|(name, tensor)| ((part.clone(), name), tensor.size())));
    }
    let stored = |(key, how): (&String, &Value)| {
        let [part, name, operation] = [&how[0], &how[1], &how[2]].map(|value| value.as_str().unwrap_or_default().to_owned());
        let first = how[1][0].as_str().map_or(name, str::to_owned);
        let mut shape = shapes[&(part, first)].clone();
        match operation.as_str() {
            "conv" => shape.extend([1, 1]),
            "transpose" => shape.reverse(),
            "pack" => shape[0] *= 3,
            _ => {}
        }
        (key.clone(), shape)
    };
    golden["keys"].as_object().unwrap().iter().map(stored).collect()
}

/// A safetensors file of these tensors with its header distorted, all values zero: sparse.
fn sparse(rng: &mut Rng, tensors: &[(String, Vec<i64>)], file: &Path) {
    let (mut header, mut end) = (Map::new(), 0);
    for (key, shape) in tensors {
        let mut shape = shape.clone();
        // Now and then another shape, in a file that is sound otherwise.
        if rng.below(2 * tensors.len()) == 0 && !shape.is_empty() {
            let axis = rng.below(shape.len());
            match rng.below(3) {
                0 => drop(shape.remove(axis)),
                1 => shape[axis] = rng.below(100) as i64,
                _ => shape.insert(axis, 1),
            }
        }
        let bytes = 2 * shape.iter().product::<i64>() as u64;
        header.insert(key.clone(), json!({ "dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    }
    let mut header = Value::Object(header);
    if rng.below(2) == 0 {
        distort(rng, &mut header);
    }
    let header = header.to_string();
    std::fs::write(file, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(8 + header.len() as u64 + end).unwrap();
}

/// What is inferred from a checkpoint is inferred from names and shapes, so no values are needed.
#[test]
fn single_files() {
    let blank = |part: Part| Part { weights: part.weights.without_values(), ..part };
    for family in ["sd1", "sd2", "sdxl"] {
        let tensors = checkpoint(family);
        let open = |file: &Path| {
            let base = Base::open(file)?;
            let unet = base.unet_part().and_then(|part| UNet::from_part(blank(part), Kind::Float, CPU));
            let vae = base.vae_part().and_then(|part| Vae::from_part(blank(part), Kind::Float, CPU));
            for encoder in base.text_encoders()? {
                Text::from_part(blank(encoder.part), Kind::Float, CPU)?;
            }
            base.schedule(CPU)?;
            unet.map(drop).and(vae.map(drop))
        };
        fuzz(family, |rng, dir| {
            let file = dir.join("model.safetensors");
            sparse(rng, &tensors, &file);
            open(&file)
        });
    }
}

#[test]
fn tokenizers() {
    let captions = ["a red square above a blue circle".to_owned(), "two tiny green circles".to_owned()];
    let unigram = unigram::train(&captions, 60).unwrap().into_bytes();
    let t5 = TextConfig::load(&folder("t5-gated")).unwrap();
    let encode = |tokenizer: &TextTokenizer| tokenizer.encode(&captions, 12, Padding::Fixed).map(drop);
    fuzz("tokenizer.json of T5", |rng, dir| {
        std::fs::write(dir.join("tokenizer.json"), damaged_json(rng, &unigram)).unwrap();
        encode(&TextTokenizer::load(dir, &t5)?)
    });
    let golden = folder("clip-tokenizer-g");
    let (tokenizer, settings) = (read(&golden.join("tokenizer.json")), read(&golden.join("tokenizer_config.json")));
    fuzz("tokenizer.json of CLIP", |rng, dir| {
        let of_settings = rng.below(3) == 0;
        std::fs::write(dir.join("tokenizer.json"), if of_settings { tokenizer.clone() } else { damaged_json(rng, &tokenizer) }).unwrap();
        std::fs::write(dir.join("tokenizer_config.json"), if of_settings { damaged_json(rng, &settings) } else { settings.clone() })
            .unwrap();
        encode(&clip_tokenizer::load(dir)?)
    });
    let golden = folder("clip-tokenizer-l");
    let (vocabulary, merges) = (read(&golden.join("vocab.json")), read(&golden.join("merges.txt")));
    fuzz("vocab.json and merges.txt", |rng, dir| {
        let mut damaged_merges = merges.clone();
        if rng.below(2) == 0 {
            damage(rng, &mut damaged_merges);
        }
        std::fs::write(dir.join("merges.txt"), damaged_merges).unwrap();
        std::fs::write(dir.join("vocab.json"), damaged_json(rng, &vocabulary)).unwrap();
        encode(&clip_tokenizer::load(dir)?)
    });
}

/// What fuzzing starts from is whole.
#[test]
fn the_seeds_themselves_are_accepted() {
    load_all(&Weights::open(&folder("tsc-4-heads").join("connector.safetensors")).unwrap()).unwrap();
    assert!(!tensors(&folder("tsc-4-heads").join("connector.safetensors")).is_empty());
    clip_tokenizer::load(&folder("clip-tokenizer-l")).unwrap();
}
