//! Traces over OTLP: what a step, a commit, a change of members or a unit of a job took, in every process that took part.
//!
//! Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) is set. Ids are not passed on but worked out, from what all
//! processes know of the same thing: the run, the term, the generation and the step. So one commit is one trace although no message carries its
//! id, and a process that dies leaves a gap and no orphan.
//!
//! Nothing waits for a collector (LIVE): spans that find the queue full are dropped and counted ([`counts`], KNOWN), and an exporter that fails
//! is told of once, until it works again.

mod export;
mod settings;

pub use export::{counts, finish, is_on, start, tell};
pub use settings::{Settings, TraceError};

use ella_store::Digest;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use std::time::{Duration, SystemTime};

/// What is traced; each kind has traces of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// A step of all ranks.
    Step,
    /// A commit, from the first rank's snapshot to its record.
    Commit,
    /// How a membership came about.
    Generation,
    /// A unit of a job.
    Unit,
}

impl About {
    fn name(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Commit => "commit",
            Self::Generation => "generation",
            Self::Unit => "unit",
        }
    }
}

/// One trace, known by all processes that take part in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    about: About,
    id: [u8; 16],
}

impl Trace {
    /// The trace of what these numbers name in a run (its URL): the term, the generation and the step, as far as they apply.
    pub fn of(about: About, run: &str, numbers: &[u64]) -> Self {
        let mut text = format!("{}\0{run}", about.name());
        numbers.iter().for_each(|number| text += &format!("\0{number}"));
        let digest = Digest::of(text.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&digest.as_bytes()[..16]);
        Self { about, id }
    }

    /// The span that all others of the trace are in. One process tells of it.
    pub fn root(&self) -> Span {
        Span::new(self, self.about.name(), None)
    }

    /// A span right within the root: of this rank, say.
    pub fn within(&self, name: &'static str, key: u64) -> Span {
        let root = self.root().id;
        Span { id: id_of(&root, &format!("{name}\0{key}")), ..Span::new(self, name, Some(root)) }
    }
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub(crate) trace: [u8; 16],
    pub(crate) id: [u8; 8],
    pub(crate) parent: Option<[u8; 8]>,
    pub(crate) name: &'static str,
    pub(crate) begun: SystemTime,
    pub(crate) ended: SystemTime,
    pub(crate) attributes: Vec<KeyValue>,
    pub(crate) error: Option<String>,
}

impl Span {
    fn new(trace: &Trace, name: &'static str, parent: Option<[u8; 8]>) -> Self {
        let id = id_of(&trace.id, name);
        let (begun, ended) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        Self { trace: trace.id, id, parent, name, begun, ended, attributes: Vec::new(), error: None }
    }

    /// From then until it had taken so long.
    pub fn took(self, begun: SystemTime, took: Duration) -> Self {
        Self { begun, ended: begun + took, ..self }
    }

    /// Says more of it.
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push(KeyValue::new(name, value));
        self
    }

    /// Says more of it, in a list.
    pub fn with_all(self, name: &'static str, values: &[String]) -> Self {
        self.with(name, Value::Array(Array::String(values.iter().cloned().map(StringValue::from).collect())))
    }

    /// It failed, and why, if it did.
    pub fn failed(self, error: Option<String>) -> Self {
        Self { error, ..self }
    }

    /// What it consisted of: parts one after the other from its beginning. Those of no length are left out.
    pub fn parts(&self, parts: &[(&'static str, Duration)]) -> Vec<Self> {
        let (mut at, mut spans) = (self.begun, Vec::new());
        for (name, took) in parts.iter().filter(|(_, took)| !took.is_zero()) {
            let id = id_of(&self.id, name);
            let part = Self { id, parent: Some(self.id), name, attributes: Vec::new(), error: None, ..self.clone() };
            spans.push(part.took(at, *took));
            at += *took;
        }
        spans
    }
}

/// A span's id within its trace or parent.
fn id_of(within: &[u8], name: &str) -> [u8; 8] {
    let digest = Digest::of(&[within, b"\0", name.as_bytes()].concat());
    let mut id = [0; 8];
    id.copy_from_slice(&digest.as_bytes()[..8]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_agree_on_ids_without_a_word() {
        let one = Trace::of(About::Commit, "s3://b/run", &[3, 1, 400]);
        assert_eq!(one, Trace::of(About::Commit, "s3://b/run", &[3, 1, 400]));
        let others = [
            Trace::of(About::Step, "s3://b/run", &[3, 1, 400]),
            Trace::of(About::Commit, "s3://b/other", &[3, 1, 400]),
            Trace::of(About::Commit, "s3://b/run", &[31, 400]),
        ];
        assert!(others.iter().all(|other| other.id != one.id));
        let (first, second) = (one.within("save", 0), one.within("save", 1));
        assert_eq!((first.parent, second.parent), (Some(one.root().id), Some(one.root().id)));
        assert!(first.id != second.id && one.root().parent.is_none());
    }

    #[test]
    fn parts_follow_each_other() {
        let begun = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
        let rank = Trace::of(About::Step, "r", &[1]).within("rank", 0).took(begun, Duration::from_secs(3));
        let parts = rank.parts(&[("data", Duration::from_secs(1)), ("encode", Duration::ZERO), ("forward", Duration::from_secs(2))]);
        assert_eq!(parts.iter().map(|part| part.name).collect::<Vec<_>>(), ["data", "forward"]);
        assert_eq!((parts[1].begun, parts[1].ended), (begun + Duration::from_secs(1), rank.ended));
        assert!(parts.iter().all(|part| part.parent == Some(rank.id)) && parts[0].id != parts[1].id);
    }
}
