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

/// The same numbers so many times, on a GPU: enough to fill it, so that what one block does at another's cost is seen in what they make.
const COPIES: i64 = 16;

/// Where a trial is made: in which kind, on which device, of so many copies of its samples.
#[derive(Clone, Copy)]
struct On {
    kind: Kind,
    device: Device,
    copies: i64,
}

/// What an operator makes of made-up numbers, and its gradients: copies before all else.
type Trial = fn(On) -> Result<Vec<Tensor>>;

/// What of the copies is asked: that they are alike; or nothing, as a convolution of libtorch's may add up in another order at another place.
type Of = fn(Vec<Tensor>, i64) -> Result<Vec<Tensor>>;

/// Of every operator that has kernels; convolutions' own are libtorch's, and so are the products of `attention`.
const TRIALS: [(&str, Switch, Trial, Of); 6] = [
    ("norm", |f| &mut f.norm, norms, alike),
    ("conv", |f| &mut f.conv, residual, alike),
    ("resize", |f| &mut f.resize, resizes, first),
    ("gate", |f| &mut f.gate, gates, alike),
    ("cross", |f| &mut f.cross, few_keys, alike),
    ("pixels", |f| &mut f.pixels, pixels, alike),
];

/// Tries those of `used` that there are on the GPU `device`. To those that give something else there than on the processor, and are to be off; and
/// a line about each, and about what could not be tried.
///
/// # Errors
/// The GPU has no memory left, or answers no more.
pub(crate) fn wrong(used: Fused, device: Device) -> Result<(Fused, Vec<String>)> {
    let on = |kind| On { kind, device, copies: if device.is_cuda() { COPIES } else { 1 } };
    let (mut wrong, mut lines) = (Fused::NONE, Vec::new());
    if used.update {
        let found = seen(update, On { copies: 1, ..on(Kind::Float) }, &tried("update"))?;
        if let Some(why) = judged(found, &update(on(Kind::Float).plain())?, UPDATE) {
            wrong.update = true;
            lines.push(format!("the fused operator `update` is off: on this GPU {why}"));
        }
    }
    // Older GPUs compute nothing in bfloat16.
    let old = gpu::capability().is_some_and(|capability| capability < (8, 0));
    for (kind, bound) in KINDS.into_iter().filter(|(kind, _)| !old || *kind != Kind::BFloat16) {
        let mut there = used.on(kind, device);
        for (name, switch, trial, of) in TRIALS {
            if !*switch(&mut there) || *switch(&mut wrong) {
                continue;
            }
            let wanted = match trial(on(kind).plain()) {
                Ok(wanted) => wanted,
                Err(error) => {
                    lines.push(format!("the fused operator `{name}` could not be tried in {kind:?}: {}", first_line(&error)));
                    continue;
                }
            };
            let found = seen(trial, on(kind), &tried(name))?;
            let found = found.and_then(|found| of(found, on(kind).copies));
            if let Some(why) = judged(found, &wanted, bound) {
                *switch(&mut wrong) = true;
                lines.push(format!("the fused operator `{name}` is off: in {kind:?}, on this GPU, {why}"));
            }
        }
    }
    Ok((wrong, lines))
}

/// How an operator is told that breaks the GPU, for `bench/gpu_parts.py` too, which leaves it out then.
pub(crate) fn tried(name: &str) -> String {
    format!("the fused operator `{name}` (ELLA_FUSED=-{name} leaves it out)")
}

/// What a trial makes, on the processor: a kernel's fault may show only when somebody looks.
///
/// # Errors
/// The GPU lacked memory, which says nothing of the operator; or it does not answer any more.
fn seen(trial: Trial, on: On, what: &str) -> Result<Result<Vec<Tensor>>> {
    let fetched = |made: Vec<Tensor>| made.iter().map(|tensor| Ok(tensor.f_to_device(Device::Cpu)?)).collect();
    let found: Result<Vec<Tensor>> = trial(on).and_then(fetched);
    if let Err(error) = &found {
        answers(on.device, error, what)?;
    }
    Ok(found)
}

/// The first of the copies.
fn first(found: Vec<Tensor>, copies: i64) -> Result<Vec<Tensor>> {
    found.into_iter().map(|tensor| Ok(tensor.f_narrow(0, 0, tensor.size().first().copied().unwrap_or(0) / copies)?)).collect()
}

/// The same, if all have its bits.
fn alike(found: Vec<Tensor>, copies: i64) -> Result<Vec<Tensor>> {
    for tensor in &found {
        let rows = tensor.f_reshape([copies, -1])?;
        if !rows.f_equal(&rows.f_narrow(0, 0, 1)?.f_expand_as(&rows)?)? {
            return Err(Error("it makes different things of the same numbers".to_owned()));
        }
    }
    first(found, copies)
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

/// Whether a GPU goes on after the `error` of what was tried.
///
/// # Errors
/// It lacked memory, which says nothing of the operator; or the GPU does not answer.
fn answers(device: Device, error: &Error, what: &str) -> Result<()> {
    let lost = Tensor::f_ones([1], (Kind::Float, device)).and_then(|one| one.f_double_value(&[])).is_err();
    if lost || error.to_string().contains("out of memory") {
        return Err(Error(format!("while {what} was tried: {}", first_line(error))));
    }
    Ok(())
}

impl On {
    /// The same on the processor, once.
    fn plain(self) -> Self {
        Self { device: Device::Cpu, copies: 1, ..self }
    }
}

/// Without the C++ frames that may follow.
pub(crate) fn first_line(error: &Error) -> String {
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
fn weights(shape: &[i64], salt: f64, On { kind, device, .. }: On) -> Result<Tensor> {
    let count = shape.iter().product::<i64>();
    let angles =
        Tensor::f_arange(count, (Kind::Double, Device::Cpu))?.f_mul_scalar(12.9898 + salt)?.f_sin()?.f_mul_scalar(437.585)?.f_sin()?;
    Ok(angles.f_mul_scalar(1.5)?.f_reshape(shape)?.f_to_kind(kind)?.f_to_device(device)?)
}

/// Such numbers as samples, in copies.
fn numbers(shape: &[i64], salt: f64, on: On) -> Result<Tensor> {
    let times: Vec<i64> = std::iter::once(on.copies).chain(std::iter::repeat_n(1, shape.len().saturating_sub(1))).collect();
    Ok(weights(shape, salt, on)?.f_repeat(times)?)
}

fn leaf(shape: &[i64], salt: f64, on: On) -> Result<Tensor> {
    Ok(numbers(shape, salt, on)?.f_set_requires_grad(true)?)
}

fn wide(on: On) -> On {
    On { kind: Kind::Float, ..on }
}

/// Values, and one functional's gradients by `leaves`.
fn with_gradients(values: Vec<Tensor>, leaves: &[&Tensor], on: On) -> Result<Vec<Tensor>> {
    let mut functional = Vec::new();
    for (i, value) in values.iter().enumerate() {
        let mut shape = value.size();
        if let Some(samples) = shape.first_mut() {
            *samples /= on.copies;
        }
        let by = numbers(&shape, 0.1 * i as f64, wide(on))?;
        functional.push(value.f_to_kind(Kind::Float)?.f_mul(&by)?.f_sum(Kind::Float)?);
    }
    let gradients = Tensor::f_run_backward(&functional, leaves, false, false)?;
    Ok(values.into_iter().map(|value| value.detach()).chain(gradients).collect())
}

// Shapes are such that every kernel has more than one block, and sums more than one part.

fn norms(on: On) -> Result<Vec<Tensor>> {
    let (x, second) = (leaf(&[2, 48, 30, 21], 0.0, on)?, leaf(&[2, 16, 30, 21], 1.0, on)?);
    let (gamma, beta) = (weights(&[64], 2.0, on)?, weights(&[64], 3.0, on)?);
    let (map, add) = (fused::Joined { first: x.shallow_clone(), second: Some(second.shallow_clone()) }, numbers(&[2, 64], 4.0, wide(on))?);
    let (past, y) = fused::group_norm(&map, (&gamma, &beta), Some(&add), (8, 1e-5), true)?;
    let mut made = with_gradients(vec![past.one()?, y], &[&x, &second], on)?;
    let (a, b) = (leaf(&[70, 320], 0.0, on)?, leaf(&[70, 320], 1.0, on)?);
    let (gamma, beta) = (weights(&[320], 2.0, on)?, weights(&[320], 3.0, on)?);
    let (sum, y) = fused::layer_norm(&a, Some(&b), (&gamma, &beta), 1e-5)?;
    made.extend(with_gradients(vec![sum, y], &[&a], on)?);
    made.push(fused::rms_norm(&a.detach(), &gamma, 1e-6)?);
    let lead = leaf(&[2, 640], 4.0, wide(on))?;
    for from in [wide(on), on] {
        let x = leaf(&[2, 70, 320], 5.0, from)?;
        made.extend(with_gradients(vec![fused::ada_layer_norm(&x, &lead, 1e-6, on.kind)?], &[&x, &lead], on)?);
    }
    Ok(made)
}

fn residual(on: On) -> Result<Vec<Tensor>> {
    let [a, b, c] = [0.0, 1.0, 2.0].map(|salt| numbers(&[2, 24, 9, 7], salt, on));
    Ok(vec![fused::add_biased(&a?, &b?, Some(&c?), &weights(&[24], 3.0, wide(on))?)?])
}

fn resizes(on: On) -> Result<Vec<Tensor>> {
    let (x, weight) = (leaf(&[2, 16, 12, 10], 0.0, on)?, weights(&[16, 16, 3, 3], 1.0, on)?.f_mul_scalar(0.1)?);
    let double = FrozenDouble::new(&weight, &weights(&[16], 2.0, on)?)?.forward(&x)?;
    let half = FrozenHalf::new(&fused::channels_last(&weight)?)?.forward(&x)?;
    with_gradients(vec![double, half], &[&x], on)
}

fn gates(on: On) -> Result<Vec<Tensor>> {
    let both = leaf(&[150, 48], 0.0, on)?;
    let mut made = with_gradients(vec![fused::geglu(&both)?], &[&both], on)?;
    made.push(fused::gated_gelu(&both.detach())?);
    Ok(made)
}

fn few_keys(on: On) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // All widths, fewer keys than there may be, tiles that are not full; and queries that take no gradient, as a U-Net's first do.
    for (width, keys, queries) in [(40, 64, 590), (64, 9, 70), (80, 64, 70), (160, 33, 70)] {
        let (q, kv) = (leaf(&[1, queries, 2 * width], 0.0, on)?, leaf(&[1, keys, 4 * width], 1.0, on)?);
        made.extend(with_gradients(vec![fused::few_keys(&q, &kv, 2)?], &[&q, &kv], on)?);
        if width == 40 {
            made.extend(with_gradients(vec![fused::few_keys(&q.detach(), &kv, 2)?], &[&kv], on)?);
        }
    }
    Ok(made)
}

fn pixels(on: On) -> Result<Vec<Tensor>> {
    let mut made = Vec::new();
    // More tiles than are on the chip at once, the last of them not full.
    for width in [40, 80] {
        let qkv = leaf(&[1, 350, 2 * 3 * width], 0.0, on)?;
        made.extend(with_gradients(vec![fused::pixels(&qkv, 2)?], &[&qkv], on)?);
    }
    Ok(made)
}

/// One update of four buffers, and the squares of a gradient.
fn update(on: On) -> Result<Vec<Tensor>> {
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
        assert!(fused::SWITCHES.iter().all(|(name, _)| ["attention", "update"].contains(name) || tried.contains(name)), "{tried:?}");
        for (name, _, trial, of) in TRIALS {
            let on = |kind, copies| On { kind, device: Device::Cpu, copies };
            let wide = trial(on(Kind::Float, 1)).unwrap();
            for (kind, bound) in KINDS {
                let found = trial(on(kind, 1)).unwrap();
                let error = difference(&found, &wide).unwrap();
                assert!(error > 1e-5 && error <= bound / 2.0, "{name} {kind:?}: {error:e}");
                // Copies go beside each other, and not into each other.
                if kind == Kind::BFloat16 {
                    let first = of(trial(on(kind, 2)).unwrap(), 2).unwrap();
                    assert!(difference(&first, &found).unwrap() < bound / 10.0, "{name} {kind:?}");
                }
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
        let answers = |error: &str| answers(Device::Cpu, &Error(error.into()), "the update");
        assert!(answers("kernel x: not found").is_ok());
        assert_eq!(answers("CUDA out of memory\nframe #0").unwrap_err().to_string(), "while the update was tried: CUDA out of memory");
        assert_eq!(tried("gate"), "the fused operator `gate` (ELLA_FUSED=-gate leaves it out)");
        // Two copies of two samples, of which one has a number that the other has not.
        let made = |last: f32| alike(of(&[1.0, 2.0, 1.0, last]), 2);
        assert!(made(2.0).unwrap()[0].equal(&of(&[1.0, 2.0])[0]));
        assert!([2.5, f32::NAN].into_iter().all(|last| made(last).unwrap_err().to_string().contains("different things")));
    }
}
