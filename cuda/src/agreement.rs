//! Whether a GPU's kernels give what the processor's give: one text makes both, and the processor's are tested against libtorch's own operators. A GPU that
//! nobody has tried, or a compiler of kernels that nobody has, is found out when it is loaded, and not by what it trains.

use tch::{Device, Kind, Tensor};

use crate::fused::{self, AdamW, Fused, Switch};
use crate::resize::{FrozenDouble, FrozenHalf};
use crate::{Error, Result, gpu};

/// The kinds that a GPU takes fused operators in, and how far two roundings may be from each other: of the largest number.
const KINDS: [(Kind, f64); 2] = [(Kind::BFloat16, 4e-2), (Kind::Half, 5e-3)];
/// The same of the update, whose numbers are float32.
const UPDATE: f64 = 1e-5;

/// What an operator makes of made-up numbers, and its gradients.
type Trial = fn((Kind, Device)) -> Result<Vec<Tensor>>;

/// Of every operator that has kernels; convolutions' own are libtorch's, and so are the products of `attention`.
const TRIALS: [(&str, Switch, Trial); 6] = [
    ("norm", |f| &mut f.norm, norms),
    ("conv", |f| &mut f.conv, residual),
    ("resize", |f| &mut f.resize, resizes),
    ("gate", |f| &mut f.gate, gates),
    ("cross", |f| &mut f.cross, few_keys),
    ("pixels", |f| &mut f.pixels, pixels),
];

/// Tries those of `used` that there are on the GPU `device`, and the update. To those that give something else there than on the processor, and are to be off; and
/// a line about each, and about what could not be tried.
///
/// # Errors
/// The update gives something else; the GPU has no memory left, or answers no more.
pub(crate) fn wrong(used: Fused, device: Device) -> Result<(Fused, Vec<String>)> {
    let updated = |device| update((Kind::Float, device));
    if let Some(why) = judged(updated(device), &updated(Device::Cpu)?, UPDATE) {
        return Err(Error(format!("the update's kernel is not usable on this GPU: {why}")));
    }
    let (mut wrong, mut lines) = (Fused::NONE, Vec::new());
    // Older GPUs compute nothing in bfloat16.
    let old = gpu::capability().is_some_and(|capability| capability < (8, 0));
    for (kind, bound) in KINDS.into_iter().filter(|(kind, _)| !old || *kind != Kind::BFloat16) {
        let mut there = used.on(kind, device);
        for (name, switch, trial) in TRIALS {
            if !*switch(&mut there) || *switch(&mut wrong) {
                continue;
            }
            let wanted = match trial((kind, Device::Cpu)) {
                Ok(wanted) => wanted,
                Err(error) => {
                    lines.push(format!("the fused operator `{name}` could not be tried in {kind:?}: {}", first_line(&error)));
                    continue;
                }
            };
            let found = trial((kind, device));
            if let Err(error) = &found {
                answers(device, error)?;
            }
            if let Some(why) = judged(found, &wanted, bound) {
                *switch(&mut wrong) = true;
                lines.push(format!("the fused operator `{name}` is off: in {kind:?}, on this GPU, {why}"));
            }
        }
    }
    Ok((wrong, lines))
}

/// What is wrong with what was found, if anything.
fn judged(found: Result<Vec<Tensor>>, wanted: &[Tensor], bound: f64) -> Option<String> {
    match found.and_then(|found| difference(&found, wanted)) {
        Ok(error) if error <= bound => None,
        // What is no number is not within it either.
        Ok(error) => Some(format!("it is {error:.1e} from the processor's, more than {bound:.0e}")),
        Err(error) => Some(first_line(&error)),
    }
}

/// Whether a GPU goes on after an operator's `error`.
///
/// # Errors
/// It lacked memory, which says nothing of the operator; or the GPU does not answer.
fn answers(device: Device, error: &Error) -> Result<()> {
    let lost = Tensor::f_ones([1], (Kind::Float, device)).and_then(|one| one.f_double_value(&[])).is_err();
    if lost || error.to_string().contains("out of memory") {
        return Err(Error(format!("while fused operators were tried (ELLA_FUSED=none leaves that out): {}", first_line(error))));
    }
    Ok(())
}

/// Without the C++ frames that may follow.
fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
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

// Shapes are such that every kernel has more than one block, and sums more than one part.

fn norms(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let (x, second) = (leaf(&[2, 48, 30, 21], 0.0, on)?, leaf(&[2, 16, 30, 21], 1.0, on)?);
    let (gamma, beta) = (numbers(&[64], 2.0, on)?, numbers(&[64], 3.0, on)?);
    let (map, add) =
        (fused::Joined { first: x.shallow_clone(), second: Some(second.shallow_clone()) }, numbers(&[2, 64], 4.0, (Kind::Float, on.1))?);
    let (past, y) = fused::group_norm(&map, (&gamma, &beta), Some(&add), (8, 1e-5), true)?;
    let mut made = with_gradients(vec![past.one()?, y], &[&x, &second])?;
    let (a, b) = (leaf(&[70, 320], 0.0, on)?, leaf(&[70, 320], 1.0, on)?);
    let (gamma, beta) = (numbers(&[320], 2.0, on)?, numbers(&[320], 3.0, on)?);
    let (sum, y) = fused::layer_norm(&a, Some(&b), (&gamma, &beta), 1e-5)?;
    made.extend(with_gradients(vec![sum, y], &[&a])?);
    made.push(fused::rms_norm(&a.detach(), &gamma, 1e-6)?);
    let lead = leaf(&[2, 640], 4.0, (Kind::Float, on.1))?;
    for from in [Kind::Float, on.0] {
        let x = leaf(&[2, 70, 320], 5.0, (from, on.1))?;
        made.extend(with_gradients(vec![fused::ada_layer_norm(&x, &lead, 1e-6, on.0)?], &[&x, &lead])?);
    }
    Ok(made)
}

fn residual(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let [a, b, c] = [0.0, 1.0, 2.0].map(|salt| numbers(&[2, 24, 9, 7], salt, on));
    Ok(vec![fused::add_biased(&a?, &b?, Some(&c?), &numbers(&[24], 3.0, (Kind::Float, on.1))?)?])
}

fn resizes(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let (x, weight) = (leaf(&[2, 16, 12, 10], 0.0, on)?, numbers(&[16, 16, 3, 3], 1.0, on)?.f_mul_scalar(0.1)?);
    let double = FrozenDouble::new(&weight, &numbers(&[16], 2.0, on)?)?.forward(&x)?;
    let half = FrozenHalf::new(&fused::channels_last(&weight)?)?.forward(&x)?;
    with_gradients(vec![double, half], &[&x])
}

fn gates(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let both = leaf(&[150, 48], 0.0, on)?;
    let mut made = with_gradients(vec![fused::geglu(&both)?], &[&both])?;
    made.push(fused::gated_gelu(&both.detach())?);
    Ok(made)
}

fn few_keys(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // All widths, fewer keys than there may be, tiles that are not full.
    for (width, keys, queries) in [(40, 64, 590), (64, 9, 70), (80, 64, 70), (160, 33, 70)] {
        let (q, kv) = (leaf(&[2, queries, 2 * width], 0.0, on)?, leaf(&[2, keys, 4 * width], 1.0, on)?);
        made.extend(with_gradients(vec![fused::few_keys(&q, &kv, 2)?], &[&q, &kv])?);
    }
    Ok(made)
}

fn pixels(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // More tiles than are on the chip at once, the last of them not full.
    for width in [40, 80] {
        let qkv = leaf(&[2, 350, 3 * width], 0.0, on)?;
        made.extend(with_gradients(vec![fused::pixels(&qkv, 1)?], &[&qkv])?);
    }
    Ok(made)
}

/// One update of four buffers, and the squares of a gradient.
fn update(on: (Kind, Device)) -> Result<Vec<Tensor>> {
    let of = |salt| numbers(&[5003], salt, on);
    let (mut p, mut m, mut v, mut ema, grad) = (of(0.0)?, of(1.0)?, of(2.0)?.f_square()?, of(3.0)?, of(4.0)?);
    let by = AdamW { scale: 0.5, lr: 0.01, weight_decay: 0.1, betas: [0.9, 0.99], eps: 1e-8, corrections: [0.271, 0.0297], ema_decay: 0.7 };
    fused::adamw([&mut p, &mut m, &mut v, &mut ema], &grad, &by)?;
    Ok(vec![p, m, v, ema, fused::square_norm(&grad)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trial that no bound can tell from another is none: what they make depends on the kind, by half of what is allowed at most.
    #[test]
    fn every_operator_is_tried_with_numbers_that_tell() {
        let tried: Vec<&str> = TRIALS.iter().map(|(name, ..)| *name).collect();
        assert!(fused::SWITCHES.iter().all(|(name, _)| *name == "attention" || tried.contains(name)), "{tried:?}");
        for (name, _, trial) in TRIALS {
            let wide = trial((Kind::Float, Device::Cpu)).unwrap();
            for (kind, bound) in KINDS {
                let error = difference(&trial((kind, Device::Cpu)).unwrap(), &wide).unwrap();
                assert!(error > 1e-5 && error <= bound / 2.0, "{name} {kind:?}: {error:e}");
            }
        }
        assert_eq!(wrong(Fused::ALL, Device::Cpu).unwrap(), (Fused::NONE, Vec::new()));
    }

    #[test]
    fn what_differs_fails_or_is_no_number_is_seen() {
        let of = |values: &[f32]| vec![Tensor::from_slice(values)];
        let judged = |found: Result<Vec<Tensor>>| judged(found, &of(&[1.0, 4.0]), 0.1);
        assert_eq!(judged(Ok(of(&[1.0, 4.3]))), None);
        assert_eq!(judged(Ok(of(&[1.0, 2.0]))).unwrap(), "it is 5.0e-1 from the processor's, more than 1e-1");
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(judged(Ok(of(&[bad, 4.0]))).is_some());
        }
        assert_eq!(judged(Err(Error("kernel x: not found\nframe #0".into()))).unwrap(), "kernel x: not found");
        assert!(answers(Device::Cpu, &Error("kernel x: not found".into())).is_ok());
        assert!(answers(Device::Cpu, &Error("CUDA out of memory".into())).unwrap_err().to_string().contains("ELLA_FUSED=none"));
    }
}
