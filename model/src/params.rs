//! Where a network's parameters come from: one constructor per network serves loading, random initialization, given
//! tensors and listing.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::path::Path;
use std::rc::Rc;

use ella_cuda::fused::{Fused, channels_last};
use ella_cuda::speed;
use tch::{Device, Kind, Tensor};

use crate::error::{ModelError, Result};
use crate::lora::Merge;
use crate::rng::CounterRng;
use crate::weights::Weights;

/// How a parameter is initialized when it is not loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Zero everywhere.
    Zeros,
    /// One everywhere.
    Ones,
    /// The same value everywhere.
    Const(f64),
    /// Normal with mean 0.
    Normal {
        /// The standard deviation.
        std: f64,
    },
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// The largest absolute value.
        bound: f64,
    },
    /// PyTorch's default for the weights of `Linear` and `Conv2d` (kaiming-uniform, a = √5): uniform with bound 1/√fan_in.
    KaimingUniform,
    /// Uniform with bound √(6 / (fan_in + fan_out)): the packed input projection of `nn.MultiheadAttention`.
    XavierUniform,
}

/// How the weights of convolutions lie in memory; feature maps follow them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As in the files: NCHW.
    ChannelsFirst,
    /// A pixel's channels beside each other: NHWC.
    ChannelsLast,
}

/// How a frozen network computes: each way gives the same numbers, up to rounding, in another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// How feature maps lie in memory.
    pub layout: Layout,
    /// Which operators are fused.
    pub fused: Fused,
}

impl Compute {
    /// libtorch's own operators on maps as they lie in files.
    pub const PLAIN: Self = Self { layout: Layout::ChannelsFirst, fused: Fused::NONE };
    /// What a GPU takes.
    pub const FUSED: Self = Self { layout: Layout::ChannelsLast, fused: Fused::USUAL };

    /// The one that is fastest in `kind` on `device`; the variable `ELLA_FUSED` chooses other fused operators ([`Fused::from_env`]). What can only be known
    /// by the clock is measured when this is first asked ([`speed::measure`]).
    ///
    /// # Errors
    /// `ELLA_FUSED` names something else; CUDA's own.
    pub fn fastest(kind: Kind, device: Device) -> Result<Self> {
        // Tensor cores read NHWC; with NCHW, cuDNN turns the maps around before and after. On CPUs oneDNN has layouts of its own.
        let fastest = if device.is_cuda() && kind != Kind::Float { Self::FUSED } else { Self::PLAIN };
        let fused = Fused::from_env()?.unwrap_or(fastest.fused).on(kind, device);
        speed::measure(fused, kind, device)?;
        Ok(Self { fused, ..fastest })
    }
}

/// A cursor into a network's parameters: a name prefix over a shared source. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Params {
    shared: Rc<Shared>,
    prefix: String,
}

#[derive(Debug)]
struct Shared {
    source: Source,
    kind: Kind,
    device: Device,
    compute: Cell<Compute>,
    taken: RefCell<Vec<(String, Tensor)>>,
}

#[derive(Debug)]
enum Source {
    File(Weights, Merge),
    Random(u64),
    Given(HashMap<String, Tensor>),
    Shapes,
}

impl Params {
    /// Parameters loaded from weight files, as `kind` on `device`.
    pub fn from_weights(weights: Weights, kind: Kind, device: Device) -> Self {
        Self::merged(weights, Merge::default(), kind, device)
    }

    /// The same with LoRAs added to some of them: in float32, before the cast to `kind`.
    pub(crate) fn merged(weights: Weights, merge: Merge, kind: Kind, device: Device) -> Self {
        Self::new(Source::File(weights, merge), kind, device)
    }

    /// Random parameters: each value is a pure function of the seed, the tensor's full name and the position in it.
    pub fn random(seed: u64, kind: Kind, device: Device) -> Self {
        Self::new(Source::Random(seed), kind, device)
    }

    /// Parameters that are at hand, taken as they are (views into a flat buffer, tensors that require gradients).
    pub fn given(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        // Kind and device are those of the tensors; the fields serve only sources that make tensors.
        Self::new(Source::Given(tensors.into_iter().collect()), Kind::Float, Device::Cpu)
    }

    /// No values, only names and shapes: what a constructor asks for can be read from [`Params::taken`] afterwards.
    pub fn shapes() -> Self {
        Self::new(Source::Shapes, Kind::Float, Device::Cpu)
    }

    fn new(source: Source, kind: Kind, device: Device) -> Self {
        let shared = Shared { source, kind, device, compute: Cell::new(Compute::PLAIN), taken: RefCell::default() };
        Params { shared: Rc::new(shared), prefix: String::new() }
    }

    /// From now on networks are built to compute in this way, and parameters of four axes, the weights of convolutions, are handed out in its layout.
    pub fn compute_by(&self, compute: Compute) {
        self.shared.compute.set(compute);
    }

    /// The fused operators that a network is built with.
    pub(crate) fn fused(&self) -> Fused {
        self.shared.compute.get().fused.on(self.shared.kind, self.shared.device)
    }

    /// The cursor one level down: `p.at("down_blocks").at(0)` is at `down_blocks.0`.
    pub fn at(&self, name: impl Display) -> Self {
        Params { shared: Rc::clone(&self.shared), prefix: self.full(&name) }
    }

    /// The parameter `name` below this cursor, of the given shape.
    ///
    /// # Errors
    /// A source of given tensors or of a file lacks it, or has it in another shape.
    pub fn get(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let key = self.full(&name);
        let Shared { source, kind, device, compute, taken } = &*self.shared;
        let tensor = match source {
            Source::File(weights, merge) if merge.changes(&key) => {
                merge.apply(&key, weights.load(&key, shape, Kind::Float, *device)?)?.f_to_kind(*kind)?
            }
            Source::File(weights, _) => weights.load(&key, shape, *kind, *device)?,
            Source::Random(seed) => random(*seed, &key, shape, init)?.f_to_device(*device)?.f_to_kind(*kind)?,
            Source::Given(tensors) => given(tensors, &key, shape)?,
            // Stride 0 in every dimension: the shape costs no memory.
            Source::Shapes => Tensor::f_zeros([1; 0], (*kind, *device))?.f_expand(shape, false)?,
        };
        let tensor = match compute.get().layout {
            Layout::ChannelsLast if shape.len() == 4 => channels_last(&tensor)?,
            _ => tensor,
        };
        taken.borrow_mut().push((key, tensor.shallow_clone()));
        Ok(tensor)
    }

    /// Whether the source surely has this parameter below this cursor: files and given tensors know, the others make any.
    pub fn has(&self, name: &str) -> bool {
        let key = self.full(&name);
        match &self.shared.source {
            Source::File(weights, _) => weights.shape(&key).is_some(),
            Source::Given(tensors) => tensors.contains_key(&key),
            Source::Random(_) | Source::Shapes => true,
        }
    }

    /// The parameters handed out so far, under their full names, in order.
    pub fn taken(&self) -> Vec<(String, Tensor)> {
        self.shared.taken.borrow().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Refuses tensors of the source that no constructor took, except those that match a pattern in `harmless`
    /// (one `*` stands for any text). Call it once the whole network is built.
    pub fn finish(&self, harmless: &[&str]) -> Result<()> {
        let used: BTreeSet<String> = self.shared.taken.borrow().iter().map(|(name, _)| name.clone()).collect();
        match &self.shared.source {
            Source::File(weights, _) => weights.expect_only(&used, harmless),
            Source::Given(tensors) => {
                let mut keys: Vec<String> = tensors.keys().filter(|key| !used.contains(*key)).cloned().collect();
                keys.sort();
                if keys.is_empty() { Ok(()) } else { Err(ModelError::SurplusTensors { file: in_memory(), keys }) }
            }
            Source::Random(_) | Source::Shapes => Ok(()),
        }
    }

    fn full(&self, name: &dyn Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// What errors name where there is no file.
fn in_memory() -> std::path::PathBuf {
    Path::new("given tensors").into()
}

fn given(tensors: &HashMap<String, Tensor>, key: &str, shape: &[i64]) -> Result<Tensor> {
    let tensor = tensors.get(key).ok_or_else(|| ModelError::MissingTensor { file: in_memory(), key: key.into() })?;
    if tensor.size() != shape {
        return Err(ModelError::WrongShape { file: in_memory(), key: key.into(), expected: shape.into(), found: tensor.size() });
    }
    Ok(tensor.shallow_clone())
}

fn random(seed: u64, key: &str, shape: &[i64], init: Init) -> Result<Tensor> {
    let numel: i64 = shape.iter().product();
    // Every axis but the first is fan-in, for linear [out, in] as for convolutions [out, in, kh, kw].
    let fan_in = shape.iter().skip(1).product::<i64>().max(1) as f64;
    let fan_out = shape.iter().enumerate().filter(|(axis, _)| *axis != 1).map(|(_, dim)| dim).product::<i64>() as f64;
    let rng = CounterRng::new(seed, key);
    let values = match init {
        Init::Zeros => vec![0.0; numel as usize],
        Init::Ones => vec![1.0; numel as usize],
        Init::Const(value) => vec![value as f32; numel as usize],
        Init::Normal { std } => rng.normal(numel as usize, std),
        Init::Uniform { bound } => rng.uniform(numel as usize, bound),
        Init::KaimingUniform => rng.uniform(numel as usize, fan_in.powf(-0.5)),
        Init::XavierUniform => rng.uniform(numel as usize, (6.0 / (fan_in + fan_out)).sqrt()),
    };
    Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_parameters_depend_on_seed_and_name_not_on_order() {
        let make = |seed, names: &[&str]| {
            let p = Params::random(seed, Kind::Float, Device::Cpu).at("block").at(0);
            names.iter().map(|name| p.get(name, &[3, 4], Init::KaimingUniform).unwrap()).collect::<Vec<_>>()
        };
        let (ab, ba) = (make(1, &["a", "b"]), make(1, &["b", "a"]));
        assert!(ab[0].equal(&ba[1]) && ab[1].equal(&ba[0]) && !ab[0].equal(&ab[1]));
        assert!(!ab[0].equal(&make(2, &["a"])[0]));
        assert!(ab[0].abs().max().double_value(&[]) <= 0.5);
    }

    #[test]
    fn the_shapes_source_lists_names_and_shapes() {
        let p = Params::shapes();
        let _ = p.at("x").get("weight", &[1 << 20, 1 << 20], Init::Ones).unwrap();
        let taken = p.taken();
        assert_eq!((taken[0].0.as_str(), taken[0].1.size()), ("x.weight", vec![1 << 20, 1 << 20]));
    }

    #[test]
    fn given_tensors_are_checked() {
        let p = Params::given([("a".to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)))]);
        assert!(matches!(p.get("a", &[3], Init::Zeros), Err(ModelError::WrongShape { .. })));
        assert!(matches!(p.get("b", &[2], Init::Zeros), Err(ModelError::MissingTensor { .. })));
        assert!(matches!(p.finish(&[]), Err(ModelError::SurplusTensors { keys, .. }) if keys == ["a"]));
        let _ = p.get("a", &[2], Init::Zeros).unwrap();
        p.finish(&[]).unwrap();
    }
}
