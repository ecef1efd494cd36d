//! Training: the loop, and one step of it. Everything that is trained lies in flat buffers: one collective, one update, one file each.

pub mod cadence;
mod error;
mod fault;
pub mod graph;
pub mod lane;
mod mark;
pub mod optimizer;
pub mod samples;
pub mod split;
pub mod state;
pub mod stats;
mod sum;
mod supply;
mod times;

use crate::commit::{Committer, Seat};
use crate::control::{Era, Flags, Outbox};
use crate::feed::{Feed, FeedError, StepInput};
use crate::reduce::Collective;
use cadence::Cadence;
use ella_coordinator::logs;
use ella_coordinator::trace::{self, About, Trace};
use ella_proto::config::{Features, RunConfig};
use ella_proto::v1::{Activity, Progress};
pub use error::TrainError;
pub use fault::Bad;
use graph::Graphs;
use lane::{Follow, LaneBatch, Networks};
use mark::Mark;
use state::TrainState;
use stats::{StepStats, WORDS};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use sum::{Reduced, Sum};
use supply::Supply;
use tch::{Device, Kind, Tensor};
use times::{Passes, Times};

/// What part of a step's patience a commit may hold up a step: the others wait meanwhile.
const PATIENCE: u32 = 4;

/// How a generation ended that nothing broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// All steps are applied, and the last one's commit is under way.
    Done,
    /// The run leaves; what was done is in a commit that is under way.
    Drained,
    /// All ranks stopped after the same step, as they were asked to, or because there is no coordinator to record the last step's commit.
    Boundary,
}

/// How training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are applied.
    Done,
    /// It was asked to leave; what was done is committed.
    Preempted,
}

/// One rank's training.
#[derive(Debug)]
pub struct Trainer {
    /// The run's config.
    pub config: Arc<RunConfig>,
    /// What is trained.
    pub state: TrainState,
    /// The networks; the connector's tensors are views into the state.
    pub networks: Networks,
    /// Lanes that were recorded.
    pub graphs: Graphs,
    /// The samples of this rank's lanes.
    pub feed: Feed,
    /// The other ranks.
    pub collective: Box<dyn Collective>,
    /// Saves.
    pub committer: Committer,
    /// Tells the coordinator.
    pub outbox: Outbox,
    /// What the coordinator, or a signal, asks for.
    pub flags: Arc<Flags>,
    /// When to commit.
    pub cadence: Cadence,
    /// How long the last commit held up training: told with the step after it.
    pub committing: Duration,
    /// What draws samples, if any are to be drawn.
    pub studio: Option<samples::Studio>,
    /// How long drawing samples held up training: told with the step after it.
    pub drawing: Duration,
    /// The step that the generation began with.
    pub began: u64,
    /// The step of the newest commit, saved or being saved.
    pub saved: u64,
    /// Whether the last commit that was to be made was left out, because a rank's last ones are not stored yet.
    pub behind: bool,
    /// Whether all ranks are known to have the next step's samples.
    pub supplied: bool,
    /// How many steps in a row, up to now and in this generation, were left out because a number was not finite.
    pub not_finite: usize,
    /// This rank's place in its generation.
    pub seat: Seat,
}

impl Trainer {
    /// Trains in one generation: until the last step, or until it ends. Nothing is lost of the state, whatever ends it.
    pub fn run(&mut self) -> Result<Halt, TrainError> {
        self.supplied = false;
        // All ranks must count alike, those that have just joined too.
        self.not_finite = 0;
        let last = self.config.train.steps;
        self.began = self.state.step;
        // Whoever was to draw this step's samples may be gone.
        if self.began > 0
            && let Some(halt) = self.draw()?
        {
            return Ok(halt);
        }
        if self.state.step >= last {
            // Its commit did not live to see its record.
            self.commit()?;
            return Ok(Halt::Done);
        }
        while self.state.step < last {
            match self.supply()? {
                Supply::All => {}
                Supply::Boundary => return Ok(Halt::Boundary),
                Supply::Leave => {
                    self.seat.era = self.flags.era();
                    self.commit()?;
                    return Ok(Halt::Drained);
                }
            }
            self.flags.at(Activity::Data);
            let input = self.feed.next_step();
            self.flags.at(Activity::Compute);
            let Some(input) = self.unless_interrupted(input)? else { return Err(TrainError::Interrupted) };
            let stats = self.step(input)?;
            let step = self.state.step;
            // Ranks without one coordinator, which all of them then know, go on until they have one.
            let attended = stats.agree_on(Some(self.seat.era).filter(|era| *era != Era::default()));
            let leaving = stats.leaving > 0 && step < last;
            let draws = stats.drawing > 0;
            // Nobody would go on from the last commit, and draw them.
            if draws
                && step == last
                && let Some(halt) = self.draw()?
            {
                return Ok(halt);
            }
            let named = self.cadence.names(step);
            // Nobody waits where the others would wait for it in the next step: that commit comes later.
            self.behind = named && stats.behind > 0;
            if attended && (leaving || step == last || stats.due > 0 || named && !self.behind) {
                self.commit()?;
            }
            self.committer.check()?;
            match () {
                () if step == last => return Ok(if attended { Halt::Done } else { Halt::Boundary }),
                () if leaving && attended => return Ok(Halt::Drained),
                () if stats.boundary > 0 => return Ok(Halt::Boundary),
                () if draws => {
                    if let Some(halt) = self.draw()? {
                        return Ok(halt);
                    }
                }
                () => {}
            }
        }
        Ok(Halt::Done)
    }

    /// None for what the end of the generation made of a wait.
    fn unless_interrupted<T>(&self, result: Result<T, FeedError>) -> Result<Option<T>, TrainError> {
        match result {
            Err(FeedError::Late { .. } | FeedError::Stalled { .. }) if self.flags.interrupted() => Ok(None),
            other => Ok(other.map(Some)?),
        }
    }

    /// Hands what is not in a commit yet to one.
    fn commit(&mut self) -> Result<(), TrainError> {
        let step = self.state.step;
        if step > self.saved {
            let begin = Instant::now();
            // A copy waits for the device, which may hang, and for nobody else.
            self.flags.at(Activity::Compute);
            let snapshot = self.state.snapshot(self.committer.kept())?;
            self.flags.at(Activity::Commit);
            self.cadence.taken(step, Instant::now());
            self.committer.save(snapshot, self.feed.position(step), self.seat)?;
            self.saved = step;
            let took = begin.elapsed();
            self.seat.tell(self.committer.run(), step, "snapshot", took, None);
            self.committing += took;
        }
        Ok(())
    }

    /// Returns once all ranks have the next step's samples, or none is to wait for them. Where captions are not encoded ahead, none of
    /// them waits for long.
    fn supply(&mut self) -> Result<Supply, TrainError> {
        if self.config.text.features != Features::Ahead || self.supplied {
            return Ok(Supply::All);
        }
        let patience = self.config.workers.step_timeout.duration();
        let (committer, flags) = (&mut self.committer, &self.flags);
        let goes_on = || if flags.interrupted() { Err(TrainError::Interrupted) } else { Ok(committer.check()?) };
        supply::all_are_supplied(&mut self.feed, self.collective.as_mut(), flags, patience, goes_on)
    }

    /// Applies one step and returns its sums over all ranks.
    fn step(&mut self, input: StepInput) -> Result<StepStats, TrainError> {
        let begin = Instant::now();
        let (commit, draw) = (std::mem::take(&mut self.committing), std::mem::take(&mut self.drawing));
        let mut times = Times { data: input.waited, encode: input.encode, commit, draw, ..Times::default() };
        let number = self.state.step + 1;
        if input.step + 1 != number {
            return Err(TrainError::Dealt {
                step: number,
                what: "applied steps before the samples",
                expected: number - 1,
                found: input.step,
            });
        }
        let Lanes { sum, mut mine, marks } = self.lanes(&input)?;
        mine.supplied = i64::from(self.feed.has_next());
        let due = self.cadence.is_due(self.state.step, self.flags.committed.load(Ordering::Relaxed), Instant::now());
        mine.due = i64::from(due && self.collective.rank() == 0);
        mine.drawing = i64::from(self.draws_after(number));
        mine.behind = i64::from(!self.has_room(number)?);

        let reduced = self.over_ranks(sum, &mine, &mut times)?;
        times.passes(&marks)?;

        let updating = Instant::now();
        let (words, norm) = read(&reduced)?;
        let all = StepStats::from_words(&words).map_err(|source| TrainError::Ledger { step: number, source })?;
        self.check_dealt(&all, input.step_samples)?;
        self.supplied = all.supplied == all.ranks;
        let Reduced { mut grad, lanes, .. } = reduced;
        if all.lost > 0 || all.refused_lanes > 0 || !norm.is_finite() {
            self.leave_out(&input, &lanes, norm)?;
        } else {
            self.not_finite = 0;
            let scale = optimizer::clipping(norm, self.config.train.grad_clip);
            optimizer::update(&mut self.state.buffers, (&mut grad, scale), &self.config.train, number)?;
        }
        self.state.step = number;
        self.state.ledger.add_tally(input.epoch, &all.tally);
        self.flags.applied(number);
        times.update = updating.elapsed();
        self.report(&all, norm, begin.elapsed() + input.waited + commit + draw, &times);
        Ok(all)
    }

    /// Whether a commit after this step could be handed over at once, if the config names it. A store that is slow for a moment is waited for, which holds
    /// all ranks up alike; one that has fallen behind is not waited for again until it has caught up.
    fn has_room(&mut self, step: u64) -> Result<bool, TrainError> {
        if !self.cadence.names(step) {
            return Ok(true);
        }
        let (begin, patience) = (Instant::now(), self.config.workers.step_timeout.duration() / PATIENCE);
        self.flags.at(Activity::Commit);
        let room = self.committer.has_room(if self.behind { Duration::ZERO } else { patience })?;
        self.committing += begin.elapsed();
        if !room && !self.behind {
            tracing::warn!(step, "no commit after this step: the store is far behind; the next one comes when it has caught up");
        }
        Ok(room)
    }

    /// Sums over all ranks. Up to here a GPU was only given work: now it is waited for, and then what its sums take longer.
    fn over_ranks(&mut self, mut sum: Sum, mine: &StepStats, times: &mut Times) -> Result<Reduced, TrainError> {
        let device = self.state.buffers.params.device();
        let computed = Mark::now(device)?;
        self.flags.at(Activity::Reduce);
        sum.begin_rest(self.collective.as_mut(), mine)?;
        self.flags.at(Activity::Compute);
        computed.wait()?;
        self.flags.at(Activity::Reduce);
        let (settling, held) = (Instant::now(), sum.held);
        let reduced = sum.settle(self.collective.as_mut())?;
        self.flags.at(Activity::Compute);
        times.reduce = settling.elapsed();
        times.reduce_hidden = reduced.beside.saturating_sub(times.reduce);
        if device == Device::Cpu {
            times.reduce += held;
        }
        Ok(reduced)
    }

    /// The gradients of this rank's lanes, summed, and what it has to tell of them. The last one's is on its way to the other ranks when it returns, but
    /// for what is known last.
    fn lanes(&mut self, input: &StepInput) -> Result<Lanes, TrainError> {
        let device = self.state.buffers.params.device();
        // Whoever coordinates now, if all ranks are found to have the same, records what is committed after this step.
        let attended = self.flags.attended();
        self.seat.era = attended.unwrap_or_default();
        let mut mine = StepStats::of_one_rank(attended);
        mine.leaving = i64::from(self.flags.drain.is_cancelled());
        mine.boundary = i64::from(self.flags.at_boundary());
        let segments: Vec<_> = self.networks.connector.segments().iter().map(|segment| segment.elements.clone()).collect();
        let mut sum = Sum::new(&self.config.train, &segments, device)?;
        for batch in &input.held_out {
            self.flags.at(Activity::Compute);
            let losses = self.graphs.beside(batch.len(), || self.networks.evaluate(batch))?;
            sum.add_held_out(&losses, batch.len())?;
        }
        let (last, mut marks) = (input.lanes.iter().rposition(|lane| lane.batch.is_some()), Vec::new());
        for (number, lane) in input.lanes.iter().enumerate() {
            mine.tally.merge(&lane.tally);
            mine.dropped += lane.dropped;
            mine.absent += lane.absent;
            mine.truncated += lane.truncated;
            let Some(batch) = &lane.batch else { continue };
            if self.flags.interrupted() {
                return Err(TrainError::Interrupted);
            }
            self.flags.at(Activity::Compute);
            let (begin, held) = (Mark::now(device)?, sum.held);
            let others = if Some(number) == last { Some(self.collective.as_mut()) } else { None };
            let mut adding = Adding { sum: &mut sum, others, flags: &self.flags, device, halfway: None };
            let loss = self.graphs.gradient_in_parts(&self.networks, batch, input.step_samples, &mut adding)?;
            let halfway = adding.halfway.take();
            sum.end_lane(lane.lane, &loss, batch.len())?;
            mine.split += i64::from(self.networks.split.cuts(batch.len()));
            marks.push(Passes { begin, halfway, end: Mark::now(device)?, held: sum.held - held });
        }
        Ok(Lanes { sum, mine, marks })
    }

    /// All ranks took part, and together used every sample of the step (ONCE).
    fn check_dealt(&self, all: &StepStats, step_samples: u64) -> Result<(), TrainError> {
        let step = self.state.step + 1;
        let world = u64::from(self.collective.world());
        for (what, expected, found) in [("places", world, all.ranks as u64), ("samples", step_samples, all.tally.samples)] {
            if found != expected {
                return Err(TrainError::Dealt { step, what, expected, found });
            }
        }
        Ok(())
    }

    /// Rank 0 speaks for all; of the others only the timing, and what they read, is of interest.
    fn report(&mut self, all: &StepStats, norm: f64, took: Duration, times: &Times) {
        let (step, mut read) = (self.state.step, self.feed.reads());
        read.extend(self.committer.pictures());
        logs::at_step(step);
        if trace::is_on(Some(step)) {
            self.trace(all, took, times);
        }
        let at_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        // The only trace of a step that is applied while there is no coordinator.
        tracing::debug!(step, at_unix_ms, "applied");
        let timing = Progress {
            step,
            step_seconds: took.as_secs_f64(),
            parts: Some(times.parts()),
            at_unix_ms,
            read,
            generation: self.flags.era().generation,
            world: self.seat.world,
            ..Progress::default()
        };
        if self.collective.rank() != 0 {
            return self.outbox.progress(timing);
        }
        let mut skipped = std::collections::HashMap::new();
        let counts = [
            ("captions_dropped", all.dropped),
            ("captions_absent", all.absent),
            ("captions_truncated", all.truncated),
            ("held_out_samples_not_finite", all.held_out_lost),
            ("steps_not_finite", i64::from(self.not_finite > 0)),
            ("lanes_split_for_memory", all.split),
            ("commits_left_out", i64::from(all.behind > 0 && all.leaving == 0 && step < self.config.train.steps)),
        ];
        for (name, count) in counts {
            if count > 0 {
                skipped.insert(name.to_owned(), count as u64);
            }
        }
        self.outbox.progress(Progress {
            samples: all.tally.samples,
            loss: all.mean_loss(),
            // Of a step that was left out, what its numbers come to is none.
            grad_norm: if self.not_finite > 0 { f64::NAN } else { norm },
            learning_rate: optimizer::learning_rate(&self.config.train, step),
            skipped,
            held_out_loss: all.mean_held_out(),
            ..timing
        });
    }
}

impl Trainer {
    /// Tells of the step as a trace: this rank's part of it, and rank 0 the whole. Its parts are sums over the lanes, shown one after the other.
    fn trace(&self, all: &StepStats, took: Duration, times: &Times) {
        let (step, rank, era) = (self.state.step, self.collective.rank(), self.flags.era());
        let trace = Trace::of(About::Step, self.committer.run(), &[era.term, era.generation, step]);
        let begun = SystemTime::now() - took;
        let mine = trace.within("rank", rank.into()).took(begun, took).with("ella.rank", i64::from(rank));
        let mine = mine
            .with("ella.encode_seconds", times.encode.as_secs_f64())
            .with("ella.reduce_hidden_seconds", times.reduce_hidden.as_secs_f64());
        let parts = [
            ("commit", times.commit),
            ("draw", times.draw),
            ("data", times.data),
            ("forward", times.forward),
            ("backward", times.backward),
        ];
        let parts = [parts.as_slice(), &[("reduce", times.reduce), ("update", times.update)]].concat();
        mine.parts(&parts).into_iter().for_each(trace::tell);
        trace::tell(mine);
        if rank == 0 {
            let root = trace.root().took(begun, took).with("ella.run", self.committer.run().to_owned());
            let root = root.with("ella.term", era.term.cast_signed()).with("ella.generation", era.generation.cast_signed());
            let root = root.with("ella.step", step.cast_signed()).with("ella.samples", all.tally.samples.cast_signed());
            trace::tell(root.with("ella.loss", all.mean_loss()).with("ella.world", i64::from(self.collective.world())));
        }
    }
}

/// A rank's lanes of a step.
struct Lanes {
    sum: Sum,
    mine: StepStats,
    marks: Vec<Passes>,
}

/// Adds a lane's gradient up as it comes, and begins to sum it over ranks if it is the last.
struct Adding<'a> {
    sum: &'a mut Sum,
    others: Option<&'a mut (dyn Collective + 'static)>,
    flags: &'a Flags,
    device: Device,
    halfway: Option<Mark>,
}

impl Follow for Adding<'_> {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        self.halfway = Some(Mark::now(self.device)?);
        Ok(())
    }

    fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        let low = elements.start;
        self.sum.add(elements, gradient)?;
        if let Some(others) = &mut self.others {
            self.flags.at(Activity::Reduce);
            self.sum.finished(low, &mut **others)?;
            self.flags.at(Activity::Compute);
        }
        Ok(())
    }
}

/// What a step does to a state that one rank trains alone, without a feed, a coordinator or a commit: for measurements. Returns the mean loss.
///
/// # Errors
/// What a step's are, but for a number that is not finite, which it returns.
#[doc(hidden)]
pub fn step_alone(
    (networks, graphs): (&Networks, &mut Graphs),
    state: &mut TrainState,
    train: &ella_proto::config::Train,
    lanes: &[LaneBatch],
    collective: &mut (dyn Collective + 'static),
) -> Result<f64, TrainError> {
    let device = state.buffers.params.device();
    let segments: Vec<_> = networks.connector.segments().iter().map(|segment| segment.elements.clone()).collect();
    let (mut sum, flags) = (Sum::new(train, &segments, device)?, Flags::default());
    let samples = lanes.iter().map(LaneBatch::len).sum::<i64>().unsigned_abs();
    for (number, batch) in lanes.iter().enumerate() {
        let others = if number + 1 == lanes.len() { Some(&mut *collective) } else { None };
        let mut adding = Adding { sum: &mut sum, others, flags: &flags, device, halfway: None };
        let loss = graphs.gradient_in_parts(networks, batch, samples, &mut adding)?;
        sum.end_lane(number as u32, &loss, batch.len())?;
    }
    let mut mine = StepStats::of_one_rank(None);
    mine.tally.samples = samples;
    sum.begin_rest(collective, &mine)?;
    let reduced = sum.settle(collective)?;
    let (words, norm) = read(&reduced)?;
    let all = StepStats::from_words(&words).map_err(|source| TrainError::Ledger { step: state.step + 1, source })?;
    state.step += 1;
    if !norm.is_finite() {
        return Ok(f64::NAN);
    }
    let (mut grad, scale) = (reduced.grad, optimizer::clipping(norm, train.grad_clip));
    optimizer::update(&mut state.buffers, (&mut grad, scale), train, state.step)?;
    Ok(all.mean_loss())
}

/// The step's sums, and the 2-norm of its gradient: in one copy, the only one that a step takes from the device.
fn read(reduced: &Reduced) -> Result<([i64; WORDS], f64), TrainError> {
    let square = optimizer::square_norm(&reduced.grad)?.f_reshape([1])?.f_view_dtype(Kind::Int64)?;
    let mut numbers = [0; WORDS + 1];
    Tensor::f_cat(&[&reduced.words, &square], 0)?.f_to_device(Device::Cpu)?.f_copy_data(&mut numbers, WORDS + 1)?;
    let [words @ .., square] = numbers;
    Ok((words, f64::from_bits(square as u64).sqrt()))
}
