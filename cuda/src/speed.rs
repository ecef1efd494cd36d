//! Attention by our own kernels beside libtorch's, timed on the GPU that is there: which is faster depends on the GPU and on the versions of what libtorch
//! takes. Only where cuDNN may search too ([`precision::searches`]): the two round differently, and which one wins may differ from one process to another.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::fused::{self, Fused};
use crate::stream::Stream;
use crate::{Error, Result, agreement, gpu, graph, memory, precision};

/// Passes there and back that are timed of each of two, by turns; some before them let libraries search and memory be taken.
const TIMED: usize = 5;
const BEFORE: usize = 2;

/// What attends to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attention {
    /// A map's pixels to themselves: [`fused::pixels`].
    Pixels,
    /// Pixels to few keys: [`fused::few_keys`].
    FewKeys,
}

impl Attention {
    /// An error of our kernels', with the name that leaves them out.
    fn broke(self, error: &Error) -> Error {
        let name = if self == Self::Pixels { "pixels" } else { "cross" };
        Error(format!("while {} was timed: {}", agreement::tried(name), agreement::first_line(error)))
    }
}

/// One level of a U-Net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Level {
    attention: Attention,
    samples: i64,
    pixels: i64,
    heads: i64,
    width: i64,
}

/// SD 1.5's levels at 512², and SDXL's widest at 1024². So many samples that a GPU takes longer for a pass than a processor for its operators, of which
/// libtorch's way has more: a recorded step does not wait for them. And so many that queries to few keys, which are read once, are not found in a cache.
const LEVELS: [Level; 6] = [
    Level { attention: Attention::Pixels, samples: 8, pixels: 4096, heads: 8, width: 40 },
    Level { attention: Attention::Pixels, samples: 32, pixels: 1024, heads: 8, width: 80 },
    Level { attention: Attention::FewKeys, samples: 64, pixels: 4096, heads: 8, width: 40 },
    Level { attention: Attention::FewKeys, samples: 128, pixels: 1024, heads: 8, width: 80 },
    Level { attention: Attention::FewKeys, samples: 256, pixels: 256, heads: 8, width: 160 },
    Level { attention: Attention::FewKeys, samples: 32, pixels: 4096, heads: 10, width: 64 },
];
/// Keys of those that attend to few.
const KEYS: i64 = 64;

/// One attention by both, for heads of `width` channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Which.
    pub attention: Attention,
    /// Channels of a head.
    pub width: i64,
    /// Seconds there and back by our own kernels, the median.
    pub own: f64,
    /// By libtorch's.
    pub libtorchs: f64,
}

impl Measured {
    /// Whether libtorch's is taken.
    fn lost(&self) -> bool {
        self.own > self.libtorchs
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.attention {
            Attention::Pixels => "of pixels to themselves",
            Attention::FewKeys => "to few keys",
        };
        let (width, own, libtorchs) = (self.width, 1e3 * self.own, 1e3 * self.libtorchs);
        let taken = if self.lost() { "libtorch's" } else { "ours" };
        write!(
            f,
            "attention {what}, heads of {width}: by our kernels {own:.2} ms there and back, by libtorch's {libtorchs:.2}: {taken} it is"
        )
    }
}

/// What was measured on the first GPU, by kind. Whoever records a lane looks it up, so that nobody holds it for long.
static MEASURED: Mutex<Vec<(Kind, Vec<Measured>)>> = Mutex::new(Vec::new());

/// Times those attentions of `fused` that are [timed](Fused::timed), if they were not before in this kind: a second or two, and up to two GB of memory for as
/// long; where that is not to be had, fewer are timed. Only where it is [searched](precision::searches).
///
/// # Errors
/// CUDA's own.
pub fn measure(fused: Fused, kind: Kind, device: Device) -> Result<()> {
    if !fused.timed || !(fused.cross || fused.pixels) || !gpu::is_loaded() || !device.is_cuda() || !precision::searches() {
        return Ok(());
    }
    let asked = |level: &&Level| match level.attention {
        Attention::Pixels => fused.pixels,
        Attention::FewKeys => fused.cross,
    };
    once(kind, || {
        let mut found = Vec::new();
        for level in LEVELS.iter().filter(asked) {
            match level.measure(kind, device) {
                Err(error) if error.to_string().contains("out of memory") => break,
                measured => found.push(measured?),
            }
        }
        memory::empty_cache()?;
        Ok(found)
    })
}

/// Keeps what `measure` finds in `kind`, unless something was found before.
fn once(kind: Kind, measure: impl FnOnce() -> Result<Vec<Measured>>) -> Result<()> {
    // One at a time; and libraries may wait for the whole device when they do something for the first time.
    let _unrecorded = graph::unrecorded();
    if all().iter().all(|(known, _)| *known != kind) {
        let found = measure()?;
        all().push((kind, found));
    }
    Ok(())
}

fn all() -> MutexGuard<'static, Vec<(Kind, Vec<Measured>)>> {
    MEASURED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was measured in `kind`.
pub fn measured(kind: Kind) -> Vec<Measured> {
    all().iter().find(|(known, _)| *known == kind).map(|(_, found)| found.clone()).unwrap_or_default()
}

/// Whether libtorch's attention was faster, where both were timed.
pub(crate) fn lost(attention: Attention, width: i64, kind: Kind) -> bool {
    measured(kind).iter().any(|found| (found.attention, found.width) == (attention, width) && found.lost())
}

impl Level {
    fn measure(self, kind: Kind, device: Device) -> Result<Measured> {
        let inputs = self.inputs(kind, device)?;
        let slopes = numbers(&[self.samples, self.pixels, self.heads * self.width], kind, device)?;
        let pass = |own: bool| -> Result<f64> {
            finish(device)?;
            let begin = Instant::now();
            let y = if own { own_attention(&inputs, self.heads)? } else { libtorchs_attention(&inputs, self.heads)? };
            Tensor::f_run_backward(&[y.f_mul(&slopes)?.f_sum(Kind::Float)?], &inputs, false, false)?;
            finish(device)?;
            Ok(begin.elapsed().as_secs_f64())
        };
        let [mut own, mut libtorchs] = [const { Vec::new() }; 2];
        for turn in 0..BEFORE + TIMED {
            // At these sizes nobody has tried our kernels yet.
            let both = (pass(true).map_err(|error| self.attention.broke(&error))?, pass(false)?);
            if turn >= BEFORE {
                own.push(both.0);
                libtorchs.push(both.1);
            }
        }
        Ok(Measured { attention: self.attention, width: self.width, own: median(own), libtorchs: median(libtorchs) })
    }

    /// Queries, keys and values in one, or queries and both others.
    fn inputs(self, kind: Kind, device: Device) -> Result<Vec<Tensor>> {
        let channels = self.heads * self.width;
        let leaf = |tokens, channels| -> Result<Tensor> {
            Ok(numbers(&[self.samples, tokens, channels], kind, device)?.f_set_requires_grad(true)?)
        };
        Ok(match self.attention {
            Attention::Pixels => vec![leaf(self.pixels, 3 * channels)?],
            Attention::FewKeys => vec![leaf(self.pixels, channels)?, leaf(KEYS, 2 * channels)?],
        })
    }
}

/// Attention by our own kernels.
///
/// # Shapes
/// Of pixels to themselves `[B, N, 3 H d]` alone; to few keys `[B, N, H d]` and `[B, L, 2 H d]`; to `[B, N, H d]`.
///
/// # Errors
/// Shapes or kinds that they do not take.
pub fn own_attention(inputs: &[Tensor], heads: i64) -> Result<Tensor> {
    match inputs {
        [qkv] => fused::pixels(qkv, heads),
        [q, kv] => fused::few_keys(q, kv, heads),
        _ => Err(not_inputs(inputs)),
    }
}

/// The same by libtorch's.
///
/// # Errors
/// See [`own_attention`].
pub fn libtorchs_attention(inputs: &[Tensor], heads: i64) -> Result<Tensor> {
    let parts = match inputs {
        [qkv] => qkv.f_chunk(3, -1)?,
        [q, kv] => std::iter::once(q.shallow_clone()).chain(kv.f_chunk(2, -1)?).collect(),
        _ => return Err(not_inputs(inputs)),
    };
    let [q, k, v] = <[Tensor; 3]>::try_from(parts).map_err(|parts| not_inputs(&parts))?;
    attend(&q, &k, &v, heads)
}

/// softmax(Q Kᵀ / √d) V by libtorch's own operator.
///
/// # Shapes
/// `q` `[B, N, H d]`, `k` and `v` `[B, M, H d]`; to `[B, N, H d]`.
///
/// # Errors
/// libtorch's own.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64) -> Result<Tensor> {
    let split = |x: &Tensor| x.f_unflatten(-1, [heads, -1])?.f_transpose(1, 2); // [B, H, N, d]
    let y = Tensor::f_scaled_dot_product_attention(&split(q)?, &split(k)?, &split(v)?, None::<&Tensor>, 0.0, false, None, false)?;
    Ok(y.f_transpose(1, 2)?.f_flatten(2, 3)?)
}

fn not_inputs(found: &[Tensor]) -> Error {
    let sizes: Vec<_> = found.iter().map(Tensor::size).collect();
    Error(format!("attention takes queries, keys and values in one tensor, or queries and both others, not {sizes:?}"))
}

/// Numbers between -1 and 1; libtorch's generator is left alone.
fn numbers(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
    let count = Tensor::f_arange(shape.iter().product::<i64>(), (Kind::Float, device))?;
    Ok(count.f_mul_scalar(12.9898)?.f_sin()?.f_mul_scalar(437.585)?.f_sin()?.f_reshape(shape)?.f_to_kind(kind)?)
}

/// Waits for what this thread has put on the device.
fn finish(device: Device) -> Result<()> {
    if device.is_cuda() { Stream::current(device)?.synchronize() } else { Ok(()) }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both make the same, so that either may be taken.
    #[test]
    fn what_is_timed_is_the_same_by_both() {
        for level in LEVELS {
            let small = Level { samples: 2, pixels: 70, heads: 2, ..level };
            let inputs = small.inputs(Kind::Float, Device::Cpu).unwrap();
            let [own, libtorchs] = [own_attention, libtorchs_attention].map(|by| by(&inputs, small.heads).unwrap());
            let apart = own.f_sub(&libtorchs).unwrap().abs().max().double_value(&[]);
            assert!(own.size() == [2, 70, 2 * level.width] && apart < 1e-5, "{level:?}: {apart}");
            let found = small.measure(Kind::Float, Device::Cpu).unwrap();
            assert_eq!((found.attention, found.width), (level.attention, level.width));
            assert!(found.own > 0.0 && found.libtorchs > 0.0, "{found}");
            // No GPU's cache holds the queries that are read once.
            let bytes = 2 * level.samples * level.pixels * level.heads * level.width;
            assert!(level.attention == Attention::Pixels || bytes >= 160 << 20, "{level:?}");
        }
        let broke = Attention::FewKeys.broke(&Error("CUDA error: x\nframe #0".into())).to_string();
        assert_eq!(broke, "while the fused operator `cross` (ELLA_FUSED=-cross leaves it out) was timed: CUDA error: x");
        assert!(own_attention(&[], 1).unwrap_err().to_string().contains("not []"));
        // A level each, or it would not be known which of two counts; all that fits is in it.
        for (i, level) in LEVELS.iter().enumerate() {
            assert!(!LEVELS[..i].iter().any(|other| (other.attention, other.width) == (level.attention, level.width)), "{level:?}");
        }
        for width in 1..=256 {
            let timed = |attention| LEVELS.iter().any(|level| (level.attention, level.width) == (attention, width));
            assert_eq!(timed(Attention::Pixels), fused::fits_pixels(width), "{width}");
            assert_eq!(timed(Attention::FewKeys), fused::fits_few_keys(KEYS, width), "{width}");
        }
    }

    /// A lane that another thread records meanwhile looks up what was measured: it must not wait for who waits for it.
    #[test]
    fn what_was_measured_is_told_while_more_is() {
        let found = Measured { attention: Attention::Pixels, width: 40, own: 2e-3, libtorchs: 1e-3 };
        // Of a kind that no attention has.
        let (kind, (sender, told)) = (Kind::Int8, std::sync::mpsc::channel());
        let measure = || {
            std::thread::spawn(move || sender.send(measured(Kind::Uint8)));
            assert!(told.recv_timeout(std::time::Duration::from_secs(20)).unwrap().is_empty());
            Ok(vec![found])
        };
        once(kind, measure).unwrap();
        once(kind, || unreachable!("it was measured")).unwrap();
        assert!(measured(kind) == [found] && lost(Attention::Pixels, 40, kind) && !lost(Attention::FewKeys, 40, kind));
    }

    #[test]
    fn the_faster_is_taken_and_both_are_told() {
        let found = |own, libtorchs| Measured { attention: Attention::Pixels, width: 40, own, libtorchs };
        assert!(found(2e-3, 1e-3).lost() && !found(1e-3, 1.5e-3).lost());
        let told = found(1e-3, 1.5e-3).to_string();
        assert_eq!(
            told,
            "attention of pixels to themselves, heads of 40: by our kernels 1.00 ms there and back, by libtorch's 1.50: ours it is"
        );
        assert!(found(2e-3, 1e-3).to_string().ends_with("2.00 ms there and back, by libtorch's 1.00: libtorch's it is"));
        assert_eq!(median(vec![3.0, 1.0, 9.0, 2.0, 7.0]), 3.0);
        // Nothing was measured here, so that nothing has lost.
        measure(Fused::USUAL, Kind::BFloat16, Device::Cpu).unwrap();
        assert!(measured(Kind::BFloat16).is_empty() && !lost(Attention::Pixels, 40, Kind::BFloat16));
    }
}
