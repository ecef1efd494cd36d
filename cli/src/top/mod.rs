//! `ella top`: the dashboard in a terminal. A run's coordinator is asked while there is one, and the run's folder is read for what was before.
//!
//! - [`source`]: where it comes from.
//! - [`snapshot`]: what is shown, as of one moment; also as JSON and as plain text.
//! - [`draw`]: how it looks on a terminal.
//! - [`screen`]: the terminal, and its keys.

mod draw;
mod screen;
mod snapshot;
mod source;

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use source::Source;

use crate::status::Asked;
use crate::ui::{DONE, Fail, Out};

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// A run's folder (path or URL), or the address of a run's or job's coordinator, http://HOST:PORT
    #[arg(value_name = "RUN|URL", required_unless_present = "coordinator")]
    what: Option<String>,
    #[command(flatten)]
    asked: Asked,
    /// Print what there is now, and end: what happens anyway where there is no terminal
    #[arg(long)]
    once: bool,
    /// Look again so often
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
}

impl Top {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        if !(0.1..=3600.0).contains(&self.every) {
            return Err(Fail::usage(format_args!("--every {}: must be from 0.1 to 3600 seconds", self.every)));
        }
        let runtime = crate::runtime()?;
        let mut source = runtime.block_on(Source::open(self.what.as_deref(), &self.asked))?;
        let first = runtime.block_on(source.look())?;
        // A terminal that only takes lines says so by its name.
        let dumb = std::env::var_os("TERM").is_some_and(|name| name == "dumb");
        if self.once || out.json || dumb || !std::io::stdout().is_terminal() {
            out.result(&first, || snapshot::text(&first));
            return Ok(DONE);
        }
        screen::show(&runtime, source, first, Duration::from_secs_f64(self.every))?;
        Ok(DONE)
    }
}
