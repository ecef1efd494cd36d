//! A worker's life: attach, load, and train in one generation after the other; or, if it finds itself in a job, do units until that is over.

mod error;
mod load;

pub use error::WorkError;

use crate::commit::{CommitError, Seat};
use crate::control::{self, Control, Era, Flags, Link, Message, Said};
use crate::device;
use crate::feed::lanes_of;
use crate::gpu;
use crate::job;
use crate::memory::{Needs, Room};
use crate::models;
use crate::precision::Precision;
use crate::reduce::{Listener, Solo};
use crate::train::state::part_names;
use crate::train::{Ending, Halt, TrainError, Trainer};
use crate::vitals;
use ella_coordinator::logs;
use ella_cuda::stream::Entered;
use ella_proto::access::Access;
use ella_proto::config::{Config, Device as Choice, RunConfig};
use ella_proto::v1::{Activity, Assign, Failed, Finished, Hello, Idle, Outcome, Place, Ready, Welcome, from_worker};
use ella_store::{Commit, Store};
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::runtime::Handle;

/// How long a worker that has failed waits for the coordinator to end its stream: by then its message has been read.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often a wait for the coordinator's word looks whether it has ended otherwise.
const LOOK: Duration = Duration::from_millis(50);

/// Longest name of a host.
const MOST_NAME: usize = 240;

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The coordinator's URL, `http://host:port`, and its token if it asks for one.
    pub coordinator: Access,
    /// Where this worker's collective listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The host that other workers reach it by, if not the one it listens on; with a port, if that is another one too.
    pub advertise: Option<String>,
    /// Where to compute.
    pub device: Choice,
    /// Units of a job that are done at once.
    pub slots: u32,
    /// How long to try again while no coordinator answers.
    pub patience: Duration,
}

/// What a rank does in a generation, from its first step on.
type Train<'a> = dyn FnMut(&mut Trainer) -> Result<Halt, TrainError> + 'a;

/// Works for a coordinator, and for those that follow it, until the run or job is over. Call it from a thread of its own, outside the
/// runtime. Cancel `flags.parting` to have this worker leave.
pub fn work(options: &Options, flags: Arc<Flags>, runtime: &Handle) -> Result<Ending, WorkError> {
    work_by(&mut Trainer::run, options, flags, runtime)
}

/// The same where a rank trains in another way than [`Trainer::run`]: for measurements.
#[doc(hidden)]
pub fn work_by(train: &mut Train<'_>, options: &Options, flags: Arc<Flags>, runtime: &Handle) -> Result<Ending, WorkError> {
    let device = device::set_up(options.device, 1)?;
    vitals::computes_on(device);
    let listener = Listener::bind(options.listen)?.secured(options.coordinator.tls.clone());
    let hello = hello(options, device, &listener)?;
    let link = match runtime.block_on(Link::open_patiently(&options.coordinator, &hello, options.patience)) {
        Ok(link) => link,
        Err(error) => return Ok(error.ending()?),
    };
    // What is neither is taken for a run's, and told to the coordinator as such.
    if let Ok(Config::Job(config)) = Config::parse(&link.welcome.config_toml, "the coordinator's config", &[]) {
        flags.working.store(true, Ordering::Relaxed);
        logs::in_run(&link.welcome.run_url);
        logs::in_term(link.term);
        let choice = options.device;
        let leased = job::Leased { access: options.coordinator.clone(), slots: options.slots, stop: flags.parting.clone() };
        return Ok(runtime.block_on(leased.work(link, move || job::kinds::make(&config, choice)))?);
    }
    let (control, welcome) = {
        let _within = runtime.enter();
        Control::over(link, (options.coordinator.clone(), hello), flags)
    };
    let result = Rank::load(options, runtime, (&control, &welcome), listener).and_then(|rank| rank.obey(train));
    let unread = control.flags().dropped_progress.load(Ordering::Relaxed);
    if unread > 0 {
        tracing::warn!(unread, "messages of progress were dropped while the coordinator did not read");
    }
    match (result, control.flags().stopped()) {
        (Ok(ending), _) => Ok(ending),
        // What the end of the run did to this rank is not its reason.
        (Err(error), Some(why)) => {
            tracing::info!("interrupted: {error}");
            Ok(why.ending()?)
        }
        (Err(error), None) => {
            confess(&control, &error);
            Err(error)
        }
    }
}

/// Tells the coordinator why this worker leaves, and waits until it has heard: it answers by ending the stream.
fn confess(control: &Control, error: &WorkError) {
    let (kind, permanent) = error.failure();
    control.outbox().failed(Failed { kind: kind.into(), message: error.to_string(), permanent });
    let until = Instant::now() + FAREWELL;
    while control.next(until.saturating_duration_since(Instant::now())).is_ok_and(|said| said.is_some()) {}
}

fn hello(options: &Options, device: Device, listener: &Listener) -> Result<Hello, WorkError> {
    let address = listener.address();
    let peer_address = match &options.advertise {
        Some(advertised) => peer_address(advertised, address.port()),
        None => address.to_string(),
    };
    let identity = control::identity().map_err(|source| WorkError::System { what: "random bytes", source })?;
    Ok(Hello {
        device_kind: device::kind_name(device).to_owned(),
        device_uuid: device::uuid(device).unwrap_or_default(),
        peer_address,
        computes: device::computes(device),
        ..identity
    })
}

/// What a worker may advertise: `HOST` or `HOST:PORT`, as [`Options::advertise`] takes it. A host is a name or an address; of IPv6 with brackets, if a port
/// follows.
///
/// # Errors
/// What it must be instead.
pub fn advertised(text: &str) -> Result<String, String> {
    let is_address =
        |host: &str| host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse::<Ipv6Addr>().is_ok();
    let is_name = |host: &str| {
        let mut labels = host.strip_suffix('.').unwrap_or(host).split('.');
        host.len() <= MOST_NAME
            && labels.all(|label| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)))
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    let with_port = |(host, port): (&str, &str)| is_port(port) && (is_name(host) || host.starts_with('[') && is_address(host));
    match is_address(text) || is_name(text) || text.rsplit_once(':').is_some_and(with_port) {
        true => Ok(text.to_owned()),
        false => Err("expected HOST or HOST:PORT, with a port from 1 to 65535, as in 10.0.0.7:31000".to_owned()),
    }
}

/// Where peers call a worker that advertises `HOST[:PORT]`: at the port it listens on, if none is said. A host may be a name, or an IPv6 address with
/// or, without a port, without brackets.
fn peer_address(advertised: &str, listens_on: u16) -> String {
    let says_port = advertised.rsplit_once(':').is_some_and(|(host, port)| {
        let is_host = !host.contains(':') || host.starts_with('[') && host.ends_with(']');
        is_host && !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    match says_port {
        true => advertised.to_owned(),
        false if advertised.parse::<Ipv6Addr>().is_ok() => format!("[{advertised}]:{listens_on}"),
        false => format!("{advertised}:{listens_on}"),
    }
}

/// A worker that holds its models, and a state once it has been given one.
struct Rank<'a> {
    trainer: Trainer,
    /// What this thread computes on, if that is a GPU.
    _stream: Option<Entered>,
    /// What it takes of a GPU's memory.
    needs: Option<Needs>,
    /// Whether the trainer's state is whole: it was begun anew, restored or copied.
    holds_state: bool,
    /// Whether its state was ever changed: it is of no use for a fresh start then.
    touched: bool,
    listener: Listener,
    device: Device,
    control: &'a Control,
    runtime: &'a Handle,
    run: Store,
    /// It has said farewell, to be taken back if the generation ends before the run does.
    farewell: Option<Ending>,
}

impl<'a> Rank<'a> {
    /// Loads all that the run's config names.
    fn load(
        options: &Options,
        runtime: &'a Handle,
        (control, welcome): (&'a Control, &Welcome),
        listener: Listener,
    ) -> Result<Self, WorkError> {
        let config = Arc::new(RunConfig::parse(&welcome.config_toml, "run.toml", &[])?);
        let device = device::set_up(options.device, config.workers.threads)?;
        check_device(&config, device)?;
        tell_of_tls(&listener, device);
        let stream = device::own_stream(device)?;
        Precision::of(&config).set(device)?;
        gpu::limit(device, config.workers.gpu_memory)?;
        let run = load::run_store(&welcome.run_url, config.workers.start_timeout.duration())?;
        load::check_folder(&run, welcome, runtime)?;
        let limit = config.workers.gpu_memory.map(|most| most.0);
        let explained = |error: WorkError| error.explained(None, || Room::look(device, limit));
        let loaded = models::load(&config, device).map_err(|error| explained(error.into()))?;
        let (trainer, needs) = load::assemble(&config, loaded, device, (control.outbox(), runtime), run.clone()).map_err(explained)?;
        control.flags().limit_computing(config.workers.step_timeout.duration(), config.workers.start_timeout.duration());
        Ok(Self {
            trainer,
            _stream: stream,
            needs,
            holds_state: false,
            touched: false,
            listener,
            device,
            control,
            runtime,
            run,
            farewell: None,
        })
    }

    /// Trains in one generation after the other, as the coordinator has it.
    fn obey(mut self, train: &mut Train<'_>) -> Result<Ending, WorkError> {
        let ending = self.obeying(train);
        let limit = self.trainer.config.workers.gpu_memory.map(|most| most.0);
        ending.map_err(|error| error.explained(self.needs.as_ref(), || Room::look(self.device, limit)))
    }

    fn obeying(&mut self, train: &mut Train<'_>) -> Result<Ending, WorkError> {
        self.idle(String::new());
        loop {
            let Some(Said { era, body }) = self.control.next(LOOK)? else { continue };
            match body {
                Message::Assign(assign) => self.generation((era, &assign), train)?,
                Message::Regroup(_) if self.farewell.take().is_some() => self.idle(String::new()),
                // The flags have taken what concerns a generation.
                _ => {}
            }
        }
    }

    /// Waits for a place.
    fn idle(&self, broken: String) {
        self.idle_again(Idle { broken, ..self.waits() });
    }

    fn idle_again(&self, idle: Idle) {
        self.trainer.flags.at(Activity::Unspecified);
        logs::as_rank(None);
        self.control.outbox().idle(idle);
    }

    /// How it waits for one.
    fn waits(&self) -> Idle {
        let identity = self.trainer.feed.identity();
        Idle {
            step: self.holds_state.then_some(self.trainer.state.step),
            broken: String::new(),
            data_digest: identity.data.clone(),
            models_digest: identity.models.clone(),
            next_unreached: false,
        }
    }

    /// A generation, from its first word to its end. What ends it is told, and only an error of this rank's own is one.
    fn generation(&mut self, (era, assign): (Era, &Assign), train: &mut Train<'_>) -> Result<(), WorkError> {
        self.trainer.flags.enter(era);
        self.control.outbox().starting();
        self.farewell = None;
        let over = self.trainer.flags.interrupted();
        let result = if over { Ok(None) } else { self.take_place(era, assign, train) };
        // Its connections tell the neighbours, whatever became of it.
        self.trainer.collective = Box::new(Solo::default());
        match result {
            Ok(Some(Halt::Done)) => self.finish(Ending::Done),
            Ok(Some(Halt::Drained)) => self.finish(Ending::Preempted),
            Ok(Some(Halt::Boundary) | None) => {
                self.idle(String::new());
                Ok(())
            }
            Err(error) if error.spares_the_rank() => {
                // What looks like a late peer may be this rank's own GPU.
                gpu::answers(self.device).map_err(|broken| WorkError::Collective(broken.into()))?;
                let interrupted = self.trainer.flags.interrupted();
                tracing::info!(interrupted, "the generation is over: {error}");
                self.idle_again(Idle { broken: error.to_string(), next_unreached: error.is_of_the_next(), ..self.waits() });
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Closes the ring, comes by the state to go on from, and trains once all are ready. None if the generation ends before.
    fn take_place(&mut self, era: Era, assign: &Assign, train: &mut Train<'_>) -> Result<Option<Halt>, WorkError> {
        let config = self.trainer.config.clone();
        let commit = load::parse_commit(assign)?;
        let recorded = commit.as_ref().map_or(0, |commit| commit.step);
        let world = assign.world;
        self.trainer.seat = Seat { rank: assign.rank, world, era };
        logs::in_generation(era.generation);
        logs::as_rank(Some(assign.rank));
        logs::at_step(assign.step);
        self.trainer.flags.committed.store(recorded, Ordering::Relaxed);
        match assign.source {
            None => self.restore(commit.as_ref())?,
            Some(source) if !assign.copy || source == assign.rank => self.check_state(assign.step)?,
            Some(_) => {}
        }
        // Samples are read while the ring is closed.
        self.trainer.feed.deal(lanes_of(assign.rank, world, config.train.lanes() as u32), assign.source.map_or(recorded, |_| assign.step));
        let flags = self.trainer.flags.clone();
        self.trainer.collective = load::connect(&self.listener, (assign, era.generation), &flags, &config, self.device)?;
        if let Some(source) = assign.source.filter(|_| assign.copy) {
            self.copy(source, assign.step)?;
        }
        let trainer = &mut self.trainer;
        flags.step.store(trainer.state.step, Ordering::Relaxed);
        trainer.saved = recorded;
        trainer.cadence.go_on(recorded, Instant::now());
        let ready = ready(trainer, assign.source.is_none())?;
        let outbox = self.control.outbox();
        outbox.placed(Place { rank: assign.rank, world, ready: Some(ready.clone()), ..Place::default() });
        outbox.send(era, from_worker::Body::Ready(ready));
        if !self.started(config.workers.start_timeout.duration())? {
            return Ok(None);
        }
        flags.working.store(true, Ordering::Relaxed);
        if !self.touched {
            self.trainer.cadence.begin(Instant::now());
            self.touched = true;
        }
        Ok(Some(train(&mut self.trainer)?))
    }

    /// This rank goes on from the state that it has: of the step that its coordinator takes it to be of.
    fn check_state(&self, step: u64) -> Result<(), WorkError> {
        let found = self.trainer.state.step;
        if self.holds_state && found == step { Ok(()) } else { Err(WorkError::OtherState { step }) }
    }

    /// The state of the newest commit, or of a run that begins.
    fn restore(&mut self, commit: Option<&Commit>) -> Result<(), WorkError> {
        let state = &mut self.trainer.state;
        match commit {
            Some(commit) if self.holds_state && state.step == commit.step => {}
            Some(commit) => {
                (self.holds_state, self.touched) = (false, true);
                load::restore(state, commit, &self.run, self.runtime)?;
            }
            None if self.touched && (state.step > 0 || !self.holds_state) => return Err(WorkError::Spent),
            None => {}
        }
        self.holds_state = true;
        Ok(())
    }

    /// The state of the rank that is ahead.
    fn copy(&mut self, source: u32, step: u64) -> Result<(), WorkError> {
        let had = self.holds_state && self.trainer.state.step == step;
        self.touched = true;
        self.holds_state = had;
        self.trainer.state.copy_from(self.trainer.collective.as_mut(), source)?;
        self.holds_state = true;
        if self.trainer.state.step == step { Ok(()) } else { Err(WorkError::Protocol("a source that holds another step than it says")) }
    }

    /// Waits until all ranks are ready; false if the generation ends first. A coordinator that takes over before the first has said so finds all
    /// ranks ready, and goes on with the generation as with one that trains.
    fn started(&self, patience: Duration) -> Result<bool, WorkError> {
        let until = Instant::now() + patience;
        while !self.trainer.flags.interrupted() && Instant::now() < until {
            match self.control.next(LOOK)?.map(|said| said.body) {
                Some(Message::Start(_) | Message::Adopted(_)) => return Ok(true),
                Some(Message::Assign(_)) => return Err(WorkError::Protocol("a place for who has one")),
                _ => {}
            }
        }
        Ok(false)
    }

    /// Says farewell, once this rank's part of the last commit is saved. It stays until the coordinator ends its stream, which that does when it
    /// has read all farewells and the commit's record stands; or until the generation ends before that.
    fn finish(&mut self, ending: Ending) -> Result<(), WorkError> {
        self.trainer.flags.at(Activity::Commit);
        // Whoever coordinates from here on finds nobody who takes steps.
        self.control.outbox().done(self.waits());
        let trainer = &mut self.trainer;
        // What is encoded from here on would only delay the commit.
        trainer.feed.stop_encoding();
        match trainer.committer.settle() {
            Ok(()) => trainer.tell_pictures(),
            Err(CommitError::Interrupted) => {
                self.idle(CommitError::Interrupted.to_string());
                return Ok(());
            }
            Err(error) => return Err(TrainError::from(error).into()),
        }
        let outcome = match ending {
            Ending::Done => Outcome::Done,
            Ending::Preempted => Outcome::Preempted,
        };
        // A coordinator that has adopted the generation since that commit knows nothing of it.
        let era = self.trainer.seat.era;
        if self.trainer.flags.era() != era {
            self.idle(String::new());
            return Ok(());
        }
        let finished = Finished { step: self.trainer.state.step, outcome: outcome.into() };
        let said = self.control.outbox().finished(era, finished, self.waits());
        self.farewell = Some(ending).filter(|_| said);
        let trainer = &mut self.trainer;
        if ending == Ending::Done
            && trainer.seat.rank == 0
            && let Err(error) = trainer.feed.finish_features()
        {
            tracing::warn!("features that were encoded ahead lack their manifest, which the next run writes: {error}");
        }
        Ok(())
    }
}

/// What of the sums is under TLS, where this worker has certificates.
fn tell_of_tls(listener: &Listener, device: Device) {
    match (listener.is_secured(), device.is_cuda()) {
        (false, _) => {}
        (true, false) => tracing::info!("what workers sum goes over TLS"),
        (true, true) => tracing::info!(
            "ranks meet over TLS, and what they sum goes over NCCL, which encrypts nothing: keep them in a network of their own"
        ),
    }
}

/// The device that the run asks for is the one that this worker has told the coordinator of (SAME).
fn check_device(config: &RunConfig, device: Device) -> Result<(), WorkError> {
    let wanted = match config.workers.device {
        Choice::Auto => return Ok(()),
        Choice::Cpu => "cpu",
        Choice::Cuda => "cuda",
    };
    let found = device::kind_name(device);
    if wanted == found { Ok(()) } else { Err(WorkError::OtherDevice { wanted, found }) }
}

fn ready(trainer: &Trainer, with_digest: bool) -> Result<Ready, WorkError> {
    let mut state_digest = String::new();
    if with_digest {
        let snapshot = trainer.state.snapshot(None)?;
        let digests: Vec<_> = (0..part_names().len()).map(|part| snapshot.digest(part)).collect();
        state_digest = snapshot.state_digest(&digests);
    }
    Ok(Ready {
        step: trainer.state.step,
        state_digest,
        data_digest: trainer.feed.identity().data.clone(),
        models_digest: trainer.feed.identity().models.clone(),
        samples_per_epoch: trainer.feed.samples_per_epoch(),
    })
}

#[cfg(test)]
mod tests {
    use super::{advertised, peer_address};

    #[test]
    fn what_is_advertised_is_a_host_or_a_host_and_a_port() {
        let long = "x".repeat(300);
        for good in ["10.0.0.7", "10.0.0.7:31000", "worker-3.ella", "a_b.c.:1", "nosuch.invalid", "fd00::7", "[fd00::7]", "[fd00::7]:31000"]
        {
            assert_eq!(advertised(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            ":4000",
            "1.2.3.4:99999",
            "1.2.3.4:0",
            "1.2.3.4:",
            "1.2.3.4:+5",
            "a b",
            "http://a",
            "a/b",
            "a..b",
            "[fd00::7",
            "a:1:2",
            &long,
        ] {
            assert!(advertised(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_advertised_may_name_a_port() {
        for (advertised, address) in [
            ("10.0.0.7", "10.0.0.7:4000"),
            ("10.0.0.7:31000", "10.0.0.7:31000"),
            ("worker-3.ella", "worker-3.ella:4000"),
            ("worker-3.ella:31000", "worker-3.ella:31000"),
            ("fd00::7", "[fd00::7]:4000"),
            ("[fd00::7]", "[fd00::7]:4000"),
            ("[fd00::7]:31000", "[fd00::7]:31000"),
        ] {
            assert_eq!(peer_address(advertised, 4000), address);
        }
    }
}
