//! The processes of a run on this machine: started, listened to, ended. None outlives this one.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use ella_coordinator::credentials::VARIABLES;

use crate::ui::{Fail, note};

/// Lines of each process that are kept to be shown.
const KEPT: usize = 8;
/// How long a process's last lines may take once it has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// One process.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) ended: Option<ExitStatus>,
    program: PathBuf,
    /// What it is started with again.
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    logs: Logs,
    child: Child,
    lines: Arc<Mutex<VecDeque<String>>>,
    listener: Option<JoinHandle<()>>,
}

/// Where what processes say goes, beside the last lines that are kept.
#[derive(Clone, Debug)]
pub(crate) struct Logs {
    /// A folder with a file each, if the run is on this machine.
    pub(crate) folder: Option<PathBuf>,
    /// Show every line.
    pub(crate) verbose: bool,
}

/// All processes, the coordinator first if it is ours.
#[derive(Debug, Default)]
pub(crate) struct Children {
    members: Vec<Member>,
}

/// A binary beside this one.
pub(crate) fn binary(name: &str) -> Result<PathBuf, Fail> {
    let own = std::env::current_exe().map_err(|error| Fail::failed(format_args!("the folder of this program is unknown ({error})")))?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Fail::failed(format_args!("{}: not found (expected beside this program); build it with `make build`", path.display())))
}

impl Children {
    /// Starts a process; its stdout is given back.
    pub(crate) fn start(&mut self, name: &str, program: &Path, arguments: &[String], logs: &Logs) -> Result<Option<ChildStdout>, Fail> {
        self.start_in(name, program, (arguments, &[]), logs)
    }

    /// The same, with these further variables in its environment.
    pub(crate) fn start_in(
        &mut self,
        name: &str,
        program: &Path,
        (arguments, environment): (&[String], &[(String, String)]),
        logs: &Logs,
    ) -> Result<Option<ChildStdout>, Fail> {
        let (member, stdout) = Member::start(name, program, (arguments, environment), logs)?;
        self.members.push(member);
        Ok(stdout)
    }

    /// Starts one that has ended again, in its place. Says how it had ended.
    pub(crate) async fn start_again(&mut self, at: usize) -> Result<(String, Option<ChildStdout>), Fail> {
        self.members[at].hear_out().await;
        let ended @ Member { name, program, arguments, environment, logs, .. } = &self.members[at];
        let how = ended.how();
        let (member, stdout) = Member::start(name, program, (arguments, environment), logs)?;
        self.members[at] = member;
        Ok((how, stdout))
    }

    /// What one of them is started with, should it be started again.
    pub(crate) fn arm(&mut self, at: usize, arguments: Vec<String>) {
        self.members[at].arguments = arguments;
    }

    /// What one that has ended last said was wrong, or how it ended.
    pub(crate) async fn last_words(&mut self, at: usize) -> String {
        let Some(member) = self.members.get_mut(at) else { return String::new() };
        member.hear_out().await;
        member.last_error().unwrap_or_else(|| member.ended.map_or_else(String::new, ending))
    }

    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    pub(crate) fn all_ended(&self) -> bool {
        self.members.iter().all(|member| member.ended.is_some())
    }

    /// Waits until one more process has ended, and says which. Never, if all have.
    pub(crate) async fn next_end(&mut self) -> usize {
        let running = self.members.iter_mut().enumerate().filter(|(_, member)| member.ended.is_none());
        let waits: Vec<_> = running.map(|(at, member)| Box::pin(async move { (at, member.wait().await) })).collect();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        let ((at, status), ..) = futures::future::select_all(waits).await;
        self.members[at].ended = Some(status);
        at
    }

    /// Waits until all have ended, and kills those that have not by then.
    pub(crate) async fn reap(&mut self, patience: Duration) {
        let all = async {
            while !self.all_ended() {
                self.next_end().await;
            }
        };
        if timeout(patience, all).await.is_err() {
            self.signal(libc::SIGKILL);
            while !self.all_ended() {
                self.next_end().await;
            }
        }
        for member in &mut self.members {
            member.hear_out().await;
        }
    }

    /// Sends a signal to all that run.
    pub(crate) fn signal(&self, signal: i32) {
        self.members.iter().for_each(|member| member.signal(signal));
    }

    /// Sends a signal to one of them, if it runs.
    pub(crate) fn signal_one(&self, at: usize, signal: i32) {
        if let Some(member) = self.members.get(at) {
            member.signal(signal);
        }
    }
}

impl Member {
    fn start(
        name: &str,
        program: &Path,
        (arguments, environment): (&[String], &[(String, String)]),
        logs: &Logs,
    ) -> Result<(Self, Option<ChildStdout>), Fail> {
        let mut command = Command::new(program);
        // What it shows and asks for is decided here, and said by its arguments.
        for name in VARIABLES.iter().chain(&["ELLA_ACCESS", "ELLA_TOKEN_REVIEW"]) {
            command.env_remove(name);
        }
        command.envs(environment.iter().map(|(key, value)| (key, value)));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // A group of its own: a terminal's ctrl-C comes to this process only, which passes it on once.
        command.process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid and the construction of an error
        // from a number, which does not allocate.
        unsafe { command.pre_exec(move || die_with_parent(parent)) };
        let failed = |error| Fail::failed(format_args!("{}: cannot be started ({error})", program.display()));
        let mut child = command.spawn().map_err(failed)?;
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let listener = child.stderr.take().map(|stderr| {
            let file = logs.folder.as_ref().and_then(|folder| open_log(folder, name));
            let shown = logs.verbose.then(|| name.to_owned());
            tokio::spawn(listen(stderr, Arc::clone(&lines), file, shown))
        });
        let stdout = child.stdout.take();
        let (name, program, logs) = (name.to_owned(), program.to_owned(), logs.clone());
        let (arguments, environment) = (arguments.to_vec(), environment.to_vec());
        Ok((Self { name, ended: None, program, arguments, environment, logs, child, lines, listener }, stdout))
    }

    /// What it was given beside this process's environment: whoever takes its place gets the same.
    pub(crate) fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// The system's number for it; none once it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its last lines.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// What it last logged as an error, without time, level and module, or why its arguments were refused, or what a panic said. Events, which are
    /// JSON, are the run's journal's.
    pub(crate) fn last_error(&self) -> Option<String> {
        let lines = self.last_lines();
        let said = |at: usize| {
            let line = &lines[at];
            if let Some(refused) = line.strip_prefix("error: ") {
                return Some(refused.to_owned());
            }
            if let (true, Some((_, place))) = (line.starts_with("thread '"), line.split_once(" panicked at ")) {
                return Some(format!("it panicked at {place} {}", lines.get(at + 1)?));
            }
            let message = line.split_once("ERROR ")?.1.trim();
            let message = message.strip_prefix("ella_worker: ").unwrap_or(message);
            (!message.starts_with('{')).then(|| message.to_owned())
        };
        (0..lines.len()).rev().find_map(said)
    }

    /// Its name and how it ended, in words.
    pub(crate) fn how(&self) -> String {
        let how = self.ended.map_or_else(String::new, ending);
        match self.last_error().filter(|_| self.ended.is_some_and(|status| status.code().is_some())) {
            Some(why) => format!("{}: {how} ({why})", self.name),
            None => format!("{}: {how}", self.name),
        }
    }

    /// Waits for what it said last.
    async fn hear_out(&mut self) {
        if let Some(listener) = self.listener.take() {
            // A grandchild may hold the pipe open; its words are not waited for.
            let _ = timeout(LAST_WORDS, listener).await;
        }
    }

    async fn wait(&mut self) -> ExitStatus {
        use std::os::unix::process::ExitStatusExt;
        // The system refuses only to wait for what is no child; it is over then, whatever became of it.
        self.child.wait().await.unwrap_or_else(|_| ExitStatus::from_raw(1 << 8))
    }

    fn signal(&self, signal: i32) {
        let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
        // A worker is two processes, of which the first passes on what asks it to leave; what leaves no choice is for both.
        let whom = if matches!(signal, libc::SIGTERM | libc::SIGINT) { pid } else { -pid };
        // SAFETY: kill takes plain numbers. The process has not been waited for (its id is known), so the number is still its own, and
        // that of the group which it leads.
        unsafe { libc::kill(whom, signal) };
    }
}

/// Asks the kernel to kill this process when its parent dies, which may already have happened.
fn die_with_parent(parent: u32) -> std::io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a signal number and touches no memory of ours; getppid takes nothing.
    let (set, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    if now as u32 == parent { Ok(()) } else { Err(std::io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// A log that can't be written is told of, and is no reason not to train.
fn open_log(folder: &Path, name: &str) -> Option<File> {
    let path = folder.join(format!("{name}.log"));
    let opened = std::fs::create_dir_all(folder).and_then(|()| File::options().append(true).create(true).open(&path));
    opened.map_err(|error| note(format_args!("{}: cannot be written ({error}); going on without it", path.display()))).ok()
}

async fn listen(stderr: ChildStderr, kept: Arc<Mutex<VecDeque<String>>>, mut file: Option<File>, shown: Option<String>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line).await, Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if let Some(open) = &mut file
            && writeln!(open, "{text}").is_err()
        {
            file = None;
        }
        if let Some(name) = &shown {
            note(format_args!("[{name}] {text}"));
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(text);
        drop(kept);
        line.clear();
    }
}

/// How a process ended, in words. A worker's first process has a code that stands for the signal which ended the second.
pub(crate) fn ending(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code @ 129..=192), _) => format!("ended by signal {}", code - 128),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(folder: Option<PathBuf>) -> Logs {
        Logs { folder, verbose: false }
    }

    fn shell(script: &str) -> [String; 2] {
        ["-c".to_owned(), script.to_owned()]
    }

    #[tokio::test]
    async fn lines_are_kept_and_written_and_the_error_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = Children::default();
        let script = "echo 'x INFO begun' >&2; echo '2026 ERROR the disk: is full' >&2; echo bye >&2; exit 4";
        children.start("one", Path::new("/bin/sh"), &shell(script), &logs(Some(dir.path().join("logs")))).unwrap();
        assert_eq!(children.next_end().await, 0);
        children.reap(Duration::from_secs(5)).await;
        let member = &children.members()[0];
        assert_eq!(member.ended.unwrap().code(), Some(4));
        assert_eq!(member.last_error().unwrap(), "the disk: is full");
        assert_eq!(std::fs::read_to_string(dir.path().join("logs/one.log")).unwrap().lines().count(), 3);
    }

    #[tokio::test]
    async fn a_panic_is_told_in_its_own_words() {
        let mut children = Children::default();
        let panic = "thread 'main' (7) panicked at worker/src/main.rs:9:5:\nindex out of bounds\nnote: run with RUST_BACKTRACE=1";
        let script = format!("echo '2026 ERROR one before' >&2; echo \"{panic}\" >&2; exit 101");
        children.start("one", Path::new("/bin/sh"), &shell(&script), &logs(None)).unwrap();
        children.reap(Duration::from_secs(5)).await;
        let how = children.members()[0].how();
        assert_eq!(how, "one: exit code 101 (it panicked at worker/src/main.rs:9:5: index out of bounds)");
    }

    #[tokio::test]
    async fn one_that_was_killed_is_started_again_and_its_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = Children::default();
        let once = shell("echo begun >&2; kill -9 $$");
        children.start("one", Path::new("/bin/sh"), &once, &logs(Some(dir.path().into()))).unwrap();
        assert_eq!(children.next_end().await, 0);
        children.arm(0, shell("echo begun again >&2; exit 3").to_vec());
        assert_eq!(children.start_again(0).await.unwrap().0, "one: ended by signal 9");
        assert!(!children.all_ended());
        children.reap(Duration::from_secs(5)).await;
        assert_eq!((children.members().len(), children.members()[0].ended.unwrap().code()), (1, Some(3)));
        let log = std::fs::read_to_string(dir.path().join("one.log")).unwrap();
        assert_eq!(log, "begun\nbegun again\n");
    }

    #[tokio::test]
    async fn what_is_started_again_has_the_environment_that_it_had() {
        let dir = tempfile::tempdir().unwrap();
        let (mut children, gpu) = (Children::default(), [("CUDA_VISIBLE_DEVICES".to_owned(), "3".to_owned())]);
        let script = shell("echo GPU $CUDA_VISIBLE_DEVICES >&2; kill -9 $$");
        children.start_in("one", Path::new("/bin/sh"), (&script, &gpu), &logs(Some(dir.path().into()))).unwrap();
        for _ in 0..2 {
            assert_eq!(children.next_end().await, 0);
            children.start_again(0).await.unwrap();
        }
        children.reap(Duration::from_secs(5)).await;
        assert_eq!(std::fs::read_to_string(dir.path().join("one.log")).unwrap(), "GPU 3\n".repeat(3));
        assert_eq!(children.members()[0].environment(), gpu);
    }

    #[tokio::test]
    async fn whoever_does_not_leave_is_killed() {
        let mut children = Children::default();
        let stubborn = shell("trap '' TERM; echo deaf; while true; do sleep 1; done");
        let mut said = children.start("stubborn", Path::new("/bin/sh"), &stubborn, &logs(None)).unwrap().unwrap();
        // Before that, the signal would still end it.
        tokio::io::AsyncReadExt::read_exact(&mut said, &mut [0; 5]).await.unwrap();
        children.start("quick", Path::new("/bin/sh"), &shell("exit 0"), &logs(None)).unwrap();
        assert_eq!(children.next_end().await, 1);
        children.signal(libc::SIGTERM);
        children.reap(Duration::from_millis(50)).await;
        assert!(children.all_ended());
        assert_eq!(ending(children.members()[0].ended.unwrap()), "ended by signal 9");
    }

    #[test]
    fn a_code_that_stands_for_a_signal_is_told_as_that() {
        use std::os::unix::process::ExitStatusExt as _;
        let ends = [137 << 8, 9, 4 << 8, 101 << 8].map(|raw| ending(ExitStatus::from_raw(raw)));
        assert_eq!(ends, ["ended by signal 9", "ended by signal 9", "exit code 4", "exit code 101"]);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let fail = Children::default().start("x", Path::new("/nonexistent/program"), &[], &logs(None)).unwrap_err();
        assert!(fail.message.contains("/nonexistent/program"), "{}", fail.message);
        assert!(binary("ella-nonexistent").unwrap_err().message.contains("make build"));
    }
}
