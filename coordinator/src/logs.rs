//! The log on stderr, of coordinators and workers: as text for people, or as JSON with the run, term, generation, rank and step that the process is
//! in on every line, so that lines of many processes can be put together.

use std::fmt;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};

use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Json, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Stands for a number that is not known.
const UNKNOWN: u64 = u64::MAX;

/// Where this process is in its run. A process has one log, and so one place.
static PLACE: Place = Place::new();

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug)]
struct Place {
    run: RwLock<String>,
    term: AtomicU64,
    generation: AtomicU64,
    rank: AtomicU64,
    step: AtomicU64,
}

impl Place {
    const fn new() -> Self {
        Self {
            run: RwLock::new(String::new()),
            term: AtomicU64::new(UNKNOWN),
            generation: AtomicU64::new(UNKNOWN),
            rank: AtomicU64::new(UNKNOWN),
            step: AtomicU64::new(UNKNOWN),
        }
    }

    /// The place as the first members of a JSON object, without its braces.
    fn members(&self) -> String {
        let number = |value: &AtomicU64| Some(value.load(Relaxed)).filter(|value| *value != UNKNOWN);
        let run = self.run.read().unwrap_or_else(PoisonError::into_inner);
        let [term, generation, rank, step] = [&self.term, &self.generation, &self.rank, &self.step].map(number);
        let text = |name: &str, value: serde_json::Value| format!("\"{name}\":{value}");
        [
            text("run", if run.is_empty() { json!(null) } else { json!(*run) }),
            text("term", json!(term)),
            text("generation", json!(generation)),
            text("rank", json!(rank)),
            text("step", json!(step)),
        ]
        .join(",")
    }
}

/// This process is of this run (its URL) from here on; a job's is its data set.
pub fn in_run(url: &str) {
    url.clone_into(&mut PLACE.run.write().unwrap_or_else(PoisonError::into_inner));
}

/// It is in this term (of a job: its session).
pub fn in_term(term: u64) {
    PLACE.term.store(term, Relaxed);
}

/// It is in this generation.
pub fn in_generation(generation: u64) {
    PLACE.generation.store(generation, Relaxed);
}

/// It has this rank, or none.
pub fn as_rank(rank: Option<u32>) {
    PLACE.rank.store(rank.map_or(UNKNOWN, u64::from), Relaxed);
}

/// It has come to this step.
pub fn at_step(step: u64) {
    PLACE.step.store(step, Relaxed);
}

/// Starts this process's log; `ELLA_LOG` says what is told, from `info` up if it says nothing.
pub fn start(look: Look) {
    let (filter, misunderstood) = wanted("info");
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match look {
        Look::Text => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        Look::Json => builder.json().event_format(Placed(Format::default().json().with_target(true))).init(),
    }
    if let Some(why) = misunderstood {
        tracing::warn!("{why}");
    }
}

/// What `ELLA_LOG` asks for, or `usual` if it says nothing or is not understood; in that case with words that are to be told.
pub fn wanted(usual: &str) -> (EnvFilter, Option<String>) {
    filter(&std::env::var_os("ELLA_LOG").unwrap_or_default().to_string_lossy(), usual)
}

fn filter(said: &str, usual: &str) -> (EnvFilter, Option<String>) {
    let misunderstood = match EnvFilter::try_new(said) {
        _ if said.is_empty() => None,
        Ok(filter) => return (with_errors(filter, said), no_level(said)),
        Err(error) => Some(format!(
            "ELLA_LOG={said}: {error}; {usual} is logged (give a level, or levels of modules, as in info,ella_worker::train=debug)"
        )),
    };
    (EnvFilter::new(usual), misunderstood)
}

/// Errors are told whatever else is: they are why a process ended.
fn with_errors(filter: EnvFilter, said: &str) -> EnvFilter {
    let all = said.split(',').any(|part| part.trim().parse().is_ok_and(|level: LevelFilter| level != LevelFilter::OFF));
    if all { filter } else { filter.add_directive(LevelFilter::ERROR.into()) }
}

/// A word that is taken for a module, as all are that are no level, but was hardly meant for one.
fn no_level(said: &str) -> Option<String> {
    let word = said.trim();
    let module = word.contains(['=', ',', ':', '[']) || word.starts_with("ella") || word.parse::<LevelFilter>().is_ok();
    (!module).then(|| format!("ELLA_LOG={word}: no level (error, warn, info, debug, trace, off), so that it is taken for a module's name"))
}

/// JSON lines that say where the process is.
struct Placed(Format<Json>);

impl<S, N> FormatEvent<S, N> for Placed
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        match line.strip_prefix('{') {
            Some(rest) => write!(writer, "{{{},{rest}", PLACE.members()),
            None => writer.write_str(&line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_that_is_not_understood_is_told() {
        assert_eq!((filter("", "info").1, filter("warn,ella_worker::train=debug", "info").1), (None, None));
        assert_eq!((filter("off", "info").1, filter("hyper=info", "info").1), (None, None));
        assert!(filter("inof", "info").1.is_some_and(|why| why.contains("ELLA_LOG=inof: no level")));
        let (usual, why) = filter("ella_worker=loudly", "warn");
        assert_eq!(usual.to_string(), EnvFilter::new("warn").to_string());
        assert!(why.is_some_and(|why| why.contains("ELLA_LOG=ella_worker=loudly") && why.contains("warn is logged")));
    }

    #[test]
    fn errors_are_told_whatever_is_asked_for() {
        let told = |said: &str| filter(said, "info").0.to_string();
        assert_eq!(["off", "warn"].map(told), ["error", "warn"]);
        assert!(["inof", "ella_worker=off", "off,hyper=info"].iter().all(|said| told(said).split(',').any(|part| part == "error")));
    }

    #[test]
    fn a_place_is_told_as_far_as_it_is_known() {
        let place = Place::new();
        assert_eq!(place.members(), r#""run":null,"term":null,"generation":null,"rank":null,"step":null"#);
        *place.run.write().unwrap() = "s3://b/a \"run\"".into();
        place.rank.store(0, Relaxed);
        place.step.store(7, Relaxed);
        let line: serde_json::Value = serde_json::from_str(&format!("{{{}}}", place.members())).unwrap();
        assert_eq!((line["run"].as_str(), line["rank"].as_u64(), line["step"].as_u64()), (Some("s3://b/a \"run\""), Some(0), Some(7)));
        assert!(line["term"].is_null());
    }
}
