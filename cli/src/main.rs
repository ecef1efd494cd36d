//! `ella`: the one command people type. Each subcommand has its own module; this file only tells them apart.

mod audit;
mod caption;
mod certs;
mod chaos;
mod children;
mod claims;
mod doctor;
mod dpg;
mod drain;
mod embed;
mod export;
mod forward;
mod gpus;
mod init_base;
mod inspect;
mod jobs;
mod k8s;
mod lora;
mod metrics;
mod plan;
mod prepare;
mod report;
mod run;
mod sample;
mod sampling;
mod scenes;
mod status;
mod top;
mod train;
mod ui;
mod verify;
mod whole;
mod why;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use ui::{Fail, Out};

/// Train ELLA connectors: a frozen diffusion model learns to follow long prompts through a large language model.
///
/// Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 preempted and resumable, 4 do not retry.
#[derive(Debug, Parser)]
#[command(name = "ella", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print the result as one JSON object on stdout, and nothing else there
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Render the built-in data set: scenes with dense captions whose truth is known, as WebDataset tars
    Scenes(scenes::Scenes),
    /// Turn captioned pictures into a prepared data set
    Prepare(Box<prepare::Prepare>),
    /// Store the text encoder's features of every caption
    Embed(embed::Embed),
    /// Have a multimodal model describe a data set's pictures, as a new column of captions
    Caption(caption::Caption),
    /// Read every byte of a data set against its records, and make damaged files anew
    Verify(verify::Verify),
    /// Reckon what a run will store, read and cost, before anything is rented
    Plan(plan::Plan),
    /// Say what this machine has to train with, how fast it is, and what is wrong with it
    Doctor(doctor::Doctor),
    /// Train a connector here, or resume: starts a coordinator and its workers
    Train(train::Train),
    /// Say what a run is doing, or what became of it
    Status(status::Status),
    /// Watch a run or job in the terminal: curves, ranks and what they wait for, events
    Top(top::Top),
    /// Ask one worker of a run to leave; the others go on
    Drain(drain::Drain),
    /// Prove from a run's folder that its commits are whole and that every sample was used exactly once
    Audit(audit::Audit),
    /// Make a CA of your own and certificates for a coordinator and those that speak to it
    Certs(certs::Certs),
    /// Try a run under faults, with processes of this machine, and say whether what must hold did
    Chaos(chaos::Command),
    /// Say where the time of a run's steps goes, and who waits for whom
    Why(why::Why),
    /// Draw pictures from prompts
    Sample(Box<sample::Sample>),
    /// Draw, ask and score DPG-Bench: how well pictures follow dense prompts
    Dpg(dpg::Dpg),
    /// Measure the paper's claims in the miniature: trains connectors on its base, draws and scores pictures whose content is known
    Claims(claims::Claims),
    /// Take the newest commit's connector out of a run, in the official key layout
    Export(export::Export),
    /// Run one network on tensors from a file
    Forward(forward::Forward),
    /// Say what a model's folder or file is, and whether it can be used
    Inspect(inspect::Inspect),
    /// Make a run's or job's manifests for a Kubernetes cluster, and handle it there
    K8s(k8s::K8s),
    /// Write random models to try things on
    InitBase(init_base::InitBase),
    /// Write what a run measured as a table (Parquet, CSV, JSON lines), or for TensorBoard
    Metrics(metrics::Metrics),
    /// Show a run on one self-contained HTML page
    Report(report::Report),
}

fn main() -> ExitCode {
    // SAFETY: no thread has been started yet.
    unsafe { ella_worker::device::set_environment() };
    if let Some(fail) = no_text(std::env::args_os().skip(1)) {
        return ExitCode::from(before_parsing().fail(&fail));
    }
    let parsed = numbers(Cli::command()).try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(refused(&error)),
    };
    log_to_stderr();
    let out = Out { json: cli.json };
    let result = match &cli.command {
        Command::Scenes(command) => command.run(out),
        Command::Prepare(command) => command.run(out),
        Command::Embed(command) => command.run(out),
        Command::Caption(command) => command.run(out),
        Command::Verify(command) => command.run(out),
        Command::Plan(command) => command.run(out),
        Command::Doctor(command) => command.run(out),
        Command::Train(command) => command.run(out),
        Command::Status(command) => command.run(out),
        Command::Top(command) => command.run(out),
        Command::Drain(command) => command.run(out),
        Command::Audit(command) => command.run(out),
        Command::Certs(command) => command.run(out),
        Command::Chaos(command) => command.run(out),
        Command::Why(command) => command.run(out),
        Command::Sample(command) => command.run(out),
        Command::Dpg(command) => command.run(out),
        Command::Claims(command) => command.run(out),
        Command::Export(command) => command.run(out),
        Command::Forward(command) => command.run(out),
        Command::Inspect(command) => command.run(out),
        Command::K8s(command) => command.run(out),
        Command::InitBase(command) => command.run(out),
        Command::Metrics(command) => command.run(out),
        Command::Report(command) => command.run(out),
    };
    ella_worker::leave(result.unwrap_or_else(|fail| out.fail(&fail)))
}

/// Has every option take a negative number, for its own rule to name it: else -1 is told to be an unknown option.
fn numbers(command: clap::Command) -> clap::Command {
    let takes = |option: clap::Arg| if option.get_action().takes_values() { option.allow_negative_numbers(true) } else { option };
    command.mut_args(takes).mut_subcommands(numbers)
}

/// Help is help; anything else is bad usage, said in one line.
fn refused(error: &clap::Error) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ui::DONE;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ui::USAGE;
    }
    let text = error.to_string();
    let body = text.split("\n\nUsage:").next().unwrap_or_default().split("\n\nFor more information").next().unwrap_or_default();
    before_parsing().fail(&Fail::usage(format_args!("{}; see --help", ui::one_line(&worded(body)))))
}

/// How results are given where the arguments could not be parsed.
fn before_parsing() -> Out {
    Out { json: std::env::args_os().any(|argument| argument == "--json") }
}

/// The first argument that is not UTF-8, if there is one: stores' names and results are text, and neither would have it.
fn no_text(mut arguments: impl Iterator<Item = OsString>) -> Option<Fail> {
    let odd = arguments.find(|argument| argument.to_str().is_none())?;
    Some(Fail::usage(format_args!("{odd:?}: an argument must be UTF-8; rename the file or folder, or name another")))
}

/// A parser's words as people would say them.
fn worded(text: &str) -> String {
    text.trim_start_matches("error: ").replace("invalid digit found in string", "expected a whole number of 0 or more")
}

/// What libraries have to say, such as retries; `ELLA_LOG` asks for more. What a coordinator in this process logs, its status tells.
fn log_to_stderr() {
    let (filter, misunderstood) = ella_coordinator::logs::wanted("warn,ella_coordinator=off");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    if let Some(why) = misunderstood {
        ui::note(why);
    }
}

/// The runtime that stores are read in.
fn runtime() -> Result<tokio::runtime::Runtime, Fail> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Fail::failed(format_args!("the async runtime cannot be started ({error})")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn an_argument_that_is_no_text_is_bad_usage() {
        let typed = |last: &[u8]| [b"ella".to_vec(), "größe".into(), last.to_vec()].map(OsString::from_vec).into_iter();
        let fail = no_text(typed(b"run\xff/r")).unwrap();
        assert!(fail.code == ui::USAGE && fail.message.starts_with(r#""run\xFF/r": an argument must be UTF-8"#), "{}", fail.message);
        assert!(no_text(typed(b"run")).is_none());
    }
}
