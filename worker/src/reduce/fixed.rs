//! Fixed point: gradients as 64-bit integers, so that their sum does not depend on its order (SAME).
//!
//! Every lane's gradient is rounded once, on its own, to a multiple of 2⁻⁴⁴, and from then on only integers are added. Which rank had which
//! lanes, in what order they came, and how the ring cut them, cannot be seen in the sum.
//!
//! # Range and resolution
//! - An element of one lane may be up to 2¹⁸ / lanes; larger ones, infinities and NaNs are refused with their index ([`FixedError::Range`]). So the sum of all
//!   lanes stays below 2⁶² in units of 2⁻⁴⁴, half of what 64 bits hold: it cannot wrap. A gradient of that size is a run that has diverged.
//! - The error is at most 2⁻⁴⁵ ≈ 2.8·10⁻¹⁴ per lane and element, absolute. An `f32` has 24 bits, so elements above 2⁻²⁰ ≈ 10⁻⁶ lose nothing at all
//!   (their last bit is worth 2⁻⁴⁴ or more); below that the relative error is 2⁻⁴⁵ / |g|: 3·10⁻⁶ at 10⁻⁸, 3·10⁻⁴ at 10⁻¹⁰.
//! - Adam does not care about the scale of gradients, except through its `eps` (10⁻⁸), and that draws the line: what is much
//!   smaller than `eps` hardly moves a weight, and what is not has a relative error of a few 10⁻⁶, ten times better than bfloat16 arithmetic gives anyone.
//!   Where a loss makes smaller gradients all the same, scale it by a power of two: then nothing else changes.
//!
//! # Arithmetic
//! `g · 2⁴⁴` is exact in `f32` (only the exponent changes), and rounding it to an integer, half to even, is exact too. So any
//! correct implementation gives the same integers, and both of ours do: tensor operations where the gradient lies on a GPU, and one
//! pass over memory where it does not (66.8 million elements on one core: 0.06 s, where tensor operations take 0.65 s).

use tch::{Device, Kind, Tensor};

/// 2⁴⁴: how many units make one.
pub const SCALE: f64 = (1_u64 << 44) as f64;

/// 2¹⁸: the bound for the sum over all lanes of the largest elements.
const RANGE: f64 = (1 << 18) as f64;

/// Elements that are checked before they are added; few enough to stay in the cache.
const BLOCK: usize = 4096;

/// Why gradients could not be added up in fixed point. The accumulator then holds part of the lane: drop it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FixedError {
    /// An element is NaN, infinite or too large.
    #[error(
        "gradient element {index} is {value} (expected a finite number below {limit}); has the loss diverged? lower the learning rate or clip"
    )]
    Range {
        /// Its index in the flat gradient.
        index: usize,
        /// Its value.
        value: f32,
        /// The bound that it breaks.
        limit: f32,
    },
    /// A tensor is not of the kind that is added here.
    #[error("{what}: expected {expected}, found {found}")]
    Tensor {
        /// Which tensor.
        what: &'static str,
        /// What is needed.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A tensor operation failed.
    #[error("tensor: {0}")]
    Torch(#[from] tch::TchError),
}

/// Adds up the gradients of a fixed number of lanes.
#[derive(Clone, Copy, Debug)]
pub struct FixedPoint {
    limit: f32,
}

impl FixedPoint {
    /// For a global batch of so many lanes, over all ranks together.
    pub fn new(lanes: u32) -> Self {
        Self { limit: (RANGE / f64::from(lanes.max(1))) as f32 }
    }

    /// Elements at or above this magnitude are refused.
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// Adds one lane's gradient `grad` (`f32`) to `acc` (`i64`), both contiguous, of one length and on one device.
    ///
    /// # Errors
    /// [`FixedError::Range`] for an element that is not finite or too large; [`FixedError::Tensor`].
    pub fn add(&self, acc: &mut Tensor, grad: &Tensor) -> Result<(), FixedError> {
        check("accumulator", acc, Kind::Int64)?;
        check("gradient", grad, Kind::Float)?;
        let place = |tensor: &Tensor| format!("{} elements on {:?}", tensor.numel(), tensor.device());
        if (acc.numel(), acc.device()) != (grad.numel(), grad.device()) {
            return Err(FixedError::Tensor { what: "gradient", expected: place(acc), found: place(grad) });
        }
        if acc.device() != Device::Cpu {
            return self.add_by_tensor_operations(acc, grad);
        }
        if acc.numel() == 0 {
            return Ok(());
        }
        let n = acc.numel();
        // SAFETY: both are contiguous, on the CPU, of these dtypes and this length (checked above) and initialised by torch. They cannot overlap where it
        // matters: their dtypes differ, so they are different storages, and `acc` is borrowed exclusively.
        let (acc, grad) = unsafe {
            let acc = std::slice::from_raw_parts_mut(acc.data_ptr().cast::<i64>(), n);
            (acc, std::slice::from_raw_parts(grad.data_ptr().cast::<f32>().cast_const(), n))
        };
        self.add_slice(acc, grad)
    }

    /// Adds `grad` to `acc`, element by element; what is left over at the end of the longer one is not looked at.
    ///
    /// # Errors
    /// [`FixedError::Range`].
    pub fn add_slice(&self, acc: &mut [i64], grad: &[f32]) -> Result<(), FixedError> {
        let bound = self.limit.to_bits();
        for (number, (acc, grad)) in acc.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
            // Without its sign, a float's bits order as its values do, with infinity and the NaNs above all: one comparison finds all that is wrong.
            let worst = grad.iter().fold(0, |worst, x| worst.max(x.to_bits() & 0x7fff_ffff));
            if worst >= bound {
                return Err(self.refuse(grad, number * BLOCK));
            }
            acc.iter_mut().zip(grad).for_each(|(sum, x)| *sum += to_fixed(*x));
        }
        Ok(())
    }

    fn refuse(&self, grad: &[f32], offset: usize) -> FixedError {
        let index = grad.iter().position(|x| !self.admits(*x)).unwrap_or(0);
        FixedError::Range { index: offset + index, value: grad[index], limit: self.limit }
    }

    fn admits(&self, x: f32) -> bool {
        x.abs() < self.limit
    }

    /// The same where the memory is not the processor's.
    fn add_by_tensor_operations(&self, acc: &mut Tensor, grad: &Tensor) -> Result<(), FixedError> {
        let _no_grad = tch::no_grad_guard();
        let grad = grad.f_flatten(0, -1)?;
        // NaN is not below anything.
        let bad = grad.f_abs()?.f_lt(f64::from(self.limit))?.f_logical_not()?;
        if bad.f_any()?.f_int64_value(&[])? != 0 {
            let index = bad.f_to_kind(Kind::Int)?.f_argmax(0, false)?.f_int64_value(&[])?;
            return Err(FixedError::Range { index: index as usize, value: grad.f_double_value(&[index])? as f32, limit: self.limit });
        }
        let units = grad.f_mul_scalar(SCALE)?.f_round_()?.f_to_kind(Kind::Int64)?;
        let _ = acc.f_view([-1])?.f_add_(&units)?;
        Ok(())
    }
}

/// An accumulator: `[numel]` zeros, `i64`.
///
/// # Errors
/// [`FixedError::Torch`], when there is no memory for it.
pub fn zeros(numel: i64, device: Device) -> Result<Tensor, FixedError> {
    Ok(Tensor::f_zeros([numel], (Kind::Int64, device))?)
}

/// The sum, as `f32` in the accumulator's shape. Rounds to 53 bits and then to 24, by the same rule everywhere.
///
/// # Errors
/// [`FixedError::Torch`], when there is no memory for it; [`FixedError::Tensor`].
pub fn to_f32(acc: &Tensor) -> Result<Tensor, FixedError> {
    check("accumulator", acc, Kind::Int64)?;
    if acc.device() != Device::Cpu {
        return Ok(acc.f_to_kind(Kind::Double)?.f_mul_scalar_(1.0 / SCALE)?.f_to_kind(Kind::Float)?);
    }
    let out = Tensor::f_empty(acc.size(), (Kind::Float, Device::Cpu))?;
    let n = acc.numel();
    if n > 0 {
        // SAFETY: both are contiguous, on the CPU, and of these dtypes and this length; `out` was just made and nobody else has it. Its memory
        // is written only, through a pointer to possibly uninitialised values.
        let (acc, out) = unsafe {
            let out = std::slice::from_raw_parts_mut(out.data_ptr().cast::<std::mem::MaybeUninit<f32>>(), n);
            (std::slice::from_raw_parts(acc.data_ptr().cast::<i64>().cast_const(), n), out)
        };
        out.iter_mut().zip(acc).for_each(|(out, units)| {
            out.write((*units as f64 * (1.0 / SCALE)) as f32);
        });
    }
    Ok(out)
}
/// `x` in units of 2⁻⁴⁴, rounded half to even; |x| below 2¹⁸.
///
/// Processors before AVX-512 have no vector instruction for this, but adding 1.5·2⁵² to a double leaves its value, rounded to an integer, in the low bits
/// of the sum. That reaches 51 bits, so the number is taken in two parts: multiples of 2²⁴ units, and the rest, which is exact.
/// Half to even still holds: the upper part is even.
fn to_fixed(x: f32) -> i64 {
    const MAGIC: f64 = 1.5 * (1_u64 << 52) as f64;
    const SPLIT: f64 = (1 << 24) as f64;
    let integer = |shifted: f64| (shifted.to_bits() as i64).wrapping_sub(MAGIC.to_bits() as i64);
    let units = f64::from(x) * SCALE;
    let upper = units * (1.0 / SPLIT) + MAGIC;
    let rest = units - (upper - MAGIC) * SPLIT;
    (integer(upper) << 24) + integer(rest + MAGIC)
}

fn check(what: &'static str, tensor: &Tensor, kind: Kind) -> Result<(), FixedError> {
    let found = tensor.f_kind()?;
    if found == kind && tensor.is_contiguous() {
        return Ok(());
    }
    let layout = if tensor.is_contiguous() { "contiguous" } else { "not contiguous" };
    Err(FixedError::Tensor { what, expected: format!("{kind:?}, contiguous"), found: format!("{found:?}, {layout}") })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reduce::{Collective, InProcess};

    /// The definition, in arithmetic that is wide enough to be obviously right.
    fn reference(x: f32) -> i64 {
        (f64::from(x) * SCALE).round_ties_even() as i64
    }

    /// Floats of all magnitudes up to the limit of one lane: any bits with the exponent cut.
    fn gradients(n: usize) -> impl Strategy<Value = Vec<f32>> {
        let one = (any::<bool>(), 0_u32..145, 0_u32..1 << 23);
        let one = one.prop_map(|(sign, exponent, mantissa)| f32::from_bits(u32::from(sign) << 31 | exponent << 23 | mantissa));
        prop::collection::vec(one, n)
    }

    proptest! {
        #[test]
        fn conversion_is_rounding_half_to_even(grad in gradients(64)) {
            for x in grad {
                prop_assert_eq!(to_fixed(x), reference(x), "{}", x);
            }
        }

        #[test]
        fn both_implementations_give_the_same_bits(grad in gradients(300)) {
            let fixed = FixedPoint::new(1);
            let grad = Tensor::from_slice(&grad);
            let [mut by_slice, mut by_tensor] = [0; 2].map(|_| zeros(300, Device::Cpu).expect("memory"));
            fixed.add(&mut by_slice, &grad).expect("in range");
            fixed.add_by_tensor_operations(&mut by_tensor, &grad).expect("in range");
            prop_assert_eq!(by_slice, by_tensor);
        }

        #[test]
        fn any_dealing_of_lanes_to_ranks_and_any_order_gives_the_same_bits(
            lanes in prop::collection::vec(gradients(17), 8).prop_map(|lanes| {
                lanes.into_iter().map(|lane| lane.into_iter().map(|x| x / 8.0).collect::<Vec<_>>()).collect::<Vec<_>>()
            }),
            owners in prop::collection::vec(0_usize..3, 8),
            order in Just((0..8_usize).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let fixed = FixedPoint::new(8);
            let mut serial = vec![0; 17];
            for lane in &lanes {
                fixed.add_slice(&mut serial, lane).expect("in range");
            }
            let dealt = std::thread::scope(|scope| {
                let (lanes, owners, order) = (&lanes, &owners, &order);
                let started: Vec<_> = InProcess::group(3).into_iter().map(|mut rank| scope.spawn(move || {
                    let mut acc = vec![0; 17];
                    for lane in order.iter().filter(|lane| owners[**lane] == rank.rank() as usize) {
                        fixed.add_slice(&mut acc, &lanes[*lane]).expect("in range");
                    }
                    rank.sum_i64(&mut acc).expect("all take part");
                    acc
                })).collect();
                started.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
            });
            for acc in dealt {
                prop_assert_eq!(&acc, &serial);
            }
        }

        #[test]
        fn the_error_is_at_most_half_a_unit_per_lane(lanes in prop::collection::vec(gradients(5), 4)) {
            // Kept where a double holds the sum of the lanes to the last bit.
            let lanes: Vec<Vec<f32>> = lanes.into_iter().map(|lane| lane.into_iter().map(|x| x % 1.0).collect()).collect();
            let fixed = FixedPoint::new(4);
            let mut acc = vec![0; 5];
            for lane in &lanes {
                fixed.add_slice(&mut acc, lane).expect("in range");
            }
            for (i, units) in acc.iter().enumerate() {
                let exact: f64 = lanes.iter().map(|lane| f64::from(lane[i])).sum();
                prop_assert!((*units as f64 / SCALE - exact).abs() <= 4.0 / (2.0 * SCALE) + 4.0 * f64::EPSILON, "{} {}", units, exact);
            }
        }
    }

    #[test]
    fn halves_go_to_the_even_neighbour_at_every_size() {
        let unit = 1.0 / SCALE as f32;
        for (x, units) in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (0.49, 0), (0.51, 1)] {
            assert_eq!(to_fixed(x * unit), units, "{x} units");
        }
        let split = (1 << 24) as f32;
        for x in [split / 2.0, split * 1.5, split * 2.5, -split * 1.5, split * 0.5 + 1.0] {
            assert_eq!(to_fixed(x * unit), x as i64);
        }
    }

    #[test]
    fn the_largest_admitted_elements_of_all_lanes_do_not_wrap() {
        for lanes in [1, 3, 7, 256] {
            let fixed = FixedPoint::new(lanes);
            let largest = f32::from_bits(fixed.limit().to_bits() - 1);
            for sign in [1.0, -1.0] {
                let mut acc = [0];
                for _ in 0..lanes {
                    fixed.add_slice(&mut acc, &[sign * largest]).expect("just below the limit");
                }
                assert_eq!(acc[0], reference(sign * largest) * i64::from(lanes));
                assert!(acc[0].unsigned_abs() < 1 << 63);
            }
        }
    }

    #[test]
    fn what_is_not_finite_or_too_large_is_refused_by_index_by_both() {
        let fixed = FixedPoint::new(16);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 16384.0, -1e30] {
            for index in [0, BLOCK - 1, BLOCK, 9000] {
                let mut grad = vec![1.0; 9001];
                grad[index] = bad;
                let grad = Tensor::from_slice(&grad);
                let mut acc = zeros(9001, Device::Cpu).expect("memory");
                for result in [fixed.add(&mut acc, &grad), fixed.add_by_tensor_operations(&mut acc, &grad)] {
                    match result {
                        Err(FixedError::Range { index: found, value, limit }) => {
                            assert_eq!((found, value.to_bits() << 1, limit), (index, bad.to_bits() << 1, 16384.0));
                        }
                        other => panic!("expected a refusal of {bad} at {index}, found {other:?}"),
                    }
                }
            }
        }
    }

    #[test]
    fn sums_come_back_as_floats() {
        let fixed = FixedPoint::new(2);
        let grad = Tensor::from_slice(&[0.0_f32, 1.0, -2.5, 1e-6, 3.25e-13, 1000.125]);
        let mut acc = zeros(6, Device::Cpu).expect("memory");
        fixed.add(&mut acc, &grad).expect("in range");
        let back = Vec::<f32>::try_from(to_f32(&acc).expect("memory")).expect("f32");
        assert_eq!(back[..4], [0.0, 1.0, -2.5, 1e-6]);
        assert!((back[4] - 3.25e-13).abs() <= 2.9e-14 && back[5] == 1000.125);
        assert_eq!(to_f32(&Tensor::zeros([0], (Kind::Int64, Device::Cpu))).expect("memory").numel(), 0);
    }

    #[test]
    fn tensors_of_other_kinds_and_lengths_are_refused() {
        let fixed = FixedPoint::new(1);
        let mut acc = zeros(6, Device::Cpu).expect("memory");
        let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let refused = [float(&[5]), float(&[2, 3]).tr(), Tensor::zeros([6], (Kind::Double, Device::Cpu))];
        for grad in refused {
            assert!(matches!(fixed.add(&mut acc, &grad), Err(FixedError::Tensor { what: "gradient", .. })));
        }
        let mut wrong = float(&[6]);
        assert!(matches!(fixed.add(&mut wrong, &float(&[6])), Err(FixedError::Tensor { what: "accumulator", .. })));
        assert!(to_f32(&wrong).is_err());
        fixed.add(&mut acc, &float(&[2, 3])).expect("shapes may differ where lengths agree");
    }
}
