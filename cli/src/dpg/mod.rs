//! `ella dpg`: DPG-Bench (paper §3), and other sets of dense prompts in its form.

mod generate;

use clap::{Args, Subcommand};

use crate::ui::{Fail, Out};

#[derive(Debug, Args)]
pub(crate) struct Dpg {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draw every prompt four times, as the 2×2 grids that the official scorer reads
    Generate(Box<generate::Generate>),
}

impl Dpg {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        match &self.command {
            Command::Generate(command) => command.run(out),
        }
    }
}
