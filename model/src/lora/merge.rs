//! Adds LoRAs to a U-Net's tensors, one tensor at a time.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::names::Names;
use super::{Layer, Lora};
use crate::error::{ModelError, Result};
use crate::unet::UNetConfig;
use crate::weights::Weights;

/// What is added to which tensor.
#[derive(Debug, Default)]
pub(crate) struct Merge {
    by_tensor: HashMap<String, Vec<Change>>,
    files: Vec<Weights>,
}

/// One LoRA's change of one tensor.
#[derive(Debug)]
struct Change {
    file: usize,
    layer: Layer,
    factor: f64,
}

impl Merge {
    /// Matches every layer of every LoRA with the U-Net's.
    ///
    /// # Errors
    /// A layer that the U-Net does not have, has in another shape, or that the file gives twice: named with file, tensor, expected and found.
    pub(crate) fn new(loras: &[Lora], config: &UNetConfig) -> Result<Self> {
        let mut merge = Merge::default();
        if loras.is_empty() {
            return Ok(merge);
        }
        let names = Names::of(config)?;
        for (file, lora) in loras.iter().enumerate() {
            for (name, layer) in &lora.layers {
                let mismatch = |key: &str, expected: String, found: &str| ModelError::LoraMismatch {
                    file: lora.file(),
                    key: key.into(),
                    expected,
                    found: found.into(),
                };
                let Some((known, shape)) = names.find(name) else {
                    let expected = "a layer of the base's U-Net, such as mid_block.attentions.0.proj_in".to_owned();
                    return Err(mismatch(&layer.down, expected, "no layer of that name"));
                };
                let rank = check(lora, layer, shape)?;
                let changes = merge.by_tensor.entry(format!("{known}.weight")).or_default();
                if changes.last().is_some_and(|change| change.file == file) {
                    return Err(mismatch(&layer.down, format!("{known} once"), "it twice, under two names"));
                }
                let factor = lora.weight * lora.scale.of(layer, known, rank, &lora.weights)?;
                changes.push(Change { file, layer: layer.clone(), factor });
            }
            merge.files.push(lora.weights.clone());
        }
        Ok(merge)
    }

    /// Whether the tensor is changed at all.
    pub(crate) fn changes(&self, key: &str) -> bool {
        self.by_tensor.contains_key(key)
    }

    /// Adds all changes to the tensor `key`, given in float32.
    pub(crate) fn apply(&self, key: &str, tensor: Tensor) -> Result<Tensor> {
        let mut tensor = tensor;
        for change in self.by_tensor.get(key).into_iter().flatten() {
            let delta = change.delta(&self.files[change.file], tensor.device())?;
            tensor = tensor.f_add(&delta.f_reshape(tensor.size())?.f_mul_scalar(change.factor)?)?;
        }
        Ok(tensor)
    }
}

impl Change {
    /// up · down, or up · mid · down, in float32.
    fn delta(&self, file: &Weights, device: Device) -> Result<Tensor> {
        let load = |key: &str| {
            let shape = file.describe(key)?.0.to_vec();
            file.load(key, &shape, Kind::Float, device)
        };
        let (down, up) = (load(&self.layer.down)?.f_flatten(1, -1)?, load(&self.layer.up)?.f_flatten(1, -1)?);
        Ok(match &self.layer.mid {
            None => up.f_matmul(&down)?,
            Some(mid) => {
                let mid = load(mid)?;
                let kernel = mid.f_reshape([mid.size()[0], mid.size()[1], -1])?; // [rank, rank, k²]
                Tensor::f_einsum("oa,abk,bi->oik", &[up, kernel, down], None::<i64>)?
            }
        })
    }
}

/// The rank of a layer whose factors fit a weight of `shape`: [out, in] or [out, in, k, k].
fn check(lora: &Lora, layer: &Layer, shape: &[i64]) -> Result<i64> {
    let found = |key: &str| Ok::<_, ModelError>(lora.weights.describe(key)?.0.to_vec());
    let fits = |key: &str, expected: &[i64]| {
        let found = found(key)?;
        if plain(&found) == plain(expected) && found.iter().all(|dim| *dim > 0) {
            return Ok(());
        }
        let (expected, found) = (format!("shape {expected:?}"), format!("{found:?}"));
        Err(ModelError::LoraMismatch { file: lora.file(), key: key.into(), expected, found })
    };
    let rank = found(&layer.down)?.first().copied().unwrap_or_default();
    let (out, input, kernel) = (shape[0], shape[1], &shape[2..]);
    match &layer.mid {
        None => fits(&layer.down, &[&[rank, input], kernel].concat())?,
        Some(mid) => {
            fits(&layer.down, &[rank, input])?;
            fits(mid, &[&[rank, rank], kernel].concat())?;
        }
    }
    fits(&layer.up, &[out, rank])?;
    Ok(rank)
}

/// A shape without a kernel of 1×1 at its end: the same map may be stored as linear and as a convolution.
fn plain(shape: &[i64]) -> &[i64] {
    match shape {
        [_, _, 1, 1] => &shape[..2],
        _ => shape,
    }
}
