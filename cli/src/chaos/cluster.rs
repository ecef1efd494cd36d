//! The processes of a run that is tried, and the doors between them: each worker calls the coordinator through one, and its peers call it
//! through another.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

use tokio::process::ChildStdout;

use super::plan::Off;
use super::proxy::{Door, Network, Way};
use crate::children::{Children, Logs};
use crate::gpus::Gpus;
use crate::ui::Fail;

/// Ports that systems do not give to outgoing connections of their own accord.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// What the processes are started with.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub(super) coordinator: PathBuf,
    pub(super) worker: PathBuf,
    /// The run's config.
    pub(super) config: PathBuf,
    pub(super) device: &'static str,
    pub(super) gpus: Gpus,
    pub(super) logs: PathBuf,
    pub(super) seed: u64,
    /// The share of store operations that fail always, and while the surge's file exists; none: none.
    pub(super) store: Option<[f64; 2]>,
}

/// A process, as it is treated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process {
    /// Among the children.
    pub(super) child: usize,
    pub(super) pid: u32,
    /// Something befalls it.
    pub(super) ails: bool,
    /// It was told, or made, to end.
    pub(super) goes: bool,
    /// It was seen to train, so it has a state.
    pub(super) holds: bool,
}

/// A worker's place, whoever fills it.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) process: Option<Process>,
    /// The number of the GPU that whoever fills it is shown.
    gpu: usize,
    starts: u32,
    to_coordinator: Door,
    from_peers: Door,
    /// It came beyond the number that the run began with.
    pub(super) guest: bool,
    /// Nobody comes back to it.
    pub(super) closed: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) setting: Setting,
    pub(super) children: Children,
    pub(super) coordinator: Option<Process>,
    pub(super) seats: Vec<Seat>,
    starts: u32,
    at: Option<SocketAddr>,
    network: Network,
}

/// Which process it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Coordinator,
    Worker(usize),
}

impl Cluster {
    pub(super) fn new(setting: Setting) -> Result<Self, Fail> {
        let network = Network::new().map_err(|error| Fail::failed(format_args!("the proxies cannot be started ({error})")))?;
        Ok(Self { setting, children: Children::default(), coordinator: None, seats: Vec::new(), starts: 0, at: None, network })
    }

    /// While this file exists more of the store's operations fail.
    pub(super) fn surge_file(&self) -> PathBuf {
        self.setting.logs.with_file_name("surge")
    }

    /// One more place for a worker, with nobody in it.
    pub(super) fn add_seat(&mut self, guest: bool) -> Result<usize, Fail> {
        let door = || self.network.door().map_err(|error| Fail::failed(format_args!("no port can be had for a proxy ({error})")));
        let (to_coordinator, from_peers) = (door()?, door()?);
        to_coordinator.lead(self.at);
        let gpu = self.free_gpu();
        self.seats.push(Seat { process: None, gpu, starts: 0, to_coordinator, from_peers, guest, closed: false });
        Ok(self.seats.len() - 1)
    }

    /// The number of the first GPU that no seat has.
    fn free_gpu(&self) -> usize {
        let has = |seat: &Seat, gpu| seat.gpu == gpu && (seat.process.is_some() || !seat.closed);
        (0..self.seats.len()).find(|gpu| !self.seats.iter().any(|seat| has(seat, *gpu))).unwrap_or(self.seats.len())
    }

    /// Starts a coordinator; what it says of itself comes on its stdout.
    pub(super) fn start_coordinator(&mut self) -> Result<(usize, Option<ChildStdout>), Fail> {
        self.starts += 1;
        let arguments = [self.setting.config.display().to_string()];
        let (environment, name) = (self.environment(0, self.starts), format!("coordinator-{}", self.starts));
        let program = self.setting.coordinator.clone();
        let stdout = self.children.start_in(&name, &program, (&arguments, &environment), &self.logs())?;
        let process = self.newest();
        self.coordinator = Some(process);
        Ok((process.child, stdout))
    }

    /// Where workers find the coordinator from here on.
    pub(super) fn coordinator_is_at(&mut self, at: Option<SocketAddr>) {
        self.at = at;
        self.seats.iter().for_each(|seat| seat.to_coordinator.lead(at));
    }

    /// Puts a worker into a seat.
    pub(super) fn start_worker(&mut self, number: usize) -> Result<(), Fail> {
        let mut environment = self.environment(number as u32 + 1, self.seats[number].starts);
        environment.extend(self.setting.gpus.of_worker(self.seats[number].gpu));
        let seat = &mut self.seats[number];
        seat.starts += 1;
        let listen = free_port()?;
        seat.from_peers.lead(Some(listen));
        let coordinator = format!("http://{}", seat.to_coordinator.address());
        let (listen, advertise) = (listen.to_string(), seat.from_peers.address().to_string());
        let device = self.setting.device;
        let arguments =
            ["--coordinator", &coordinator, "--listen", &listen, "--advertise", &advertise, "--device", device].map(str::to_owned);
        let name = format!("worker-{number}-{}", seat.starts);
        let program = self.setting.worker.clone();
        self.children.start_in(&name, &program, (&arguments, &environment), &self.logs())?;
        self.seats[number].process = Some(self.newest());
        Ok(())
    }

    fn newest(&self) -> Process {
        let child = self.children.members().len() - 1;
        let pid = self.children.members()[child].pid().unwrap_or_default();
        Process { child, pid, ails: false, goes: false, holds: false }
    }

    fn logs(&self) -> Logs {
        Logs { folder: Some(self.setting.logs.clone()), verbose: false }
    }

    fn environment(&self, who: u32, start: u32) -> Vec<(String, String)> {
        let mut environment = vec![("ELLA_LOG".to_owned(), "info".to_owned())];
        if let Some([rate, surge]) = self.setting.store {
            let seed = self.setting.seed.wrapping_mul(1_000_003) + u64::from(who) * 1_009 + u64::from(start);
            let faults = format!("seed={seed},rate={rate},surge={surge},surge_file={}", self.surge_file().display());
            environment.push(("ELLA_STORE_FAULTS".to_owned(), faults));
        }
        environment
    }

    /// Who a child is, if it is anyone's process still.
    pub(super) fn who(&self, child: usize) -> Option<Who> {
        if self.coordinator.is_some_and(|process| process.child == child) {
            return Some(Who::Coordinator);
        }
        self.seats.iter().position(|seat| seat.process.is_some_and(|process| process.child == child)).map(Who::Worker)
    }

    pub(super) fn process(&mut self, who: Who) -> Option<&mut Process> {
        match who {
            Who::Coordinator => self.coordinator.as_mut(),
            Who::Worker(seat) => self.seats.get_mut(seat).and_then(|seat| seat.process.as_mut()),
        }
    }

    /// It has ended: gives what it was.
    pub(super) fn take(&mut self, who: Who) -> Option<Process> {
        match who {
            Who::Coordinator => self.coordinator.take(),
            Who::Worker(seat) => self.seats.get_mut(seat).and_then(|seat| seat.process.take()),
        }
    }

    /// Sets what goes through a worker's doors.
    pub(super) fn set_way(&self, seat: usize, off: Off, way: Way) {
        let Some(seat) = self.seats.get(seat) else { return };
        if off != Off::Peers {
            seat.to_coordinator.set(way);
        }
        if off != Off::Coordinator {
            seat.from_peers.set(way);
        }
    }

    /// Whether the state lives on if this worker does not: another one, unharmed, has one too.
    pub(super) fn spares(&self, seat: usize) -> bool {
        let others = self.seats.iter().enumerate().filter(|(number, _)| *number != seat);
        others.filter_map(|(_, seat)| seat.process).any(|process| process.holds && !process.ails && !process.goes)
    }
}

/// Where a worker can listen. Its port must be known before it is started, for a door must lead there.
fn free_port() -> Result<SocketAddr, Fail> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() as u16;
    for _ in PORTS {
        let offset = first.wrapping_mul(131).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], PORTS.start + offset));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(Fail::failed("no port from 20000 to 31999 is free on this machine"))
}
