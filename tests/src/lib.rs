//! What the cross-process tests and benchmarks share: a small world to train in, and the commands that people type.
//!
//! The binaries are those that `make build` leaves beside the test's own.

pub mod s3;

use anyhow::{Context as _, Result, bail, ensure};
use ella_store::{Body, Commit, RunLog, Store};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a command may take, at the very most.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Files by name.
pub type Files = Vec<(String, Vec<u8>)>;

/// Numbers that look like chance, and are the same for the same seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, from 0 to below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound.max(1)
    }

    /// Others, that are as much the seed's.
    pub fn split(&mut self) -> Self {
        Self((self.below(1 << 31) << 31) | self.below(1 << 31))
    }
}

/// A data set, its features, and models to train on, in a folder that goes away.
#[derive(Debug)]
pub struct World {
    folder: tempfile::TempDir,
}

impl World {
    /// Makes one with so many scenes, by the commands that people type.
    pub fn new(scenes: usize) -> Result<Self> {
        let world = Self { folder: tempfile::tempdir()? };
        let path = |name: &str| world.path(name).display().to_string();
        let (tars, data, models, text) = (path("scenes"), path("data"), path("models"), path("models/text"));
        let count = scenes.to_string();
        ella(&["scenes", "--out", &tars, "--count", &count, "--seed", "1", "--size", "64", "--per-tar", "32"])?;
        ella(&["prepare", &tars, "--out", &data, "--resolution", "64"])?;
        ella(&["init-base", "--preset", "nano", "--seed", "1", "--captions", &data, "--out", &models])?;
        ella(&["embed", &data, "--text", &text, "--max-tokens", "64"])?;
        Ok(world)
    }

    /// A path in the world's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes `NAME.toml`: a run of that name with the world's data and models, 8 lanes of 2, and these further lines.
    pub fn run(&self, name: &str, steps: u64, further: &str) -> Result<Run> {
        let at = |what: &str| self.path(what).display().to_string();
        let text = format!(
            "[run]\noutput = \"{output}\"\nseed = 3\n[base]\nmodel = \"{base}\"\n[text]\nmodel = \"{text}\"\nmax_tokens = 64\n\
             [data]\npath = \"{data}\"\nwindow = 2\n[connector]\nlayers = 1\nlatents = 8\n\
             [train]\nsteps = {steps}\nglobal_batch = 16\nmicro_batch = 2\neval_every = 0\nema_decay = 0.9\n\
             [train.optimizer]\nlr = 1e-3\n{further}\n",
            output = at(name),
            base = at("models/base"),
            text = at("models/text"),
            data = at("data"),
        );
        let config = self.path(&format!("{name}.toml"));
        std::fs::write(&config, text)?;
        Ok(Run { config, output: self.path(name) })
    }
}

/// A run's config file and its folder.
#[derive(Clone, Debug)]
pub struct Run {
    /// `RUN.toml`.
    pub config: PathBuf,
    /// The run folder.
    pub output: PathBuf,
}

impl Run {
    /// The arguments of `ella train` for this run.
    pub fn train(&self, set: &[&str]) -> Vec<String> {
        let mut arguments = vec!["train".to_owned(), self.config.display().to_string()];
        for item in set {
            arguments.extend(["--set".to_owned(), (*item).to_owned()]);
        }
        arguments
    }

    /// All commits in the run's log, retired ones too.
    pub fn commits(&self) -> Result<Vec<Commit>> {
        let store = Store::open(&self.output.display().to_string())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let records = runtime.block_on(RunLog::read(&store))?;
        let commit = |body| if let Body::Commit(commit) = body { Some(commit) } else { None };
        Ok(records.into_iter().filter_map(|r| commit(r.body)).collect())
    }

    /// The newest commit.
    pub fn last_commit(&self) -> Result<Commit> {
        self.commits()?.pop().context("the run has no commit")
    }

    /// The bytes of the newest commit's files, by name.
    pub fn last_files(&self) -> Result<Files> {
        let commit = self.last_commit()?;
        let file = |name: &str| std::fs::read(self.output.join(&commit.folder).join(name));
        commit.parts.iter().map(|part| Ok((part.name.clone(), file(&part.name)?))).collect()
    }
}

/// One of the project's binaries.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().take(3).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not beside {}: run `make build` first", own.display()))
}

/// Runs `ella` with these arguments and returns its output, whatever its exit code.
pub fn try_ella<S: AsRef<str>>(arguments: &[S]) -> Result<Output> {
    wait(spawn(arguments)?)
}

/// Waits for a process that leads its group, and returns its output.
pub fn wait(child: Child) -> Result<Output> {
    let id = child.id();
    let (done, waiting) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || done.send(child.wait_with_output()));
    let output = waiting.recv_timeout(PATIENCE);
    if output.is_err() {
        kill_group(id);
    }
    let _ = waiter.join();
    Ok(output.with_context(|| format!("the command did not end within {} s", PATIENCE.as_secs()))??)
}

/// Runs `ella` with these arguments, which must succeed, and returns what it printed.
pub fn ella<S: AsRef<str>>(arguments: &[S]) -> Result<String> {
    let output = try_ella(arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ella {} ended with {}:\n{said}",
        arguments.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" "),
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Starts `ella` in a process group of its own.
pub fn spawn<S: AsRef<str>>(arguments: &[S]) -> Result<Child> {
    let mut command = Command::new(binary("ella")?);
    command.args(arguments.iter().map(AsRef::as_ref));
    lead(command)
}

/// Starts a command in a process group of its own, its output piped.
pub fn lead(mut command: Command) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.process_group(0).spawn()?)
}

/// SIGKILL to a whole process group.
pub fn kill_group(leader: u32) {
    signal_group(leader, libc::SIGKILL);
}

/// A signal to one process.
pub fn signal(process: u32, signal: i32) {
    // SAFETY: kill has no memory effects here; the process is a child of this one.
    unsafe { libc::kill(process as i32, signal) };
}

/// A signal to a whole process group.
pub fn signal_group(leader: u32, signal: i32) {
    // SAFETY: kill has no memory effects here; the group is one that this process started.
    unsafe { libc::kill(-(leader as i32), signal) };
}

/// Processes of a program whose parent is this one.
pub fn children_of(parent: u32, program: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // The kernel keeps 15 letters of a name.
    let name = format!("({})", &program[..program.len().min(15)]);
    let is_child = |id: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        // After the name in brackets: state, then the parent.
        let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
        after.split(' ').nth(1) == Some(&parent.to_string()) && stat.contains(&name)
    };
    ids.filter(is_child).collect()
}

/// Processes that end with their owner, however that ends.
#[derive(Debug)]
pub struct Processes(pub Vec<Child>);

impl Processes {
    /// Fails if one of them has ended, and says how.
    pub fn all_run(&mut self) -> Result<()> {
        for child in &mut self.0 {
            if let Some(status) = child.try_wait()? {
                bail!("process {} has ended before its time: {status}", child.id());
            }
        }
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            signal(child.id(), libc::SIGCONT);
            // Gone already is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts `ella-coordinator` with these further arguments. Gives it with its gRPC and its HTTP address.
pub fn coordinator(config: &Path, further: &[&str]) -> Result<(Child, String, Status)> {
    let mut command = Command::new(binary("ella-coordinator")?);
    let mut child = command.arg(config).args(further).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
    let addresses: Value = serde_json::from_str(&line).context("the coordinator did not say where it listens")?;
    let address = |of: &str| Ok::<_, anyhow::Error>(addresses[of].as_str().with_context(|| format!("no {of} address"))?.to_owned());
    Ok((child, address("grpc")?, Status(address("http")?)))
}

/// A coordinator's status page, by its address.
#[derive(Debug)]
pub struct Status(pub String);

impl Status {
    fn get(&self) -> Result<Value> {
        let mut stream = TcpStream::connect(&self.0)?;
        write!(stream, "GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.find('{').context("no JSON")?;
        Ok(serde_json::from_str(answer[body..].trim_end_matches(|c| c != '}'))?)
    }

    /// Waits until so many workers have taken two steps together; then the process ids of the ranks.
    pub fn settled(&self, workers: usize) -> Result<Vec<u32>> {
        let (begin, mut first) = (Instant::now(), None);
        loop {
            ensure!(begin.elapsed() < PATIENCE, "{workers} workers did not train within {} s", PATIENCE.as_secs());
            std::thread::sleep(Duration::from_millis(50));
            let Ok(status) = self.get() else { continue };
            let ranks: Vec<&Value> =
                status["workers"].as_array().into_iter().flatten().filter(|worker| !worker["rank"].is_null()).collect();
            if status["phase"] != "training" || ranks.len() != workers {
                first = None;
                continue;
            }
            let step = status["step"].as_u64().context("no step")?;
            if step >= *first.get_or_insert(step) + 2 {
                return ranks.iter().map(|worker| Ok(worker["pid"].as_u64().context("no pid")? as u32)).collect();
            }
        }
    }
}

/// The lines of a run's journal (`metrics`, `events`, `timing`), in order.
pub fn journal(run: &Path, folder: &str) -> Result<Vec<Value>> {
    let mut files: Vec<PathBuf> = run.join(folder).read_dir()?.map(|file| Ok(file?.path())).collect::<Result<_>>()?;
    files.sort();
    let mut lines = Vec::new();
    for file in files {
        for line in std::fs::read_to_string(file)?.lines() {
            lines.push(serde_json::from_str(line)?);
        }
    }
    Ok(lines)
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Polls until `holds` says so, or fails with `what`.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !holds() {
        if begin.elapsed() > PATIENCE {
            bail!("{what}: not within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether a file exists.
pub fn exists(path: impl AsRef<Path>) -> bool {
    path.as_ref().exists()
}
