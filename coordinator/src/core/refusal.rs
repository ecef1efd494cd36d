//! Why a worker is turned away, and the form that its Hello must have.

use super::failure::advice;
use super::{Field, Unreached, Who};
use ella_proto::v1;

/// Longest text taken from a worker's Hello.
const MOST_TEXT: usize = 256;
/// Most names in a worker's Hello of what it computes with.
const MOST_COMPUTES: usize = 16;
/// More generations than any run has.
const MOST_GENERATIONS: u64 = 1 << 53;

/// Why a worker is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Worker and coordinator are of different builds.
    #[error("this worker has version {theirs}, the coordinator {ours}; start workers of the same version")]
    Version {
        /// The coordinator's.
        ours: String,
        /// The worker's.
        theirs: String,
    },
    /// The worker insists on another config.
    #[error("this worker was started for config {theirs}, but the coordinator has {ours}; start it with that config, or with none")]
    Config {
        /// The coordinator's digest.
        ours: String,
        /// The worker's.
        theirs: String,
    },
    /// Two processes on one device would deadlock in their first collective.
    #[error("device {uuid} is already used by {holder}; give each worker a device of its own")]
    DuplicateDevice {
        /// The device.
        uuid: String,
        /// Who has it.
        holder: Box<Who>,
    },
    /// SAME holds for equal device kinds only.
    #[error("this worker computes on {theirs}, {}", kind_text(*of, ours, theirs))]
    DeviceKind {
        /// The run's.
        ours: String,
        /// That of this worker.
        theirs: String,
        /// Why that one is the run's.
        of: KindOf,
    },
    /// It would train on something else.
    #[error("this worker has {theirs} as its {field}, the run {ours}; {}", advice(*field))]
    Data {
        /// What is another.
        field: Field,
        /// The run's.
        ours: String,
        /// The worker's.
        theirs: String,
    },
    /// Its id is taken.
    #[error("the worker id is already used by {holder}; each process must make its own")]
    DuplicateWorker {
        /// Who has it.
        holder: Box<Who>,
    },
    /// It breaks a rule of the protocol.
    #[error("{rule}")]
    Malformed {
        /// Which.
        rule: &'static str,
    },
    /// There is nothing left to do.
    #[error("the run is over ({})", word(*outcome))]
    RunOver {
        /// How it ended.
        outcome: v1::Outcome,
        /// It failed, and would fail in the same way again.
        permanent: bool,
    },
    /// The job ended.
    #[error("the job is over ({})", word(*outcome))]
    JobOver {
        /// How it ended.
        outcome: v1::Outcome,
        /// It failed, and would fail in the same way again.
        permanent: bool,
    },
    /// Another coordinator has the run (TERM).
    #[error("this coordinator has been superseded; attach to the new one")]
    Superseded,
    /// The others cannot train with it.
    #[error("{0}")]
    Unreached(Box<Unreached>),
    /// Its run folder is another one.
    #[error("{why}")]
    Elsewhere {
        /// What tells that, and what to do.
        why: String,
    },
}

/// Why a kind of device is the run's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KindOf {
    /// Its config names it.
    Config,
    /// It was trained on it.
    Trained,
    /// Workers that are here have it, and nothing is trained yet.
    Others,
}

fn kind_text(of: KindOf, ours: &str, theirs: &str) -> String {
    match of {
        KindOf::Config => format!("and the run has workers.device = \"{ours}\"; see `ella doctor` there, or leave this machine out"),
        KindOf::Trained => format!(
            "and the run was trained on {ours}, which gives other bits; see `ella doctor` there; or resume the run with workers.device = \"{theirs}\" to \
             go on so on purpose"
        ),
        KindOf::Others => {
            format!(
                "others of this run on {ours}, and all must have one kind of device; see `ella doctor` there, or name the kind in workers.device"
            )
        }
    }
}

fn word(outcome: v1::Outcome) -> &'static str {
    match outcome {
        v1::Outcome::Done => "done",
        v1::Outcome::Preempted => "preempted",
        v1::Outcome::Failed | v1::Outcome::Unspecified => "failed",
    }
}

impl Refusal {
    /// As the wire says it.
    pub fn reason(&self) -> v1::RefusedReason {
        use v1::RefusedReason as R;
        match self {
            Self::Version { .. } => R::Version,
            Self::Config { .. } => R::Config,
            Self::DuplicateDevice { .. } => R::DuplicateDevice,
            Self::DeviceKind { .. } => R::DeviceKind,
            Self::Data { .. } | Self::Elsewhere { .. } => R::Data,
            Self::DuplicateWorker { .. } => R::DuplicateWorker,
            Self::Malformed { .. } => R::Malformed,
            Self::RunOver { .. } | Self::JobOver { .. } => R::RunOver,
            Self::Superseded => R::Superseded,
            Self::Unreached(_) => R::Unreached,
        }
    }

    /// As the wire says it, in words too.
    pub(crate) fn on_the_wire(&self) -> v1::Refused {
        let (outcome, permanent) = match self {
            Self::RunOver { outcome, permanent } | Self::JobOver { outcome, permanent } => (*outcome, *permanent),
            // Until something is trained others decide, who may go.
            Self::DeviceKind { of, .. } => (v1::Outcome::Unspecified, *of != KindOf::Others),
            Self::Elsewhere { .. } => (v1::Outcome::Unspecified, true),
            _ => (v1::Outcome::Unspecified, false),
        };
        v1::Refused { reason: self.reason().into(), detail: self.to_string(), outcome: outcome.into(), permanent }
    }

    /// Refuses a worker of another version than `ours`, or one that insists on another config than that of `digest`.
    pub(crate) fn of_another_build(hello: &v1::Hello, ours: &str, digest: &str) -> Result<(), Self> {
        if hello.version != ours {
            return Err(Self::Version { ours: ours.to_owned(), theirs: hello.version.clone() });
        }
        if !hello.config_digest.is_empty() && hello.config_digest != digest {
            return Err(Self::Config { ours: digest.to_owned(), theirs: hello.config_digest.clone() });
        }
        Ok(())
    }

    /// The counter's name (KNOWN).
    pub(crate) fn counter(&self) -> &'static str {
        match self {
            Self::Version { .. } => "refused_version",
            Self::Config { .. } => "refused_config",
            Self::DuplicateDevice { .. } => "refused_duplicate_device",
            Self::DeviceKind { .. } => "refused_device_kind",
            Self::Data { .. } => "refused_data",
            Self::DuplicateWorker { .. } => "refused_duplicate_worker",
            Self::Malformed { .. } => "refused_malformed",
            Self::RunOver { .. } | Self::JobOver { .. } => "refused_run_over",
            Self::Superseded => "refused_superseded",
            Self::Unreached(_) => "refused_unreached",
            Self::Elsewhere { .. } => "refused_elsewhere",
        }
    }
}

/// What a worker computes on, for people.
pub(crate) fn device(hello: &v1::Hello) -> String {
    let v1::Hello { device_kind, device_uuid, .. } = hello;
    if device_uuid.is_empty() { device_kind.clone() } else { format!("{device_kind} {device_uuid}") }
}

/// The form of what says who a worker is.
pub(crate) fn check_identity(hello: &v1::Hello) -> Result<(), Refusal> {
    let v1::Hello { worker_id, version, host, device_kind, device_uuid, peer_address, config_digest, .. } = hello;
    let texts = [worker_id, version, host, device_kind, device_uuid, peer_address, config_digest];
    let texts: Vec<&String> = texts.into_iter().chain(hello.computes.iter().flat_map(|(name, what)| [name, what])).collect();
    obeyed(&[
        (hello.computes.len() <= MOST_COMPUTES, "Hello.computes must not have more than 16 names"),
        (texts.iter().all(|text| text.len() <= MOST_TEXT), "no text in Hello may be longer than 256 bytes"),
        (!worker_id.is_empty(), "Hello.worker_id must not be empty"),
    ])
}

/// What may be shown of a text of unknown length.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(MOST_TEXT).collect()
}

pub(super) fn check_form(hello: &v1::Hello) -> Result<(), Refusal> {
    check_identity(hello)?;
    let v1::Hello { device_kind, device_uuid, peer_address, place, .. } = hello;
    let port = peer_address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    obeyed(&[
        (matches!(device_kind.as_str(), "cpu" | "cuda"), "Hello.device_kind must be \"cpu\" or \"cuda\""),
        (device_kind != "cuda" || !device_uuid.is_empty(), "Hello.device_uuid must name the GPU"),
        (port.is_some_and(|port| port != 0), "Hello.peer_address must be host:port"),
        (place.as_ref().is_none_or(|place| place.rank < place.world), "Hello.place.rank must be below its world"),
        (place.as_ref().is_none_or(|place| place.generation < MOST_GENERATIONS), "Hello.place.generation must be below 2^53"),
    ])
}

/// Refuses by the first rule that does not hold.
fn obeyed(rules: &[(bool, &'static str)]) -> Result<(), Refusal> {
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(Refusal::Malformed { rule }),
        None => Ok(()),
    }
}
