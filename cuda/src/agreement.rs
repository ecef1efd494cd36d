//! Whether a GPU's kernels give what the processor's give: one text makes both ([`crate`]), and the processor's are tested against libtorch's own operators. A
//! GPU that nobody has tried, or a compiler of kernels that nobody has, is found out when it is loaded, and not by what it trains.

use tch::{Device, Kind, Tensor};

use crate::fused::{self, Fused, SWITCHES};
use crate::resize::{FrozenDouble, FrozenHalf};
use crate::{Result, gpu};

/// The kinds that a GPU takes fused operators in, and how far two roundings may be from each other: of the largest number.
const KINDS: [(Kind, f64); 2] = [(Kind::BFloat16, 4e-2), (Kind::Half, 5e-3)];

/// What an operator makes of made-up numbers, and its gradients.
type Trial = fn((Kind, Device)) -> Result<Vec<Tensor>>;

const TRIALS: [(&str, Trial); 6] =
    [("norm", norms), ("conv", residual), ("resize", resizes), ("gate", gates), ("cross", few_keys), ("pixels", pixels)];

/// Of the operators that there are on `device`, those that give something else there than on the processor, with a line about each.
///
/// # Errors
/// An operator that fails on the processor.
pub(crate) fn wrong(device: Device) -> Result<(Fused, Vec<String>)> {
    let (mut wrong, mut lines) = (Fused::NONE, Vec::new());
    // Older GPUs compute nothing in bfloat16.
    let old = device.is_cuda() && gpu::capability().is_some_and(|capability| capability < (8, 0));
    for (kind, bound) in KINDS.into_iter().filter(|(kind, _)| !old || *kind != Kind::BFloat16) {
        let mut there = Fused::ALL.on(kind, device);
        for (name, trial) in TRIALS {
            let Some((_, switch)) = SWITCHES.iter().find(|(known, _)| *known == name) else { continue };
            if !*switch(&mut there) || *switch(&mut wrong) {
                continue;
            }
            let wanted = trial((kind, Device::Cpu))?;
            let why = match trial((kind, device)).and_then(|found| difference(&found, &wanted)) {
                Ok(error) if error <= bound => continue,
                Ok(error) => format!("it is {error:.1e} from the processor's, more than {bound:.0e}"),
                Err(error) => error.to_string(),
            };
            *switch(&mut wrong) = true;
            lines.push(format!("the fused operator `{name}` is off: in {kind:?}, on this GPU, {why}"));
        }
    }
    Ok((wrong, lines))
}

/// ‖a - b‖∞ / ‖b‖∞, the most of all.
fn difference(found: &[Tensor], wanted: &[Tensor]) -> Result<f64> {
    let mut most = 0.0;
    for (a, b) in found.iter().zip(wanted) {
        let wide = |x: &Tensor| x.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
        let largest = |x: Tensor| -> Result<f64> { Ok(x.f_abs()?.f_max()?.f_double_value(&[])?) };
        let error = largest(wide(a)?.f_sub(&wide(b)?)?)? / largest(wide(b)?)?.max(f64::MIN_POSITIVE);
        most = if error.is_nan() { error } else { f64::max(most, error) };
        if most.is_nan() {
            break;
        }
    }
    Ok(most)
}

/// Numbers without a pattern between -1.5 and 1.5, the same everywhere: libtorch's generator is left alone, whose numbers runs depend on.
fn numbers(shape: &[i64], salt: f64, (kind, device): (Kind, Device)) -> Result<Tensor> {
    let count = shape.iter().product::<i64>();
    let angles =
        Tensor::f_arange(count, (Kind::Double, Device::Cpu))?.f_mul_scalar(12.9898 + salt)?.f_sin()?.f_mul_scalar(437.585)?.f_sin()?;
    Ok(angles.f_mul_scalar(1.5)?.f_reshape(shape)?.f_to_kind(kind)?.f_to_device(device)?)
}

fn leaf(shape: &[i64], salt: f64, on: (Kind, Device)) -> Result<Tensor> {
    Ok(numbers(shape, salt, on)?.f_set_requires_grad(true)?)
}

/// Values, and one functional's gradients by `leaves`.
fn with_gradients(values: Vec<Tensor>, leaves: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut functional = Vec::new();
    for (i, value) in values.iter().enumerate() {
        let by = numbers(&value.size(), 0.1 * i as f64, (Kind::Float, value.device()))?;
        functional.push(value.f_to_kind(Kind::Float)?.f_mul(&by)?.f_sum(Kind::Float)?);
    }
    let gradients = Tensor::f_run_backward(&functional, leaves, false, false)?;
    Ok(values.into_iter().map(|value| value.detach()).chain(gradients).collect())
}

fn norms(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let (x, second) = (leaf(&[2, 48, 9, 7], 0.0, on)?, leaf(&[2, 16, 9, 7], 1.0, on)?);
    let (gamma, beta) = (numbers(&[64], 2.0, on)?, numbers(&[64], 3.0, on)?);
    let (map, add) =
        (fused::Joined { first: x.shallow_clone(), second: Some(second.shallow_clone()) }, numbers(&[2, 64], 4.0, (Kind::Float, on.1))?);
    let (past, y) = fused::group_norm(&map, (&gamma, &beta), Some(&add), (8, 1e-5), true)?;
    let mut made = with_gradients(vec![past.one()?, y], &[&x, &second])?;
    let (a, b) = (leaf(&[5, 320], 0.0, on)?, leaf(&[5, 320], 1.0, on)?);
    let (gamma, beta) = (numbers(&[320], 2.0, on)?, numbers(&[320], 3.0, on)?);
    let (sum, y) = fused::layer_norm(&a, Some(&b), (&gamma, &beta), 1e-5)?;
    made.extend(with_gradients(vec![sum, y], &[&a])?);
    made.push(fused::rms_norm(&a.detach(), &gamma, 1e-6)?);
    Ok(made)
}

fn residual(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let [a, b, c] = [0.0, 1.0, 2.0].map(|salt| numbers(&[2, 24, 5, 3], salt, on));
    Ok(vec![fused::add_biased(&a?, &b?, Some(&c?), &numbers(&[24], 3.0, (Kind::Float, on.1))?)?])
}

fn resizes(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let (x, weight) = (leaf(&[2, 16, 6, 4], 0.0, on)?, numbers(&[16, 16, 3, 3], 1.0, on)?.f_mul_scalar(0.1)?);
    let double = FrozenDouble::new(&weight, &numbers(&[16], 2.0, on)?)?.forward(&x)?;
    let half = FrozenHalf::new(&fused::channels_last(&weight)?)?.forward(&x)?;
    with_gradients(vec![double, half], &[&x])
}

fn gates(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let both = leaf(&[7, 48], 0.0, on)?;
    let mut made = with_gradients(vec![fused::geglu(&both)?], &[&both])?;
    made.push(fused::gated_gelu(&both.detach())?);
    Ok(made)
}

fn few_keys(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // All widths, fewer keys than there may be, a tile that is not full.
    for (width, keys) in [(40, 64), (64, 9), (80, 64), (160, 33)] {
        let (q, kv) = (leaf(&[1, 70, 2 * width], 0.0, on)?, leaf(&[1, keys, 4 * width], 1.0, on)?);
        made.extend(with_gradients(vec![fused::few_keys(&q, &kv, 2)?], &[&q, &kv])?);
    }
    Ok(made)
}

fn pixels(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // More tiles than are on the chip at once, the last of them not full.
    for width in [40, 80] {
        let qkv = leaf(&[1, 350, 6 * width], 0.0, on)?;
        made.extend(with_gradients(vec![fused::pixels(&qkv, 2)?], &[&qkv])?);
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_tried_and_the_processor_agrees_with_itself() {
        let tried: Vec<&str> = TRIALS.iter().map(|(name, _)| *name).collect();
        // One product for three has no kernel.
        assert!(SWITCHES.iter().all(|(name, _)| *name == "attention" || tried.contains(name)), "{tried:?}");
        assert_eq!(wrong(Device::Cpu).unwrap(), (Fused::NONE, Vec::new()));
        for (kind, bound) in KINDS {
            for (name, trial) in TRIALS {
                // Against float32 they are as far as the kind rounds, which is within the bound, and not nothing.
                let error = difference(&trial((kind, Device::Cpu)).unwrap(), &trial((Kind::Float, Device::Cpu)).unwrap()).unwrap();
                assert!(error > 1e-5 && error <= bound, "{name} {kind:?}: {error:e}");
            }
        }
    }

    #[test]
    fn what_differs_or_is_no_number_is_seen() {
        let of = |values: &[f32]| [Tensor::from_slice(values)];
        let apart = |a: &[f32], b: &[f32]| difference(&of(a), &of(b)).unwrap();
        assert_eq!(apart(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(apart(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert!(apart(&[f32::NAN, 2.0], &[1.0, 2.0]).is_nan() && apart(&[f32::INFINITY, 2.0], &[1.0, 2.0]).is_infinite());
    }
}
