//! What every engine must do, tried on every engine that can run here.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ella_proto::access::{ClientTls, TlsFiles};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{AbortHandle, Collective, CollectiveError, InProcess, Listener, Membership, Nccl, Result, Solo, Tcp};

/// Longer than anything here takes, on any machine.
pub(super) const LONG: Duration = Duration::from_secs(60);
/// A timeout that is meant to pass.
const SHORT: Duration = Duration::from_millis(200);

type Rank = Box<dyn Collective>;
type Engine = fn(u32) -> Vec<Rank>;

const ENGINES: [(&str, Engine); 3] = [("tcp", tcp), ("tcp under TLS", tls), ("in process", in_process)];

fn in_process(world: u32) -> Vec<Rank> {
    InProcess::group(world).into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn tcp(world: u32) -> Vec<Rank> {
    let ring = tcp_ring(world, None).into_iter();
    ring.map(|rank| Box::new(rank) as Rank).collect()
}

fn tls(world: u32) -> Vec<Rank> {
    let ring = tcp_ring(world, certificates("ours", "ours")).into_iter();
    ring.map(|rank| Box::new(rank) as Rank).collect()
}

/// A certificate that one CA of the tests has signed, for clients only, and the CA that others' are checked by. They were made for a hundred
/// years, and open nothing.
pub(super) fn certificates(own: &str, ca: &str) -> Option<ClientTls> {
    let at = |of: &str, name: &str| Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reduce/tcp/certs").join(of).join(name));
    let files = TlsFiles { cert: at(own, "tls.crt"), key: at(own, "tls.key"), ca: at(ca, "ca.crt") };
    Some(ClientTls::load(&files).expect("the files will do"))
}

/// A ring of TCP connections over the loopback interface.
pub(super) fn tcp_ring(world: u32, tls: Option<ClientTls>) -> Vec<Tcp> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners: Vec<_> = (0..world).map(|_| Listener::bind(any).expect("a port").secured(tls.clone())).collect();
    let peers: Vec<_> = listeners.iter().map(Listener::address).collect();
    thread::scope(|scope| {
        let peers = &peers;
        let connect = |(rank, listener)| {
            let (world, next) = (peers.len() as u32, peers[(rank as usize + 1) % peers.len()]);
            let membership = Membership { rank, world, next, session: [1; 16], generation: 1 };
            Tcp::connect(listener, &membership, LONG).expect("all are there")
        };
        let started: Vec<_> = (0..).zip(listeners).map(|rank| scope.spawn(move || connect(rank))).collect();
        started.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Runs `work` on every rank at once; each rank is dropped when its work is done. The results are in rank order.
fn on_all<R: Send>(ranks: Vec<Rank>, work: impl Fn(&mut dyn Collective) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let work = &work;
        let started: Vec<_> = ranks.into_iter().map(|mut rank| scope.spawn(move || work(rank.as_mut()))).collect();
        started.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Every engine with every small world.
fn everywhere(test: impl Fn(&str, u32, Vec<Rank>)) {
    everywhere_on(|name, world, ranks, _| test(name, world, ranks));
}

/// The same, with the device whose tensors the engine is for.
fn everywhere_on(test: impl Fn(&str, u32, Vec<Rank>, Device)) {
    test("solo", 1, vec![Box::new(Solo::default())], Device::Cpu);
    for (name, engine) in ENGINES {
        for world in 1..=5 {
            test(&format!("{name}, world {world}"), world, engine(world), Device::Cpu);
        }
    }
    // NCCL takes one rank for each GPU, and tests have one at most.
    if let Some(alone) = nccl() {
        test("nccl, world 1", 1, vec![Box::new(alone)], Device::Cuda(0));
    }
}

/// NCCL, where this machine has it and a GPU.
fn nccl() -> Option<Nccl> {
    if !crate::device::set_up(ella_proto::config::Device::Auto, 1).is_ok_and(Device::is_cuda) {
        eprintln!("NCCL is skipped: no GPU that libtorch can use");
        return None;
    }
    match crate::device::nccl() {
        Ok(library) => Some(Nccl::connect(Box::new(Solo::default()), &library, 0, LONG).expect("one rank on one GPU")),
        Err(error) => {
            eprintln!("NCCL is skipped: {error}");
            None
        }
    }
}

/// Numbers that depend on a seed alone (splitmix64).
fn random(seed: u64) -> impl Iterator<Item = u64> {
    (1_u64..).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

fn integers(rank: u32, n: usize) -> Vec<i64> {
    random(u64::from(rank) * 7919 + n as u64).take(n).map(|x| x as i64).collect()
}

fn floats(rank: u32, n: usize) -> Vec<f32> {
    integers(rank, n).into_iter().map(|x| x as f32 / i64::MAX as f32).collect()
}

const LENGTHS: [usize; 8] = [0, 1, 2, 3, 7, 1001, 65_537, 1_000_000];

#[test]
fn sums_of_integers_equal_the_serial_sum() {
    everywhere(|name, world, ranks| {
        let sums = on_all(ranks, |rank| {
            LENGTHS.map(|n| {
                let mut data = integers(rank.rank(), n);
                rank.sum_i64(&mut data).expect(name);
                data
            })
        });
        for (which, n) in LENGTHS.into_iter().enumerate() {
            let mut serial = vec![0_i64; n];
            for rank in 0..world {
                serial.iter_mut().zip(integers(rank, n)).for_each(|(sum, x)| *sum = sum.wrapping_add(x));
            }
            assert!(sums.iter().all(|sum| sum[which] == serial), "{name}, {n} elements");
        }
    });
}

#[test]
fn sums_of_floats_are_close_to_the_serial_sum_with_equal_bits_on_all_ranks() {
    everywhere(|name, world, ranks| {
        let sums = on_all(ranks, |rank| {
            LENGTHS.map(|n| {
                let mut data = floats(rank.rank(), n);
                rank.sum_f32(&mut data).expect(name);
                data
            })
        });
        for (which, n) in LENGTHS.into_iter().enumerate() {
            let mut serial = vec![0_f64; n];
            for rank in 0..world {
                serial.iter_mut().zip(floats(rank, n)).for_each(|(sum, x)| *sum += f64::from(x));
            }
            let first: Vec<_> = sums[0][which].iter().map(|x| x.to_bits()).collect();
            assert!(sums.iter().all(|sum| sum[which].iter().map(|x| x.to_bits()).eq(first.iter().copied())), "{name}, {n} elements");
            let close = |(x, exact): (&f32, &f64)| (f64::from(*x) - exact).abs() < 1e-6;
            assert!(sums[0][which].iter().zip(&serial).all(close), "{name}, {n} elements");
        }
    });
}

/// Each addition rounds to the nearest of 8 bits, so that N ranks are off by at most (N - 1) · 2⁻⁸ of the absolute sum; half the bytes go over.
#[test]
fn sums_of_bfloat16_are_within_their_rounding_with_equal_bits_on_all_ranks() {
    everywhere(|name, world, ranks| {
        let halves = |rank, n| floats(rank, n).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let sums = on_all(ranks, |rank| {
            LENGTHS.map(|n| {
                let mut data = halves(rank.rank(), n);
                rank.sum_bf16(&mut data).expect(name);
                data
            })
        });
        for (which, n) in LENGTHS.into_iter().enumerate() {
            let parts: Vec<_> = (0..world).map(|rank| halves(rank, n)).collect();
            assert!(sums.iter().all(|sum| sum[which] == sums[0][which]), "{name}, {n} elements");
            for (i, sum) in sums[0][which].iter().enumerate() {
                let exact: f64 = parts.iter().map(|part| part[i].to_f64()).sum();
                let size: f64 = parts.iter().map(|part| part[i].to_f64().abs()).sum();
                // What was rounded away before grows what is rounded next, a little.
                let bound = f64::from(world - 1) * size * 2f64.powi(-8) * 1.02;
                assert!((sum.to_f64() - exact).abs() <= bound, "{name}, element {i} of {n}: {sum}, exactly {exact}");
            }
        }
    });
}

/// What ranks sum while something else goes on is what they sum at once; of integers to the last bit, however they are cut.
#[test]
fn sums_that_are_begun_are_there_when_they_have_settled() {
    const N: i64 = 10_000;
    const CUTS: [i64; 5] = [0, 3, 4_096, 4_097, N];
    everywhere_on(|name, world, ranks, device| {
        let results = on_all(ranks, |rank| {
            [Kind::Int64, Kind::Float, Kind::BFloat16].map(|kind| {
                let own = Tensor::arange(N, (kind, Device::Cpu)).remainder(40) + i64::from(rank.rank());
                let (mut whole, cut) = (own.copy().to_device(device), own.copy().to_device(device));
                rank.sum_tensor(&mut whole).expect(name);
                // The last part first, as gradients come.
                for part in CUTS.windows(2).rev() {
                    rank.begin_sum(cut.narrow(0, part[0], part[1] - part[0])).expect(name);
                }
                rank.settle().expect(name);
                rank.settle().expect("nothing is under way");
                assert!(cut.equal(&whole), "{name}, {kind:?}: small integers are exact in every kind and order");
                whole.to_device(Device::Cpu)
            })
        });
        for rank in &results {
            assert!(rank.iter().zip(&results[0]).all(|(a, b)| a.equal(b)), "{name}");
            let last = i64::from(world) * 39 + i64::from(world * (world - 1) / 2);
            assert_eq!(rank[0].int64_value(&[N - 1]), last, "{name}");
        }
    });
}

/// Of NCCL, whose sums run on a stream of their own: they come after what was computed before, and an abort ends them for good.
#[test]
fn sums_on_a_gpu_follow_what_was_computed_before() {
    let Some(mut alone) = nccl() else { return };
    let gpu = Device::Cuda(0);
    let big = Tensor::ones([4096, 4096], (Kind::Float, gpu));
    let mut tensor = Tensor::zeros([4096, 4096], (Kind::Float, gpu));
    for _ in 0..20 {
        // Takes a while; the sum must not begin before.
        tensor.copy_(&big.matmul(&big));
        alone.begin_sum(tensor.shallow_clone()).expect("a world of one");
        assert!(alone.settle().expect("it ends") < LONG);
        assert_eq!(tensor.double_value(&[4095, 4095]), 4096.0);
        let _ = tensor.zero_();
    }
    for kind in [Kind::Float, Kind::Int64, Kind::BFloat16, Kind::Half] {
        let mut tensor = Tensor::arange(1000, (Kind::Float, gpu)).to_kind(kind);
        let before = tensor.copy();
        alone.broadcast_tensor(0, &mut tensor).expect("a world of one");
        assert_eq!(tensor, before, "{kind:?}");
    }
    let refused = alone.begin_sum(Tensor::zeros([2], (Kind::Half, gpu)));
    assert!(matches!(refused, Err(CollectiveError::Tensor { .. })));
    alone.abort_handle().abort().expect("aborted");
    assert!(matches!(alone.sum_tensor(&mut tensor), Err(CollectiveError::Aborted)));
    assert!(matches!(alone.barrier(), Err(CollectiveError::Aborted)), "its other engine too");
}

#[test]
fn broadcasts_reach_all_ranks_from_every_root() {
    everywhere(|name, world, ranks| {
        let copies = on_all(ranks, |rank| {
            let mut seen = Vec::new();
            for root in 0..world {
                for n in [0, 1, 1000, 700_001] {
                    let mut data = vec![rank.rank() as u8 + 1; n];
                    rank.broadcast(root, &mut data).expect(name);
                    seen.push(data.iter().all(|byte| *byte == root as u8 + 1));
                }
            }
            let outside = rank.broadcast(world, &mut [0]);
            assert!(matches!(outside, Err(CollectiveError::Rank { .. })), "{name}");
            rank.barrier().expect("a root outside the world is refused before anything is sent");
            seen
        });
        assert!(copies.into_iter().flatten().all(|right| right), "{name}");
    });
}

#[test]
fn a_hundred_mixed_operations_in_a_row_stay_in_step() {
    everywhere(|name, world, ranks| {
        on_all(ranks, |rank| {
            for (round, draw) in (0..100).zip(random(5)) {
                let n = (draw % 300) as usize;
                match draw % 4 {
                    0 => rank.barrier().expect(name),
                    1 => {
                        let mut data = vec![f32::from(u8::try_from(round).unwrap_or(0)); n];
                        rank.sum_f32(&mut data).expect(name);
                        assert!(data.iter().all(|x| *x == round as f32 * world as f32), "{name}, round {round}");
                    }
                    _ => {
                        let mut data = vec![i64::from(rank.rank()) + round; n];
                        rank.sum_i64(&mut data).expect(name);
                        let expected = i64::from(world) * round + i64::from(world * (world - 1) / 2);
                        assert!(data.iter().all(|x| *x == expected), "{name}, round {round}");
                    }
                }
            }
        });
    });
}

#[test]
fn a_barrier_lets_nobody_through_before_the_last() {
    everywhere(|name, world, ranks| {
        let arrived = std::sync::atomic::AtomicU32::new(0);
        on_all(ranks, |rank| {
            for round in 1..=20 {
                arrived.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                rank.barrier().expect(name);
                assert!(arrived.load(std::sync::atomic::Ordering::SeqCst) >= round * world, "{name}");
            }
        });
    });
}

/// What a rank is told when it fails for the second time.
fn assert_broken(name: &str, rank: &mut dyn Collective) {
    let again = rank.barrier();
    assert!(matches!(again, Err(CollectiveError::Broken { .. } | CollectiveError::Aborted)), "{name}: {again:?}");
}

#[test]
fn a_rank_that_leaves_is_lost_to_the_others_at_once() {
    for (name, engine) in ENGINES {
        for world in 2..=4 {
            let began = Instant::now();
            on_all(engine(world), |rank| {
                rank.set_timeout(LONG);
                rank.barrier().expect(name);
                if rank.rank() == 1 {
                    return;
                }
                // Too much for the buffers in between, so that nobody can be done before the loss shows.
                let result = rank.sum_f32(&mut vec![1.0; 8 << 20]);
                match result {
                    // In a ring, those that are not its neighbours lose a neighbour that left over it.
                    Err(CollectiveError::PeerLost { rank: lost, .. }) => assert!(world > 2 || lost == 1, "{name}: lost {lost}"),
                    other => panic!("{name}, world {world}: expected a lost peer, found {other:?}"),
                }
                assert_broken(name, rank);
            });
            assert!(began.elapsed() < LONG / 2, "{name}");
        }
    }
}

#[test]
fn a_rank_that_does_not_take_part_is_named_when_the_time_is_over() {
    for (name, engine) in ENGINES {
        let (done, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        on_all(engine(2), |rank| {
            if rank.rank() == 1 {
                // Stays connected and silent until the other has given up.
                let gave_up = wait.lock().expect("one user").recv_timeout(LONG);
                return gave_up.expect("rank 0 gives up");
            }
            rank.set_timeout(SHORT);
            let result = rank.sum_i64(&mut [1; 100]);
            match result {
                Err(CollectiveError::Timeout { rank: 0, waiting_for: 1, op, elapsed }) => {
                    assert!(elapsed >= SHORT && op.elements == 100, "{name}: {op} after {elapsed:?}");
                }
                other => panic!("{name}: expected a timeout, found {other:?}"),
            }
            assert_broken(name, rank);
            done.send(()).expect("rank 1 waits");
        });
    }
}

#[test]
fn ranks_that_ask_for_different_things_are_told_both() {
    type Ask = fn(&mut dyn Collective) -> Result<()>;
    let asks: [(Ask, Ask); 5] = [
        (|rank| rank.sum_i64(&mut [1; 10]), |rank| rank.sum_i64(&mut [1; 11])),
        (|rank| rank.sum_i64(&mut [1; 10]), |rank| rank.sum_f32(&mut [1.0; 10])),
        (|rank| rank.sum_f32(&mut [1.0; 0]), |rank| rank.barrier()),
        (|rank| rank.broadcast(0, &mut [1; 10]), |rank| rank.broadcast(1, &mut [1; 10])),
        (|rank| rank.sum_f32(&mut vec![1.0; 4 << 20]), |rank| rank.sum_f32(&mut vec![1.0; (4 << 20) + 1])),
    ];
    for (name, engine) in ENGINES {
        for (one, other) in asks {
            let results = on_all(engine(2), |rank| {
                let result = if rank.rank() == 0 { one(rank) } else { other(rank) };
                assert_broken(name, rank);
                result
            });
            for (rank, result) in results.into_iter().enumerate() {
                match result {
                    Err(CollectiveError::Mismatch { rank: me, peer, ours, theirs }) => {
                        assert_eq!((me as usize, peer as usize), (rank, 1 - rank), "{name}");
                        assert_ne!(ours, theirs);
                    }
                    other => panic!("{name}, rank {rank}: expected a mismatch, found {other:?}"),
                }
            }
        }
    }
}

#[test]
fn one_rank_out_of_step_in_a_larger_world_corrupts_nothing() {
    for (name, engine) in ENGINES {
        let results = on_all(engine(4), |rank| {
            rank.barrier().expect(name);
            if rank.rank() == 2 { rank.sum_i64(&mut [1; 5]) } else { rank.sum_i64(&mut [1; 6]) }
        });
        assert!(results.iter().all(Result::is_err), "{name}: {results:?}");
        assert!(results.iter().any(|result| matches!(result, Err(CollectiveError::Mismatch { .. }))), "{name}: {results:?}");
    }
}

#[test]
fn an_abort_ends_a_blocked_call_at_once_and_later_ones_too() {
    for (name, engine) in ENGINES {
        let (handles, aborter) = mpsc::channel::<AbortHandle>();
        let (done, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let aborter = thread::spawn(move || aborter.recv_timeout(LONG).expect("rank 0 sends it").abort());
        let began = Instant::now();
        on_all(engine(3), |rank| {
            rank.set_timeout(LONG);
            rank.barrier().expect(name);
            if rank.rank() == 1 {
                let ended = wait.lock().expect("one user").recv_timeout(LONG);
                return ended.expect("rank 0 ends");
            }
            if rank.rank() == 0 {
                handles.send(rank.abort_handle()).expect("the aborter waits");
            }
            let result = rank.sum_f32(&mut vec![1.0; 8 << 20]);
            if rank.rank() == 0 {
                assert!(matches!(result, Err(CollectiveError::Aborted)), "{name}: {result:?}");
                assert_broken(name, rank);
                rank.abort_handle().abort().expect("harmless when repeated");
                done.send(()).expect("rank 1 waits");
            } else {
                // Its predecessor holds still; it ends because the aborted rank leaves.
                assert!(matches!(result, Err(CollectiveError::PeerLost { .. })), "{name}: {result:?}");
            }
        });
        aborter.join().expect("no panic").expect("aborted");
        assert!(began.elapsed() < LONG / 2, "{name}");
    }
    let mut solo = Solo::default();
    solo.abort_handle().abort().expect("aborted");
    assert!(matches!(solo.barrier(), Err(CollectiveError::Aborted)));
}

#[test]
fn one_that_was_aborted_before_it_began_does_not_begin() {
    for (name, engine) in ENGINES {
        on_all(engine(2), |rank| {
            rank.abort_handle().abort().expect("aborted");
            let result = rank.sum_i64(&mut [1]);
            assert!(matches!(result, Err(CollectiveError::Aborted)), "{name}: {result:?}");
        });
    }
}
