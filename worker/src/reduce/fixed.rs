//! Fixed point: gradients as 64-bit integers, so that their sum does not depend on its order (SAME).
//!
//! Every lane's gradient is rounded once, on its own, to a multiple of 2⁻⁴⁴, and from then on only integers are added. Which rank had which
//! lanes, in what order they came, and how the ring cut them, cannot be seen in the sum.
//!
//! # Range and resolution
//! - An element of one lane may be up to 2¹⁸ / lanes; larger ones, infinities and NaNs are left out of the sum, and told of ([`LeftOut`]): whoever
//!   sums must then drop the step. So the sum of all lanes stays below 2⁶² in units of 2⁻⁴⁴, half of what 64 bits hold: it cannot wrap. A
//!   gradient of that size is a run that has diverged.
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

/// Why gradients cannot be added up in fixed point.
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

/// What was left out of a sum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftOut {
    /// How many elements.
    pub elements: usize,
    /// The index of the first.
    pub index: usize,
    /// Its value.
    pub value: f32,
}

impl LeftOut {
    /// As a tensor `[3]` float64, which holds every index.
    fn tensor(self) -> Result<Tensor, tch::TchError> {
        Tensor::f_from_slice(&[self.elements as f64, self.index as f64, f64::from(self.value)])
    }

    /// From what [`FixedPoint::add`] returned. Waits for its device.
    ///
    /// # Errors
    /// libtorch's.
    pub fn read(tensor: &Tensor) -> Result<Option<Self>, tch::TchError> {
        let mut told = [0.0; 3];
        tensor.f_to_device(Device::Cpu)?.f_copy_data(&mut told, 3)?;
        let [elements, index, value] = told;
        Ok((elements > 0.0).then_some(Self { elements: elements as usize, index: index as usize, value: value as f32 }))
    }
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

    /// Elements at or above this magnitude are left out.
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// An element of that index and value, as the error that it is.
    pub fn refusal(&self, index: usize, value: f32) -> FixedError {
        FixedError::Range { index, value, limit: self.limit }
    }

    /// Adds one lane's gradient `grad` (`f32`) to `acc` (`i64`), both contiguous, of one length and on one device. Tells what it left out, for
    /// [`LeftOut::read`] and as numbers on the device: `[3]` float64, how many elements, the index of the first and its value. It does not wait for
    /// a device.
    ///
    /// # Errors
    /// [`FixedError::Tensor`].
    pub fn add(&self, acc: &mut Tensor, grad: &Tensor) -> Result<Tensor, FixedError> {
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
            return Ok(LeftOut::default().tensor()?);
        }
        let n = acc.numel();
        // SAFETY: both are contiguous, on the CPU, of these dtypes and this length (checked above) and initialised by torch. They cannot overlap where it
        // matters: their dtypes differ, so they are different storages, and `acc` is borrowed exclusively.
        let (acc, grad) = unsafe {
            let acc = std::slice::from_raw_parts_mut(acc.data_ptr().cast::<i64>(), n);
            (acc, std::slice::from_raw_parts(grad.data_ptr().cast::<f32>().cast_const(), n))
        };
        Ok(self.add_slice(acc, grad).tensor()?)
    }

    /// Adds `grad` to `acc`, element by element; what is left over at the end of the longer one is not looked at.
    pub fn add_slice(&self, acc: &mut [i64], grad: &[f32]) -> LeftOut {
        let bound = self.limit.to_bits();
        let mut left_out = LeftOut::default();
        for (number, (acc, grad)) in acc.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
            // Without its sign, a float's bits order as its values do, with infinity and the NaNs above all: one comparison finds all that is wrong.
            let worst = grad.iter().fold(0, |worst, x| worst.max(x.to_bits() & 0x7fff_ffff));
            if worst < bound {
                acc.iter_mut().zip(grad).for_each(|(sum, x)| *sum += to_fixed(*x));
            } else {
                self.add_what_is_admitted((acc, grad), number * BLOCK, &mut left_out);
            }
        }
        left_out
    }

    fn add_what_is_admitted(&self, (acc, grad): (&mut [i64], &[f32]), offset: usize, left_out: &mut LeftOut) {
        for (index, (sum, x)) in acc.iter_mut().zip(grad).enumerate() {
            if x.abs() < self.limit {
                *sum += to_fixed(*x);
                continue;
            }
            if left_out.elements == 0 {
                (left_out.index, left_out.value) = (offset + index, *x);
            }
            left_out.elements += 1;
        }
    }

    /// The same where the memory is not the processor's.
    fn add_by_tensor_operations(&self, acc: &mut Tensor, grad: &Tensor) -> Result<Tensor, FixedError> {
        let _no_grad = tch::no_grad_guard();
        let grad = grad.f_flatten(0, -1)?;
        // NaN is not below anything.
        let bad = grad.f_abs()?.f_lt(f64::from(self.limit))?.f_logical_not()?;
        let units = grad.f_masked_fill(&bad, 0.0)?.f_mul_scalar_(SCALE)?.f_round_()?.f_to_kind(Kind::Int64)?;
        let _ = acc.f_view([-1])?.f_add_(&units)?;
        let wide = |tensor: Tensor| tensor.f_to_kind(Kind::Double)?.f_reshape([1]);
        if grad.numel() == 0 {
            return Ok(Tensor::f_zeros([3], (Kind::Double, grad.device()))?);
        }
        // Of several largest ones, the first.
        let index = bad.f_to_kind(Kind::Uint8)?.f_argmax(0, true)?;
        let told = [wide(bad.f_sum(Kind::Int64)?)?, wide(index.shallow_clone())?, wide(grad.f_index_select(0, &index)?)?];
        Ok(Tensor::f_cat(&told, 0)?)
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
            let told = fixed.add(&mut by_slice, &grad).expect("memory");
            prop_assert_eq!(LeftOut::read(&told).expect("on the processor"), None);
            let told = fixed.add_by_tensor_operations(&mut by_tensor, &grad).expect("memory");
            prop_assert_eq!(LeftOut::read(&told).expect("on the processor"), None);
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
                prop_assert_eq!(fixed.add_slice(&mut serial, lane), LeftOut::default());
            }
            let dealt = std::thread::scope(|scope| {
                let (lanes, owners, order) = (&lanes, &owners, &order);
                let started: Vec<_> = InProcess::group(3).into_iter().map(|mut rank| scope.spawn(move || {
                    let mut acc = vec![0; 17];
                    for lane in order.iter().filter(|lane| owners[**lane] == rank.rank() as usize) {
                        assert_eq!(fixed.add_slice(&mut acc, &lanes[*lane]).elements, 0);
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
                prop_assert_eq!(fixed.add_slice(&mut acc, lane), LeftOut::default());
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
                    assert_eq!(fixed.add_slice(&mut acc, &[sign * largest]).elements, 0, "just below the limit");
                }
                assert_eq!(acc[0], reference(sign * largest) * i64::from(lanes));
                assert!(acc[0].unsigned_abs() < 1 << 63);
            }
        }
    }

    #[test]
    fn what_is_not_finite_or_too_large_is_left_out_and_told_by_index_by_both() {
        let fixed = FixedPoint::new(16);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 16384.0, -1e30] {
            for index in [0, BLOCK - 1, BLOCK, 9000] {
                let mut grad = vec![1.0; 9001];
                grad[index] = bad;
                // It is not the only one.
                grad[if index == 9000 { 8999 } else { 9000 }] = if index == 9000 { 1.0 } else { f32::INFINITY };
                let grad = Tensor::from_slice(&grad);
                let mut acc = zeros(9001, Device::Cpu).expect("memory");
                for told in [fixed.add(&mut acc, &grad), fixed.add_by_tensor_operations(&mut acc, &grad)] {
                    let found = LeftOut::read(&told.expect("tensors that fit")).expect("on the processor");
                    let found = found.unwrap_or_else(|| panic!("{bad} at {index} went in"));
                    assert_eq!((found.index, found.value.to_bits() << 1), (index, bad.to_bits() << 1));
                    let others = grad.slice(0, index as i64 + 1, None, 1).abs().lt(16384.0).logical_not().sum(Kind::Int64);
                    assert_eq!(found.elements as i64, 1 + others.int64_value(&[]));
                    assert!(fixed.refusal(found.index, found.value).to_string().contains(&format!("element {index} is {}", found.value)));
                }
                // All others are there, twice.
                assert_eq!(acc.int64_value(&[index as i64]), 0);
                let there = 9001 - if index == 9000 { 1 } else { 2 };
                let sum: f64 = acc.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
                assert_eq!(sum, f64::from(2 * there) * SCALE);
            }
        }
    }

    #[test]
    fn sums_come_back_as_floats() {
        let fixed = FixedPoint::new(2);
        let grad = Tensor::from_slice(&[0.0_f32, 1.0, -2.5, 1e-6, 3.25e-13, 1000.125]);
        let mut acc = zeros(6, Device::Cpu).expect("memory");
        let told = fixed.add(&mut acc, &grad).expect("memory");
        assert_eq!(LeftOut::read(&told).expect("on the processor"), None);
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
        let _ = fixed.add(&mut acc, &float(&[2, 3])).expect("shapes may differ where lengths agree");
    }
}
