//! A job's config: `[job]`, which its coordinator reads, and one table named like its kind, which those read who do the work. Whoever loads the
//! file sees to the table's keys, lest the first worker be the one to refuse them.

use super::{ConfigError, Millis, RunConfig, Workers, check, job_keys, keys, read, text_of};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a coordinator serves and a worker works on: a training run, or a job of leased units.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// It has no `[job]`.
    Run(Box<RunConfig>),
    /// It has.
    Job(Box<JobConfig>),
}

impl Config {
    /// Reads a config file and applies overrides of the form `section.key=value`. Of a job's own table the keys are checked too.
    pub fn load(path: &std::path::Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        let config = Self::parse(&text_of(path)?, &origin, overrides)?;
        if let Self::Job(job) = &config {
            job_keys::check(job.job.kind, job.table(job.job.kind), &origin)?;
        }
        Ok(config)
    }

    /// Parses TOML text. `origin` names it in errors.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        if is_job(text) {
            return JobConfig::parse(text, origin, overrides).map(|job| Self::Job(Box::new(job)));
        }
        RunConfig::parse(text, origin, overrides).map(|run| Self::Run(Box::new(run)))
    }
}

/// Whether it is a job's text. What is no TOML is refused by whoever reads it.
pub(super) fn is_job(text: &str) -> bool {
    text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("job"))
}

/// The kinds of job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Sources into a prepared data set.
    Prepare,
    /// Captions into features.
    Embed,
    /// Pictures into captions.
    Caption,
    /// Prompts into grids of pictures.
    Draw,
}

impl JobKind {
    /// All of them.
    const ALL: [Self; 4] = [Self::Prepare, Self::Embed, Self::Caption, Self::Draw];

    /// As the config has it; also the name of its own table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Embed => "embed",
            Self::Caption => "caption",
            Self::Draw => "draw",
        }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A whole job's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobConfig {
    /// What the coordinator must know.
    pub job: JobTable,
    /// The settings of a prepare job, unread.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    prepare: toml::Table,
    /// The settings of an embed job, unread.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    embed: toml::Table,
    /// The settings of a caption job, unread.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    caption: toml::Table,
    /// The settings of a draw job, unread.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    draw: toml::Table,
}

/// `[job]`. Times are a run's (`[workers]`), unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobTable {
    /// Which kind; its own settings stand in the table of the same name.
    pub kind: JobKind,
    /// What is made or worked on: a data set, or the folder that drawn pictures go to; URL or path.
    pub data: String,
    /// A worker not heard of for this long has lost its units.
    #[serde(default = "JobTable::lease")]
    pub lease: Millis,
    /// A job that has had no worker for this long fails; it can be started again.
    #[serde(default = "JobTable::start_timeout")]
    pub start_timeout: Millis,
    /// A worker whose coordinator is gone, or answers nothing, for this long stops; until then it goes on and looks for the next one.
    #[serde(default = "JobTable::orphan_timeout")]
    pub orphan_timeout: Millis,
}

impl JobTable {
    /// A job with a run's times.
    pub fn new(kind: JobKind, data: String) -> Self {
        let Workers { lease, start_timeout, orphan_timeout, .. } = Workers::default();
        Self { kind, data, lease, start_timeout, orphan_timeout }
    }

    fn lease() -> Millis {
        Workers::default().lease
    }

    fn start_timeout() -> Millis {
        Workers::default().start_timeout
    }

    fn orphan_timeout() -> Millis {
        Workers::default().orphan_timeout
    }
}

impl JobConfig {
    /// A config in which the kind's own table is `settings`.
    ///
    /// # Errors
    /// If `settings` is nothing that TOML can hold.
    pub fn new(job: JobTable, settings: &impl Serialize) -> Result<Self, ConfigError> {
        let wrong = |e: toml::ser::Error| ConfigError::Syntax { origin: format!("[{}]", job.kind), message: e.to_string() };
        let settings = toml::Table::try_from(settings).map_err(wrong)?;
        let [prepare, embed, caption, draw] = [(); 4].map(|()| toml::Table::new());
        let mut config = Self { job, prepare, embed, caption, draw };
        *config.table_mut(config.job.kind) = settings;
        Ok(config)
    }

    /// Parses TOML text with overrides. `origin` names it in errors. The kind's own table is not looked into.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let (config, origin): (Self, _) = read(text, origin, overrides, &Self::known())?;
        let JobTable { kind, data, lease, start_timeout, orphan_timeout } = &config.job;
        let wrong = |key, found: String, rule: String| Err(ConfigError::Value { origin: origin.clone(), key, found, rule });
        if data.is_empty() {
            return wrong("job.data", "\"\"".to_owned(), "it must be a path or a URL".to_owned());
        }
        // The coordinator shows it, and does not open it.
        let bare = check::bare(data);
        if bare != *data {
            return wrong("job.data", format!("{bare} and more"), check::BARE.to_owned());
        }
        for (key, time) in [("job.lease", lease), ("job.start_timeout", start_timeout), ("job.orphan_timeout", orphan_timeout)] {
            if time.0 == 0 {
                return wrong(key, format!("\"{time}\""), "it must be 1ms or more".to_owned());
            }
        }
        for other in JobKind::ALL.into_iter().filter(|other| other != kind) {
            if !config.table(other).is_empty() {
                return wrong(other.name(), "set".to_owned(), format!("job.kind = \"{kind}\" has its settings in [{kind}]"));
            }
        }
        Ok(config)
    }

    /// The kind's own settings. `full` is a value of theirs in which every optional key is set: it says which keys there are.
    ///
    /// # Errors
    /// If a key is unknown (the nearest is named), missing, or of the wrong type.
    pub fn settings<T: Serialize + DeserializeOwned>(&self, full: &T) -> Result<T, ConfigError> {
        let kind = self.job.kind;
        let origin = "the job's config";
        let known = toml::Table::try_from(full).unwrap_or_default();
        keys::check_below(self.table(kind), &known, origin, &format!("{kind}."))?;
        let wrong = |e: toml::de::Error| ConfigError::Syntax { origin: format!("{origin}, [{kind}]"), message: super::words("", &e) };
        self.table(kind).clone().try_into().map_err(wrong)
    }

    /// The effective config, as workers are told it.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// BLAKE3 over the config: a worker that comes back must find the same.
    pub fn digest(&self) -> String {
        blake3::hash(self.to_toml().as_bytes()).to_hex().to_string()
    }

    fn table(&self, kind: JobKind) -> &toml::Table {
        match kind {
            JobKind::Prepare => &self.prepare,
            JobKind::Embed => &self.embed,
            JobKind::Caption => &self.caption,
            JobKind::Draw => &self.draw,
        }
    }

    fn table_mut(&mut self, kind: JobKind) -> &mut toml::Table {
        match kind {
            JobKind::Prepare => &mut self.prepare,
            JobKind::Embed => &mut self.embed,
            JobKind::Caption => &mut self.caption,
            JobKind::Draw => &mut self.draw,
        }
    }

    /// The keys of `[job]`, and the kinds' tables, whose keys are theirs.
    fn known() -> toml::Table {
        let job = toml::Table::try_from(JobTable::new(JobKind::Prepare, String::new())).unwrap_or_default();
        let kinds = JobKind::ALL.map(|kind| (kind.name().to_owned(), toml::Value::Boolean(true)));
        kinds.into_iter().chain([("job".to_owned(), toml::Value::Table(job))]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[job]\nkind = \"prepare\"\ndata = \"d\"\n[prepare]\nresolution = 256\n";

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        resolution: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        crop: Option<String>,
    }

    fn full() -> Settings {
        Settings { resolution: 1, crop: Some(String::new()) }
    }

    fn parse(text: &str, set: &[&str]) -> Result<JobConfig, ConfigError> {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        JobConfig::parse(text, "job.toml", &set)
    }

    #[test]
    fn a_job_is_told_from_a_run_and_reads_back_as_itself() {
        let Config::Job(config) = Config::parse(SMALL, "job.toml", &["job.lease=5s".to_owned()]).unwrap() else { panic!("a run") };
        assert_eq!((config.job.lease, config.job.orphan_timeout), (Millis(5_000), Workers::default().orphan_timeout));
        assert_eq!(parse(&config.to_toml(), &[]).unwrap(), *config);
        assert_ne!(config.digest(), parse(SMALL, &[]).unwrap().digest());
        let run = "[run]\noutput = \"o\"\n[base]\nmodel = \"m\"\n[text]\nmodel = \"t\"\n[data]\npath = \"d\"\n";
        assert!(matches!(Config::parse(run, "run.toml", &[]).unwrap(), Config::Run(_)));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[embed]\ntext = \"t\"\n[job]\nkind = \"embed\"\ndata = \"d\"\n").unwrap();
        let error = RunConfig::load(file.path(), &[]).unwrap_err().to_string();
        assert!(error.contains("this is a job's config, for `ella-coordinator "), "{error}");
        assert!(matches!(Config::parse("[job", "x", &[]), Err(ConfigError::Syntax { .. })));
    }

    #[test]
    fn the_kinds_own_table_is_read_by_its_owner_and_strictly() {
        let config = parse(SMALL, &["prepare.crop=centre"]).unwrap();
        assert_eq!(config.settings(&full()).unwrap(), Settings { resolution: 256, crop: Some("centre".into()) });
        assert_eq!(JobConfig::new(config.job.clone(), &config.settings(&full()).unwrap()).unwrap(), config);
        let text = |set: &str| parse(SMALL, &[set]).unwrap().settings(&full()).unwrap_err().to_string();
        assert_eq!(text("prepare.resolutoin=1"), "the job's config: unknown key `prepare.resolutoin`; did you mean `prepare.resolution`?");
        assert!(text("prepare.resolution=many").starts_with("the job's config, [prepare]: "), "{}", text("prepare.resolution=many"));
    }

    #[test]
    fn what_a_coordinator_can_refuse_it_refuses_by_key() {
        let job = "[job]\nkind = \"prepare\"\ndata = \"d\"\n";
        for (text, words) in [
            (format!("{job}leese = \"1s\""), "did you mean `job.lease`?"),
            (format!("{job}[prepair]\n"), "did you mean `prepare`?"),
            (format!("{job}lease = \"0s\""), "`job.lease` is \"0ms\", but it must be 1ms or more"),
            (format!("{job}[embed]\ntext = \"t\""), "`embed` is set, but job.kind = \"prepare\" has its settings in [prepare]"),
            ("[job]\nkind = \"prepare\"\ndata = \"\"".to_owned(), "`job.data` is \"\""),
            ("[job]\nkind = \"prepare\"\ndata = \"s3://me:hunter2@b/a\"".to_owned(), "`job.data` is s3://b/a and more, but a URL"),
            ("[job]\nkind = \"dream\"\ndata = \"d\"".to_owned(), "line 2, column 8: unknown variant `dream`"),
            ("[job]\nkind = \"embed\"".to_owned(), "missing field `data`"),
            (format!("prepare = 3\n{job}"), "invalid type: integer `3`"),
        ] {
            let error = parse(&text, &[]).unwrap_err().to_string();
            assert!(error.contains(words) && error.starts_with("job.toml: "), "{text}: {error}");
        }
    }
}
