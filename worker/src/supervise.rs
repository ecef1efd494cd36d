//! A second process that watches the one that works: it passes signals on, and ends it if nothing in it moves any more, as in a device call that
//! never returns while all threads wait for it. Containers may start it as their first process.
//!
//! It is forked before anything is loaded, so it costs next to nothing, and needs none of what may hang.

use ella_proto::exit::Exit;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// Signals that are passed on.
const PASSED_ON: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// How often the watched process says that it lives.
const PULSE: Duration = Duration::from_secs(1);

/// What a process is after [`fork`].
#[derive(Debug)]
pub enum Side {
    /// It works, and says so by this.
    Worker(Pulse),
    /// It has watched the other to its end: with this exit code.
    Supervisor(u8),
}

/// Says that this process lives, as long as it is written to.
#[derive(Debug)]
pub struct Pulse(OwnedFd);

impl Pulse {
    /// Says so again and again, from within the runtime whose life it is about.
    pub async fn beat(self) {
        let mut file = File::from(self.0);
        let mut ticks = tokio::time::interval(PULSE);
        loop {
            ticks.tick().await;
            // A full pipe has been said enough to; without a supervisor this process ends by the kernel's hand.
            let _ = io::Write::write(&mut file, &[0]);
        }
    }
}

/// Splits this process in two. The supervisor's half returns when the worker's has ended, of itself or after `patience` without a pulse.
///
/// # Errors
/// What the system refuses.
///
/// # Safety
/// No other thread may run.
pub unsafe fn fork(patience: Duration) -> io::Result<Side> {
    let (ours, theirs) = pipe()?;
    let signals = block()?;
    let parent = std::process::id();
    // SAFETY: the caller's: this is the only thread, so the child is as whole as the parent.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            unblock(&signals)?;
            die_with(parent)?;
            Ok(Side::Worker(Pulse(theirs)))
        }
        child => {
            drop(theirs);
            Ok(Side::Supervisor(watch(child, File::from(ours), &signals, patience)))
        }
    }
}

/// Both ends of a pipe, of which neither ever blocks.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: two numbers are written, which are files of this process alone from then on.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// From here on these signals wait until they are asked for.
fn block() -> io::Result<libc::sigset_t> {
    // SAFETY: the set is a plain value that these calls fill in or read.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in PASSED_ON.iter().chain(&[libc::SIGCHLD]) {
            libc::sigaddset(&raw mut signals, *signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()))?;
        Ok(signals)
    }
}

fn unblock(signals: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: reads the set.
    check(unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, signals, std::ptr::null_mut()) })
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks the kernel to kill this process when its parent dies, which may already have happened.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: both calls take or give numbers.
    let now = unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        libc::getppid()
    };
    if now as u32 == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// Watches the worker to its end, and says with which code.
fn watch(child: i32, mut pulse: File, signals: &libc::sigset_t, patience: Duration) -> u8 {
    let (mut silence, mut bytes, mut stuck) = (Silence::from(Instant::now()), [0; 64], false);
    loop {
        if let Some(status) = ended(child) {
            let (code, told) = verdict(status);
            // Why one that was stuck has ended is told already.
            if stuck {
                return Exit::Failed.code();
            }
            told.iter().for_each(|told| eprintln!("ERROR {told}"));
            return code;
        }
        let heard = matches!(pulse.read(&mut bytes), Ok(1..));
        if silence.look(Instant::now(), heard) >= patience {
            eprintln!("ERROR the worker process {child} has not moved for {} s and is ended; start it again", patience.as_secs());
            kill(child, libc::SIGKILL);
            stuck = true;
            silence = Silence::from(Instant::now());
        }
        let signal = next_signal(signals, PULSE);
        if PASSED_ON.contains(&signal) {
            kill(child, signal);
        }
    }
}

/// How long nothing has been heard of the worker, by one who looks once in a [`PULSE`]. No more than that is counted between two looks: while this
/// process was stopped or asleep, so was the other.
struct Silence {
    looked: Instant,
    lasts: Duration,
}

impl Silence {
    fn from(now: Instant) -> Self {
        Self { looked: now, lasts: Duration::ZERO }
    }

    fn look(&mut self, now: Instant, heard: bool) -> Duration {
        let since = now.saturating_duration_since(self.looked).min(PULSE);
        *self = Self { looked: now, lasts: if heard { Duration::ZERO } else { self.lasts + since } };
        self.lasts
    }
}

/// Its status, if it has ended. Other children, which the first process of a container inherits, are laid to rest too.
fn ended(child: i32) -> Option<i32> {
    loop {
        let mut status = 0;
        // SAFETY: writes one number.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
            found if found == child => return Some(status),
            1.. => {}
            // None has ended; or there is none at all, which cannot be.
            0 => return None,
            _ => return (io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD)).then_some(1 << 8),
        }
    }
}

/// The next signal within `patience`; -1 if none comes.
fn next_signal(signals: &libc::sigset_t, patience: Duration) -> i32 {
    let patience = libc::timespec { tv_sec: patience.as_secs() as i64, tv_nsec: 0 };
    // SAFETY: reads two plain values.
    unsafe { libc::sigtimedwait(signals, std::ptr::null_mut(), &raw const patience) }
}

fn kill(child: i32, signal: i32) {
    // SAFETY: takes numbers; the child has not been waited for, so its number is still its own.
    unsafe { libc::kill(child, signal) };
}

/// The worker's exit code; of one that a signal has ended, what a shell would show, and words, as it could say nothing itself.
fn verdict(status: i32) -> (u8, Option<String>) {
    if libc::WIFEXITED(status) {
        return (u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(Exit::Failed.code()), None);
    }
    let signal = libc::WTERMSIG(status);
    let what = match signal {
        libc::SIGKILL => "SIGKILL: somebody's kill -9, or the system's for its memory, which dmesg tells",
        libc::SIGTERM => "SIGTERM, before it could leave in good order",
        libc::SIGINT => "SIGINT, before it could leave in good order",
        libc::SIGHUP => "SIGHUP, before it could leave in good order",
        libc::SIGSEGV => "SIGSEGV: it crashed",
        libc::SIGBUS => "SIGBUS: it crashed, or a file that it had mapped was cut, or its disk or /dev/shm is full",
        libc::SIGILL => "SIGILL: this processor lacks an instruction that it was built with",
        libc::SIGABRT => "SIGABRT: it gave itself up; look at the lines before",
        libc::SIGFPE => "SIGFPE: it crashed",
        _ => "nothing more is known",
    };
    (u8::try_from(128 + signal).unwrap_or(Exit::Failed.code()), Some(format!("the worker was ended by signal {signal} ({what})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both are stopped (Ctrl-Z, a container that is paused), and go on: the other one has had no time to say so. Stopped alone, it is silent.
    #[test]
    fn the_time_in_which_the_supervisor_did_not_run_is_no_silence() {
        let begin = Instant::now();
        let mut silence = Silence::from(begin);
        let mut silent = |seconds, heard| silence.look(begin + Duration::from_secs(seconds), heard).as_secs();
        assert_eq!([silent(1, true), silent(2, false), silent(3, false)], [0, 1, 2]);
        assert_eq!([silent(3_000, false), silent(3_001, true)], [3, 0]);
        assert_eq!((3_002..=3_060).map(|second| silent(second, false)).last(), Some(59));
    }

    #[test]
    fn a_worker_that_a_signal_ended_has_its_number_told() {
        let (code, told) = verdict(libc::SIGKILL);
        assert!(told.as_deref().is_some_and(|told| told.starts_with("the worker was ended by signal 9 (SIGKILL")), "{told:?}");
        assert_eq!((code, verdict(libc::SIGSEGV).0, verdict(34).0), (137, 139, 162));
        // What it says itself, it has said itself.
        assert_eq!([0, 3, 4].map(|code| verdict(code << 8)), [(0, None), (3, None), (4, None)]);
    }
}
