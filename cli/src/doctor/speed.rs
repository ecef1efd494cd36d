//! How fast a device multiplies, copies, and sums over ranks. Each figure is the median of several windows after a first one that warms up, on
//! random numbers: zeros cost a GPU less.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use ella_worker::device;
use ella_worker::reduce::{Collective, CollectiveError, Listener, Membership, Nccl, Solo, Tcp};
use serde::Serialize;
use tch::{Device, Kind, TchError, Tensor};

/// A figure, or why there is none.
pub(super) type Kept<T> = Result<T, String>;

/// Windows that count, and how long each lasts at least.
const WINDOWS: usize = 5;
const WINDOW: Duration = Duration::from_millis(100);
/// A sum of ranks waits so long for the others.
const PATIENCE: Duration = Duration::from_secs(20);
/// Elements of a gradient: the paper's connector.
const GRADIENT: i64 = 66_800_000;

#[derive(Debug, Serialize)]
pub(super) struct Speeds {
    device: String,
    /// Of a square matrix product, and of what kind and size.
    teraflops: f64,
    product: String,
    /// From its memory to its memory, counted once.
    copy_gb_per_s: f64,
    /// From pinned memory of the machine to the GPU.
    upload_gb_per_s: Option<f64>,
    /// Of a gradient, 267 MB: over loop-back between two ranks on the processor; by NCCL in a world of one on a GPU.
    sum_gb_per_s: f64,
}

impl Speeds {
    pub(super) fn text(&self) -> String {
        let Self { device, teraflops, product, copy_gb_per_s, upload_gb_per_s, sum_gb_per_s } = self;
        let upload = upload_gb_per_s.map_or_else(String::new, |rate| format!(", upload {rate:.1} GB/s"));
        let sum = if upload_gb_per_s.is_some() { "NCCL with itself" } else { "two ranks over loop-back" };
        format!(
            "{device:9} {product}: {teraflops:.2} TFLOP/s; copy {copy_gb_per_s:.1} GB/s{upload}; a gradient of 267 MB summed by {sum} at {sum_gb_per_s:.2} GB/s\n"
        )
    }
}

/// Of what a GPU does, in words: how much, and the share of the best one's below which it is slow. Uploads depend on the socket that it is at, too.
type Rate = (&'static str, &'static str, fn(&Speeds) -> Option<f64>, f64);
const RATES: [Rate; 3] = [
    ("multiplies at", "TFLOP/s", |of| Some(of.teraflops), 0.8),
    ("copies at", "GB/s", |of| Some(of.copy_gb_per_s), 0.8),
    ("is uploaded to at", "GB/s", |of| of.upload_gb_per_s, 0.6),
];

/// Which of some GPUs are slower than another of the same model, given by its name and what to call the GPU. All ranks of a run wait for the slowest.
pub(super) fn slow(gpus: &[(&str, String, &Speeds)]) -> Vec<String> {
    let mut found = Vec::new();
    for (model, called, speeds) in gpus {
        let alike = || gpus.iter().filter(|(other, _, of)| other == model && of.product == speeds.product);
        for (does, unit, rate, least) in RATES {
            let best = alike().filter_map(|(_, called, of)| Some((rate(of)?, called))).max_by(|a, b| a.0.total_cmp(&b.0));
            if let (Some(own), Some((best, other))) = (rate(speeds), best)
                && own < least * best
            {
                found.push(format!(
                    "{called} {does} {own:.1} {unit}, {other} of the same model at {best:.1}, and all ranks wait for the slowest: look for other \
                     programs on it, and at its clocks, heat, power limit and link (nvidia-smi -q)"
                ));
            }
        }
    }
    found
}

pub(super) fn of_processor() -> Kept<Speeds> {
    let (teraflops, product) = product(Device::Cpu, Kind::Float, 1024)?;
    Ok(Speeds {
        device: "cpu".to_owned(),
        teraflops,
        product,
        copy_gb_per_s: copy(Device::Cpu, 64 << 20)?,
        upload_gb_per_s: None,
        sum_gb_per_s: loop_back().map_err(|error| error.to_string())?,
    })
}

/// Of the GPU of this number. `free`: bytes of its memory.
pub(super) fn of_gpu(number: u32, free: usize) -> Kept<Speeds> {
    let device = Device::Cuda(number as usize);
    // Three matrices of bfloat16, and room for others' work.
    let side = if free > 4 << 30 { 8192 } else { 2048 };
    let (teraflops, product) = product(device, Kind::BFloat16, side)?;
    Ok(Speeds {
        device: format!("gpu {number}"),
        teraflops,
        product,
        copy_gb_per_s: copy(device, 256 << 20)?,
        upload_gb_per_s: Some(upload(device, 256 << 20)?),
        sum_gb_per_s: with_itself(device, number)?,
    })
}

fn product(device: Device, kind: Kind, side: i64) -> Kept<(f64, String)> {
    let matrix = || Tensor::f_randn([side, side], (Kind::Float, device))?.f_to_kind(kind);
    let run = || -> Result<f64, TchError> {
        let (a, b, out) = (matrix()?, matrix()?, matrix()?);
        let seconds = median(device, || Tensor::f_matmul_out(&out, &a, &b).map(drop))?;
        Ok(2.0 * (side as f64).powi(3) / seconds / 1e12)
    };
    let name = if kind == Kind::Float { "float32" } else { "bfloat16" };
    run().map(|teraflops| (teraflops, format!("{name} product of {side}²"))).map_err(|error| error.to_string())
}

fn copy(device: Device, bytes: i64) -> Kept<f64> {
    let run = || -> Result<f64, TchError> {
        let from = Tensor::f_randint(256, [bytes], (Kind::Uint8, device))?;
        let mut to = from.f_empty_like()?;
        let seconds = median(device, || to.f_copy_(&from).map(drop))?;
        Ok(bytes as f64 / seconds / 1e9)
    };
    run().map_err(|error| error.to_string())
}

fn upload(device: Device, bytes: i64) -> Kept<f64> {
    let run = || -> Result<f64, TchError> {
        let from = Tensor::f_randint(256, [bytes], (Kind::Uint8, Device::Cpu))?.f_internal_pin_memory(device)?;
        let mut to = Tensor::f_empty([bytes], (Kind::Uint8, device))?;
        let seconds = median(device, || to.f_copy_(&from).map(drop))?;
        Ok(bytes as f64 / seconds / 1e9)
    };
    run().map_err(|error| error.to_string())
}

/// A gradient summed by NCCL, with nobody else.
fn with_itself(device: Device, number: u32) -> Kept<f64> {
    let library = device::nccl().map_err(|error| error.to_string())?;
    let mut ranks = Nccl::connect(Box::new(Solo::default()), &library, number, PATIENCE).map_err(|error| error.to_string())?;
    let mut gradient = Tensor::f_randn([GRADIENT], (Kind::Float, device)).map_err(|error| error.to_string())?;
    let seconds = median(device, || ranks.sum_tensor(&mut gradient)).map_err(|error| error.to_string())?;
    Ok(4.0 * GRADIENT as f64 / seconds / 1e9)
}

/// A gradient summed by two ranks of this process over plain sockets.
fn loop_back() -> Result<f64, CollectiveError> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners = [Listener::bind(any)?, Listener::bind(any)?];
    let peers = listeners.each_ref().map(Listener::address);
    let rank = |rank: u32, listener: Listener| -> Result<f64, CollectiveError> {
        let membership = Membership { rank, world: 2, next: peers[1 - rank as usize], session: [0; 16], generation: 1 };
        let mut ring = Tcp::connect(listener, &membership, PATIENCE)?;
        let mut gradient = vec![0.5_f32; GRADIENT as usize];
        let mut times = Vec::new();
        for _ in 0..=WINDOWS {
            ring.barrier()?;
            let begin = Instant::now();
            ring.sum_f32(&mut gradient)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        Ok(middle(&mut times[1..]))
    };
    let [first, second] = listeners;
    let seconds = std::thread::scope(|scope| {
        let other = scope.spawn(|| rank(1, second));
        let own = rank(0, first);
        match other.join() {
            Ok(Ok(_)) => own,
            Ok(Err(error)) => own.and(Err(error)),
            Err(_) => Err(CollectiveError::Aborted),
        }
    })?;
    Ok(4.0 * GRADIENT as f64 / seconds / 1e9)
}

/// Seconds that one call takes: the median over windows of as many calls as fill one.
fn median<E: From<TchError>>(device: Device, mut act: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    // A number is read when all before it is done; that of a GPU that is broken is an error, where waiting alone would end the process.
    let wait = || -> Result<(), TchError> {
        if device.is_cuda() { Tensor::f_ones([1], (Kind::Float, device))?.f_double_value(&[]).map(drop) } else { Ok(()) }
    };
    let (mut calls, mut times) = (1_u32, Vec::new());
    while times.len() <= WINDOWS {
        wait()?;
        let begin = Instant::now();
        for _ in 0..calls {
            act()?;
        }
        wait()?;
        let took = begin.elapsed();
        if took < WINDOW && times.is_empty() {
            // Too short to be told from the clock's own grain: it counts for nothing.
            calls = calls.saturating_mul(2);
            continue;
        }
        times.push(took.as_secs_f64() / f64::from(calls));
    }
    // The first has warmed up.
    Ok(middle(&mut times[1..]))
}

fn middle(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_gpu_that_is_slower_than_others_of_its_model_is_named() {
        let speeds = |number: u32, teraflops, upload| Speeds {
            device: format!("gpu {number}"),
            teraflops,
            product: "bfloat16 product of 8192²".to_owned(),
            copy_gb_per_s: 2000.0,
            upload_gb_per_s: Some(upload),
            sum_gb_per_s: 100.0,
        };
        let of = [speeds(0, 680.0, 55.0), speeds(1, 660.0, 40.0), speeds(2, 310.0, 54.0), speeds(3, 90.0, 20.0)];
        let named = |models: [&'static str; 4]| -> Vec<_> {
            models.into_iter().zip(&of).map(|(model, of)| (model, format!("{} (GPU-{model})", of.device), of)).collect()
        };
        let found = slow(&named(["H100", "H100", "H100", "T4"]));
        assert!(
            found.len() == 1
                && found[0].starts_with("gpu 2 (GPU-H100) multiplies at 310.0 TFLOP/s, gpu 0 (GPU-H100) of the same model at 680.0")
        );
        assert_eq!(slow(&named(["H100"; 4])).len(), 3, "the last one multiplies and is uploaded to slowly");
        assert!(slow(&named(["a", "b", "c", "d"])).is_empty() && slow(&[]).is_empty());
    }

    #[test]
    fn a_window_holds_as_many_calls_as_fill_it_and_the_first_counts_for_nothing() {
        let mut calls = 0;
        let one = || -> Result<(), TchError> {
            calls += 1;
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(5) {}
            Ok(())
        };
        let seconds = median(Device::Cpu, one).unwrap();
        assert!((0.005..0.5).contains(&seconds), "{seconds}");
        assert!(calls > WINDOWS as i32 * 2, "{calls}");
        assert!(median(Device::Cpu, || Err(TchError::Torch("gone".to_owned()))).is_err());
        assert_eq!(middle(&mut [3.0, 1.0, 2.0]), 2.0);
    }
}
