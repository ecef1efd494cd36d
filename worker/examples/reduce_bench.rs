//! How fast the TCP ring and fixed point are on this machine: `cargo run --release -p ella-worker --example reduce_bench [MILLIONS [CERTIFICATES]]`.
//! Two ranks as threads, over the loopback interface; the default size is that of a connector, 66.8 million parameters.
//! CERTIFICATES: a folder with tls.crt, tls.key and ca.crt, as `worker/src/reduce/tcp/certs/ours`; the ring is under TLS then.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use ella_proto::access::{ClientTls, TlsFiles};
use ella_worker::reduce::fixed::{self, FixedPoint};
use ella_worker::reduce::{Collective, Listener, Membership, Tcp};
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(60);
const SMALL: usize = 2000;

fn certificates(folder: &str) -> anyhow::Result<ClientTls> {
    let at = |name: &str| Some(std::path::Path::new(folder).join(name));
    Ok(ClientTls::load(&TlsFiles { cert: at("tls.crt"), key: at("tls.key"), ca: at("ca.crt") })?)
}

fn main() -> anyhow::Result<()> {
    let millions: f64 = std::env::args().nth(1).map_or(Ok(66.8), |arg| arg.parse())?;
    let n = (millions * 1e6) as usize;
    let tls = std::env::args().nth(2).map(|folder| certificates(&folder)).transpose()?;
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners = [Listener::bind(any)?.secured(tls.clone()), Listener::bind(any)?.secured(tls)];
    let peers = listeners.each_ref().map(Listener::address);
    thread::scope(|scope| {
        let started: Vec<_> =
            (0..).zip(listeners).map(|(rank, listener)| scope.spawn(move || one_rank(rank, listener, &peers, n))).collect();
        started.into_iter().try_for_each(|rank| rank.join().unwrap_or_else(|_| anyhow::bail!("a rank panicked")))
    })?;
    fixed_point(n)
}

fn one_rank(rank: u32, listener: Listener, peers: &[SocketAddr], n: usize) -> anyhow::Result<()> {
    let mut ring =
        Tcp::connect(listener, &Membership { rank, world: 2, next: peers[1 - rank as usize], session: [0; 16], generation: 1 }, PATIENCE)?;
    let mut floats = vec![1.0_f32; n];
    let mut integers = vec![1_i64; n];
    let report = |what: &str, bytes: usize, took: Duration| {
        if rank == 0 {
            println!("{what}: {:.3} s, {:.2} GB/s of gradient", took.as_secs_f64(), bytes as f64 / took.as_secs_f64() / 1e9);
        }
    };
    for _ in 0..3 {
        ring.barrier()?;
        let began = Instant::now();
        ring.sum_f32(&mut floats)?;
        report("sum of f32, world 2", n * 4, began.elapsed());
        ring.barrier()?;
        let began = Instant::now();
        ring.sum_i64(&mut integers)?;
        report("sum of i64, world 2", n * 8, began.elapsed());
    }
    let mut took: Vec<_> = (0..SMALL)
        .map(|_| {
            let began = Instant::now();
            ring.sum_i64(&mut [1; 100]).map(|()| began.elapsed())
        })
        .collect::<Result<_, _>>()?;
    took.sort_unstable();
    if rank == 0 {
        println!("sum of 100 i64, world 2: median {:?}, 99th of 100 {:?}", took[SMALL / 2], took[SMALL * 99 / 100]);
    }
    Ok(())
}

fn fixed_point(n: usize) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let grad = Tensor::f_randn([i64::try_from(n)?], (Kind::Float, Device::Cpu))? * 1e-3;
    let mut acc = fixed::zeros(i64::try_from(n)?, Device::Cpu)?;
    let lanes = FixedPoint::new(4);
    for _ in 0..3 {
        let began = Instant::now();
        let _ = lanes.add(&mut acc, &grad)?;
        println!("one lane to fixed point: {:?}", began.elapsed());
        let began = Instant::now();
        let _ = std::hint::black_box(fixed::to_f32(&acc)?);
        println!("fixed point to f32: {:?}", began.elapsed());
    }
    Ok(())
}
