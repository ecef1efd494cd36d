//! Lanes of one shape as CUDA graphs: a GPU gets a lane's work in a few calls, where the processor would put thousands of kernels on its stream one
//! by one, each with its own arguments and memory. The bits are those of the plain way: it is the same kernels.
//!
//! A lane whose shape comes again and again is recorded once, cut where somebody is to be told of a stretch of the gradient ([`Follow`]), and
//! from then on played: its samples are copied to where the recording read them.

use super::TrainError;
use super::lane::{Follow, LaneBatch, Networks};
use crate::gpu::fault::Fault;
use ella_cuda::graph::{Graph, Recording};
use ella_cuda::stream::Stream;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The lane of its shape that is recorded: what libraries set up at first use cannot be, and a shape that comes twice may never come again.
pub(crate) const RECORD_AT: u32 = 3;
/// Shapes that are recorded, or counted, at a time. They share memory, but each has its samples' and its gradient's own, which [`crate::memory`]
/// counts.
pub(crate) const MOST: usize = 8;
/// The variable that turns recording off.
const SWITCH: &str = "ELLA_GRAPHS";

/// Whether lanes are to be recorded, as the variable says; or what is wrong with it.
fn wanted(said: Option<&str>) -> Result<bool, String> {
    match said {
        None | Some("" | "on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => Err(format!("{SWITCH}={other:?} is not understood (expected on or off)")),
    }
}

/// Whether the variable can be understood, on whatever is computed: programs ask before they begin anything.
///
/// # Errors
/// In words, what it says and what it may.
pub fn check() -> Result<(), String> {
    wanted(std::env::var(SWITCH).ok().as_deref()).map(|_| ())
}

/// Whether a GPU's lanes are to be recorded here.
pub(crate) fn is_wanted() -> bool {
    wanted(std::env::var(SWITCH).ok().as_deref()).unwrap_or_else(|why| {
        tracing::warn!("{why}: lanes are recorded");
        true
    })
}

/// What a recording holds for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shape {
    latents: Vec<i64>,
    features: (Vec<i64>, Kind),
    masked: bool,
    step_samples: u64,
}

impl Shape {
    fn of(batch: &LaneBatch, step_samples: u64) -> Result<Self, TrainError> {
        let features = (batch.features.size(), batch.features.f_kind()?);
        Ok(Self { latents: batch.latents.size(), features, masked: batch.mask.is_some(), step_samples })
    }
}

/// Who is told what when a part has been played.
#[derive(Debug)]
enum Then {
    ForwardDone,
    Part(Range<i64>, Tensor),
}

#[derive(Debug)]
struct Recorded {
    shape: Shape,
    /// Where the samples are read.
    batch: LaneBatch,
    parts: Vec<(Graph, Then)>,
    loss_sum: Tensor,
}

/// The recordings of a rank.
#[derive(Debug)]
pub struct Graphs {
    on: bool,
    seen: Vec<(Shape, u32)>,
    recorded: Vec<Recorded>,
}

impl Graphs {
    /// None yet; there never are any on a processor, or if `ELLA_GRAPHS=off`.
    pub fn new(device: Device) -> Self {
        Self { on: device.is_cuda() && is_wanted(), seen: Vec::new(), recorded: Vec::new() }
    }

    /// Shapes that are recorded.
    pub fn count(&self) -> usize {
        self.recorded.len()
    }

    /// [`Networks::gradient_in_parts`], recorded or played where that is possible.
    ///
    /// # Errors
    /// As there; CUDA's own.
    pub fn gradient_in_parts(
        &mut self,
        networks: &Networks,
        batch: &LaneBatch,
        step_samples: u64,
        follow: &mut dyn Follow,
    ) -> Result<Tensor, TrainError> {
        if !self.on {
            return networks.gradient_in_parts(batch, step_samples, follow);
        }
        let shape = Shape::of(batch, step_samples)?;
        if let Some(recorded) = self.recorded.iter_mut().find(|recorded| recorded.shape == shape) {
            return recorded.play(batch, follow);
        }
        if self.is_due(&shape) {
            let beside = self.recorded.first().and_then(|first| first.parts.first()).map(|(graph, _)| graph);
            match Recorded::record(shape, networks, batch, step_samples, beside) {
                Ok(mut recorded) => {
                    let loss_sum = recorded.play(batch, follow);
                    self.recorded.push(recorded);
                    return loss_sum;
                }
                Err(error) => {
                    tracing::warn!("lanes are not recorded from here on, which costs time: {error}");
                    self.on = false;
                    self.forget();
                }
            }
        }
        self.plainly(networks, batch, step_samples, follow)
    }

    /// Counts a lane of this shape; whether it is to be recorded.
    fn is_due(&mut self, shape: &Shape) -> bool {
        let count = match self.seen.iter_mut().find(|(seen, _)| seen == shape) {
            Some((_, count)) => {
                *count += 1;
                *count
            }
            None => {
                if self.seen.len() == MOST {
                    self.seen.remove(0);
                }
                self.seen.push((shape.clone(), 1));
                1
            }
        };
        count >= RECORD_AT && self.recorded.len() < MOST
    }

    /// The plain way. What recordings keep for themselves is given up if there is no memory for it beside them: an epoch's last lanes are smaller,
    /// and come once.
    fn plainly(
        &mut self,
        networks: &Networks,
        batch: &LaneBatch,
        step_samples: u64,
        follow: &mut dyn Follow,
    ) -> Result<Tensor, TrainError> {
        if self.recorded.is_empty() {
            return networks.gradient_in_parts(batch, step_samples, follow);
        }
        let mut told = Told { follow, of_parts: false };
        match networks.split.settled(|| networks.gradient_in_parts(batch, step_samples, &mut told)) {
            Err(error) if !told.of_parts && self.gives_up(&error, batch.len()) => networks.gradient_in_parts(batch, step_samples, follow),
            result => result,
        }
    }

    /// What is done beside recorded lanes with so many samples. They are given up if the memory does not hold both, and then it is done again.
    ///
    /// # Errors
    /// What `work` gives.
    pub fn beside<T>(&mut self, samples: i64, work: impl Fn() -> Result<T, TrainError>) -> Result<T, TrainError> {
        match work() {
            Err(error) if self.gives_up(&error, samples) => work(),
            result => result,
        }
    }

    /// Gives recordings up, if there are any and the error is of memory.
    fn gives_up(&mut self, error: &TrainError, samples: i64) -> bool {
        let is_full = !self.recorded.is_empty() && Fault::of(error) == Some(Fault::OutOfMemory);
        if is_full {
            tracing::info!("recorded lanes are given up: the memory does not hold {samples} samples beside them");
            self.forget();
        }
        is_full
    }

    /// Gives back what recordings keep.
    fn forget(&mut self) {
        (self.recorded, self.seen) = (Vec::new(), Vec::new());
        // Where this fails, what comes next does too, and says so.
        let _ = ella_cuda::memory::empty_cache();
    }
}

/// Passes on what is told, and knows whether that was a part of the gradient, which cannot be taken back.
struct Told<'a> {
    follow: &'a mut dyn Follow,
    of_parts: bool,
}

impl Follow for Told<'_> {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        self.follow.forward_done()
    }

    fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        self.of_parts = true;
        self.follow.part(elements, gradient)
    }
}

impl Recorded {
    /// Records the lane's work; nothing of it is computed.
    fn record(shape: Shape, networks: &Networks, batch: &LaneBatch, step_samples: u64, beside: Option<&Graph>) -> Result<Self, TrainError> {
        // Made outside of the recording: its memory is never reused within.
        let batch = batch.copied()?;
        // The recording has memory of its own: what the plain way kept for its next lane is given back first.
        Stream::current(batch.latents.device())?.synchronize()?;
        ella_cuda::memory::empty_cache()?;
        let mut recorder = Recorder { beside, recording: Some(Recording::begin(beside)?), parts: Vec::new() };
        // Out of memory here, beside what the plain way has, is no reason to cut lanes.
        let loss_sum = networks.split.settled(|| networks.gradient_in_parts(&batch, step_samples, &mut recorder))?;
        Ok(Self { shape, batch, parts: recorder.parts, loss_sum })
    }

    fn play(&mut self, batch: &LaneBatch, follow: &mut dyn Follow) -> Result<Tensor, TrainError> {
        for (to, from) in self.batch.tensors().zip(batch.tensors()) {
            to.shallow_clone().f_copy_(from)?;
        }
        for (graph, then) in &self.parts {
            graph.replay()?;
            match then {
                Then::ForwardDone => follow.forward_done()?,
                Then::Part(elements, gradient) => follow.part(elements.clone(), gradient)?,
            }
        }
        Ok(self.loss_sum.shallow_clone())
    }
}

/// Ends a graph and begins the next wherever somebody is told.
struct Recorder<'a> {
    beside: Option<&'a Graph>,
    recording: Option<Recording>,
    parts: Vec<(Graph, Then)>,
}

impl Recorder<'_> {
    fn cut(&mut self, then: Then, is_last: bool) -> Result<(), TrainError> {
        if let Some(recording) = self.recording.take() {
            self.parts.push((recording.end()?, then));
        }
        if !is_last {
            let beside = self.beside.or(self.parts.first().map(|(graph, _)| graph));
            self.recording = Some(Recording::begin(beside)?);
        }
        Ok(())
    }
}

impl Follow for Recorder<'_> {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        self.cut(Then::ForwardDone, false)
    }

    fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        // The first parameter's stretch comes last.
        let is_last = elements.start == 0;
        self.cut(Then::Part(elements, gradient.shallow_clone()), is_last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_none_is_named() {
        assert_eq!([None, Some(""), Some("on"), Some("off")].map(wanted), [Ok(true), Ok(true), Ok(true), Ok(false)]);
        assert!(wanted(Some("blah")).unwrap_err().contains("ELLA_GRAPHS=\"blah\""));
    }

    fn shape(samples: i64) -> Shape {
        Shape { latents: vec![samples, 4, 8, 8], features: (vec![samples, 16, 32], Kind::Half), masked: false, step_samples: 64 }
    }

    #[test]
    fn a_shape_is_recorded_when_it_has_come_often_enough() {
        let mut graphs = Graphs { on: true, seen: Vec::new(), recorded: Vec::new() };
        assert_eq!([0; 4].map(|_| graphs.is_due(&shape(8))), [false, false, true, true]);
        // Many that come once do not add up, and do not fill the memory.
        assert!((100..200).all(|samples| !graphs.is_due(&shape(samples))) && graphs.seen.len() == MOST);
        assert!(!graphs.is_due(&Shape { step_samples: 63, ..shape(8) }));
    }

    #[test]
    fn what_does_not_fit_beside_recordings_is_done_without_them() {
        let tensor = || Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let [latents, noise, timesteps, features, time_ids] = [(); 5].map(|()| tensor());
        let batch = LaneBatch { latents, noise, timesteps, features, mask: None, time_ids };
        let recorded = || Recorded { shape: shape(8), batch: batch.shallow_clone(), parts: Vec::new(), loss_sum: tensor() };
        let fails = |text: &str| TrainError::Torch(tch::TchError::Torch(text.to_owned()));
        let full = "CUDA out of memory. Tried to allocate 2.00 GiB.";
        for (error, count, tries) in [(full, 2, 2), (full, 0, 1), ("CUDA error: misaligned address", 2, 1)] {
            let mut graphs = Graphs { on: true, seen: Vec::new(), recorded: (0..count).map(|_| recorded()).collect() };
            let tried = std::cell::Cell::new(0);
            let done = graphs.beside(8, || {
                tried.set(tried.get() + 1);
                if tried.get() == 1 { Err(fails(error)) } else { Ok(7) }
            });
            assert_eq!((done.ok(), tried.get()), ((tries == 2).then_some(7), tries), "{error}");
            assert_eq!(graphs.count(), if tries == 2 { 0 } else { count });
        }
    }

    #[test]
    fn nothing_is_recorded_on_a_processor() {
        assert!(!Graphs::new(Device::Cpu).on);
    }
}
