//! How a process ended, as scripts, Kubernetes and `ella train` read it: one definition for all three binaries, and for the reference.

/// An exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done: there is nothing left to do. A worker that was told that its run is over has this code too.
    Done = 0,
    /// Failed: starting again may help, and `ella train` does that for a worker. So ends, too, a check that found what it looks for
    /// (`ella audit`, `ella verify`, `ella chaos`, `ella doctor`, `ella inspect MODEL`).
    Failed = 1,
    /// Bad usage or config: what the command line or the config says cannot be, whatever is there. Nothing was done; correct the command or
    /// the config that the message names.
    Usage = 2,
    /// Preempted: it was told to leave (SIGTERM, `ella drain`), and left in good order. The same command goes on from there.
    Preempted = 3,
    /// Failed in a way that starting again would repeat: what is named (a model, a data set, a run, a source) is not there, or cannot be used.
    /// A person has to do what the message says.
    NoRetry = 4,
}

impl Exit {
    /// All, by code.
    pub const ALL: [Self; 5] = [Self::Done, Self::Failed, Self::Usage, Self::Preempted, Self::NoRetry];

    /// The code of an error, by what its type says of it: the same mistake ends every command alike.
    pub const fn of(is_usage: bool, is_permanent: bool) -> Self {
        match (is_usage, is_permanent) {
            (true, _) => Self::Usage,
            (false, true) => Self::NoRetry,
            (false, false) => Self::Failed,
        }
    }

    /// The number that the system gets.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

#[cfg(test)]
mod tests {
    use super::Exit;

    /// Manifests and scripts are written against these numbers.
    #[test]
    fn the_codes_are_those_that_the_world_knows() {
        assert_eq!(Exit::ALL.map(Exit::code), [0, 1, 2, 3, 4]);
    }
}
