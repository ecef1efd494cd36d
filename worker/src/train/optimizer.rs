//! AdamW with warm-up, clipping and an exponential moving average, on flat buffers.

use super::TrainError;
use ella_cuda::fused::{self, AdamW, Fused};
use ella_proto::config::{Optimizer, ScheduleKind, Train};
use tch::{Device, Kind, Tensor};

/// The learning rate of the update that makes step `step` (the first is 1): linear warm-up, then constant or half a cosine.
pub fn learning_rate(train: &Train, step: u64) -> f64 {
    let peak = train.optimizer.lr;
    let warmup = train.schedule.warmup;
    if step <= warmup {
        return peak * step as f64 / warmup as f64;
    }
    match train.schedule.kind {
        ScheduleKind::Constant => peak,
        ScheduleKind::Cosine => {
            let span = train.steps.saturating_sub(warmup).max(1) as f64;
            let done = (step - warmup) as f64 / span;
            0.5 * peak * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
        }
    }
}

/// The average's decay at `step`: `ema_decay`, but never more than (1 + step) / (10 + step), so that the first steps do not stay
/// in it for ever (the warm-up of diffusers' `EMAModel`).
pub fn ema_decay(train: &Train, step: u64) -> f64 {
    train.ema_decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// Elements whose squares are summed at a time on a processor: few enough to stay in its cache.
const NORM_PIECE: i64 = 1 << 17;

/// The square of the 2-norm of `grad`, `[]` float64 on its device: nothing is waited for.
///
/// # Errors
/// libtorch's, and the kernel's.
pub fn square_norm(grad: &Tensor) -> Result<Tensor, TrainError> {
    if Fused::updates(grad.device())? {
        return Ok(fused::square_norm(grad)?);
    }
    // In pieces: the whole in float64 would be twice the gradient's memory.
    let mut square = Tensor::f_zeros([], (Kind::Double, grad.device()))?;
    for piece in grad.f_split(NORM_PIECE, 0)? {
        let _ = square.f_add_(&piece.f_to_kind(Kind::Double)?.f_square_()?.f_sum(Kind::Double)?)?;
    }
    Ok(square)
}

/// What a gradient of this 2-norm is multiplied with so that it has at most `limit` (0: no limit).
pub fn clipping(norm: f64, limit: f64) -> f64 {
    // The small constant is torch.nn.utils.clip_grad_norm_'s.
    if limit > 0.0 && norm > limit { limit / (norm + 1e-6) } else { 1.0 }
}

/// The flat buffers of one trained module, each `[P]` float32 in the layout's order.
#[derive(Debug)]
pub struct Buffers {
    /// Weights.
    pub params: Tensor,
    /// First moments.
    pub exp_avg: Tensor,
    /// Second moments.
    pub exp_avg_sq: Tensor,
    /// Moving average of the weights.
    pub ema: Tensor,
    /// Updates that made them. Steps that were left out are none: they add nothing to the moments, so the bias correction must not count them.
    pub updates: u64,
}

impl Buffers {
    /// Views of one stretch.
    fn narrow(&self, from: i64, len: i64) -> Result<Self, tch::TchError> {
        let view = |tensor: &Tensor| tensor.f_narrow(0, from, len);
        let Self { params, exp_avg, exp_avg_sq, ema, updates } = self;
        Ok(Self { params: view(params)?, exp_avg: view(exp_avg)?, exp_avg_sq: view(exp_avg_sq)?, ema: view(ema)?, updates: *updates })
    }
}

/// Elements that are updated at a time on a processor, so that what is read once and what is made in between stay in its cache.
const UPDATE_PIECE: i64 = 1 << 16;

/// One AdamW update, as `torch.optim.AdamW` (v2.11, single tensor) orders it, and the moving average after it.
/// `step` is the number of the step, from 1, by which the rate and the average go; `grad` is `[P]` float32, and multiplied by `scale` first. No GPU
/// is waited for; one that computes by kernels of our own makes all of it in one pass over memory, the same but for the rounding of a few products.
///
/// # Errors
/// libtorch's, and the kernel's.
pub fn update(buffers: &mut Buffers, (grad, scale): (&mut Tensor, f64), train: &Train, step: u64) -> Result<(), TrainError> {
    buffers.updates += 1;
    let rates = rates(train, (step, buffers.updates), scale);
    if Fused::updates(grad.device())? {
        let Buffers { params, exp_avg, exp_avg_sq, ema, .. } = buffers;
        return Ok(fused::adamw([params, exp_avg, exp_avg_sq, ema], grad, &rates)?);
    }
    let total = grad.size1()?;
    let piece = if grad.device() == Device::Cpu { UPDATE_PIECE } else { total.max(1) };
    Ok(tch::no_grad(|| {
        if scale != 1.0 {
            let _ = grad.f_mul_scalar_(scale)?;
        }
        for from in (0..total).step_by(piece as usize) {
            let len = piece.min(total - from);
            update_piece(buffers.narrow(from, len)?, &grad.f_narrow(0, from, len)?, &rates)?;
        }
        Ok::<_, tch::TchError>(())
    })?)
}

/// The numbers of the update that makes this step, of as many updates as there are with it.
fn rates(train: &Train, (step, updates): (u64, u64), scale: f64) -> AdamW {
    let Optimizer { weight_decay, betas, eps, .. } = train.optimizer;
    let corrections = betas.map(|beta| 1.0 - beta.powi(updates.min(i32::MAX as u64) as i32));
    AdamW { scale, lr: learning_rate(train, step), weight_decay, betas, eps, corrections, ema_decay: ema_decay(train, step) }
}

fn update_piece(buffers: Buffers, grad: &Tensor, rates: &AdamW) -> Result<(), tch::TchError> {
    let AdamW { lr, weight_decay, betas: [beta1, beta2], eps, corrections: [correction1, correction2], ema_decay, .. } = *rates;
    let Buffers { mut params, mut exp_avg, mut exp_avg_sq, mut ema, .. } = buffers;
    let _ = params.f_mul_scalar_(1.0 - lr * weight_decay)?;
    let _ = exp_avg.f_lerp_(grad, 1.0 - beta1)?;
    let mut squared = grad.f_square()?;
    let _ = squared.f_mul_scalar_(1.0 - beta2)?;
    let _ = exp_avg_sq.f_mul_scalar_(beta2)?.f_add_(&squared)?;
    let mut denominator = exp_avg_sq.f_sqrt()?;
    let _ = denominator.f_div_scalar_(correction2.sqrt())?;
    let _ = denominator.f_add_scalar_(eps)?;
    let mut change = exp_avg.f_div(&denominator)?;
    let _ = change.f_mul_scalar_(-lr / correction1)?;
    let _ = params.f_add_(&change)?;
    let _ = ema.f_lerp_(&params, 1.0 - ema_decay)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::config::Schedule;

    fn train(kind: ScheduleKind, warmup: u64) -> Train {
        Train { steps: 100, schedule: Schedule { kind, warmup }, ..Train::default() }
    }

    #[test]
    fn the_rate_warms_up_and_then_stays_or_falls_to_zero() {
        let constant = train(ScheduleKind::Constant, 10);
        assert!((learning_rate(&constant, 1) - 1e-5).abs() < 1e-18);
        assert_eq!(learning_rate(&constant, 10), 1e-4);
        assert_eq!(learning_rate(&constant, 1_000_000), 1e-4);
        let cosine = train(ScheduleKind::Cosine, 10);
        assert!((learning_rate(&cosine, 55) - 0.5e-4).abs() < 1e-12);
        assert!(learning_rate(&cosine, 100).abs() < 1e-12);
        assert_eq!(learning_rate(&train(ScheduleKind::Constant, 0), 1), 1e-4);
    }

    fn fresh(params: Tensor) -> Buffers {
        Buffers { exp_avg: params.zeros_like(), exp_avg_sq: params.zeros_like(), ema: params.copy(), params, updates: 0 }
    }

    /// Three updates of `torch.optim.AdamW(lr=0.1, weight_decay=0.01)` on w = [1, -2], gradients [0.5, -1], [-0.25, 0.125], [0, 3].
    #[test]
    fn adamw_matches_torch() {
        let mut config = train(ScheduleKind::Constant, 0);
        config.optimizer.lr = 0.1;
        let params = Tensor::from_slice(&[1f32, -2.0]);
        let mut b = fresh(params);
        for (step, grad) in [[0.5f32, -1.0], [-0.25, 0.125], [0.0, 3.0]].iter().enumerate() {
            update(&mut b, (&mut Tensor::from_slice(grad), 1.0), &config, step as u64 + 1).unwrap();
        }
        let got: Vec<f32> = Vec::try_from(&b.params).unwrap();
        let want = [0.850_007_95f32, -1.883_491_2];
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-6 * w.abs()), "{got:?} {want:?}");
    }

    /// As an optimizer of torch's whose first steps a `GradScaler` has left out: the first update moves each weight by the whole rate, not by it times
    /// (1 - β₁) / (1 - β₁⁴) · √(1 - β₂⁴) / √(1 - β₂).
    #[test]
    fn steps_that_were_left_out_are_not_in_the_bias_correction() {
        let mut config = train(ScheduleKind::Constant, 0);
        config.optimizer.lr = 0.1;
        let mut b = fresh(Tensor::from_slice(&[1f32, -2.0]));
        for (step, grad) in [(4, [0.5f32, -1.0]), (5, [-0.25, 0.125]), (9, [0.0, 3.0])] {
            update(&mut b, (&mut Tensor::from_slice(&grad), 1.0), &config, step).unwrap();
            if step == 4 {
                let got: Vec<f32> = Vec::try_from(&b.params).unwrap();
                // w (1 - 0.1 · 0.01) - 0.1 · sign(gradient)
                assert!(got.iter().zip([0.899f32, -1.898]).all(|(g, w)| (g - w).abs() <= 1e-6), "{got:?}");
            }
        }
        // What torch makes of the three, as above.
        let got: Vec<f32> = Vec::try_from(&b.params).unwrap();
        let want = [0.850_007_95f32, -1.883_491_2];
        assert!(b.updates == 3 && got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-6 * w.abs()), "{got:?} {want:?}");
    }

    /// Updating in pieces that stay in the cache changes nothing.
    #[test]
    fn pieces_do_not_matter() {
        tch::manual_seed(5);
        let (len, config) = (2 * UPDATE_PIECE + 5, train(ScheduleKind::Constant, 0));
        let random = || Tensor::randn([len], (Kind::Float, Device::Cpu));
        let mut grad = random();
        let mut b = Buffers { exp_avg: random(), exp_avg_sq: random().square(), ema: random(), params: random(), updates: 6 };
        let copy = |tensor: &Tensor| tensor.copy();
        let whole = Buffers {
            exp_avg: copy(&b.exp_avg),
            exp_avg_sq: copy(&b.exp_avg_sq),
            ema: copy(&b.ema),
            params: copy(&b.params),
            updates: b.updates,
        };
        update(&mut b, (&mut grad, 1.0), &config, 7).unwrap();
        tch::no_grad(|| update_piece(whole.narrow(0, len).unwrap(), &grad, &rates(&config, (7, 7), 1.0))).unwrap();
        for (one, other) in
            [(&b.params, &whole.params), (&b.exp_avg, &whole.exp_avg), (&b.exp_avg_sq, &whole.exp_avg_sq), (&b.ema, &whole.ema)]
        {
            assert!((one - other).abs().max().double_value(&[]) <= 1e-7 * one.abs().max().double_value(&[]));
        }
    }

    #[test]
    fn clipping_scales_to_the_limit_and_leaves_small_gradients_alone() {
        let mut grad = Tensor::from_slice(&[3f32, 4.0]);
        assert_eq!(square_norm(&grad).unwrap().double_value(&[]), 25.0);
        assert_eq!((clipping(5.0, 0.0), clipping(5.0, 10.0)), (1.0, 1.0));
        let _ = grad.g_mul_scalar_(clipping(5.0, 1.0));
        assert!((grad.norm().double_value(&[]) - 1.0).abs() < 1e-5);
    }

    /// The kernel that a GPU takes, by its text for the processor, clipping with it.
    #[test]
    fn the_one_pass_update_is_the_same_but_for_its_rounding() {
        tch::manual_seed(6);
        let config = train(ScheduleKind::Constant, 10);
        let random = || Tensor::randn([1003], (Kind::Float, Device::Cpu));
        let (mut grad, second) = (random(), random().square());
        let mut plain = Buffers { exp_avg: random(), exp_avg_sq: second.copy(), ema: random(), params: random(), updates: 1 };
        let [mut params, mut first, mut second, mut ema] = [&plain.params, &plain.exp_avg, &plain.exp_avg_sq, &plain.ema].map(Tensor::copy);
        fused::adamw([&mut params, &mut first, &mut second, &mut ema], &grad, &rates(&config, (3, 2), 0.25)).unwrap();
        update(&mut plain, (&mut grad, 0.25), &config, 3).unwrap();
        for (one, other) in [(&plain.params, params), (&plain.exp_avg, first), (&plain.exp_avg_sq, second), (&plain.ema, ema)] {
            assert!((one - other).abs().max().double_value(&[]) <= 1e-6 * one.abs().max().double_value(&[]));
        }
    }
}
