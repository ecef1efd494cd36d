//! The help of every command, as the binaries print it, and the environment variables that they read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// The binaries, by what they are for.
const BINARIES: [&str; 3] = ["ella", "ella-coordinator", "ella-worker"];
/// Variables that no command's help names, and what they do.
const OTHERS: [(&str, &str); 5] = [
    (
        "ELLA_FUSED",
        "Which fused operators take the place of libtorch's: `all`, `none`, names beside commas (`norm`, `conv`, `resize`, `gate`, \
         `attention`, `cross`, `pixels`, `update`), or names with a minus before each, which are left out of the usual ones; unset: those that are \
         fastest on the device",
    ),
    ("ELLA_GRAPHS", "`on` or `off`: whether lanes are recorded as CUDA graphs; left out: `on`"),
    (
        "ELLA_KERNEL_CACHE",
        "A folder in which a GPU's kernels are kept once they are compiled; unset: each worker compiles them when it starts, some seconds",
    ),
    (
        "ELLA_LOG",
        "What is logged: a level, and levels of modules, as in `info,ella_worker::train=debug`; left out: `info`, and for `ella` itself `warn`",
    ),
    (
        "ELLA_STORE_FAULTS",
        "Has operations on stores fail by chance, to try what becomes of a run: `seed=7,rate=0.05`. See [try it under faults](../faults.md)",
    ),
];
/// Variables of tests alone, which stand in the sources of the programs.
const OF_TESTS: [&str; 3] = ["ELLA_SEED", "ELLA_SCHEDULES", "ELLA_REDUCE_TEST_PARENT"];

/// What a binary prints for these arguments, whatever variables are set here.
fn printed(binary: &str, arguments: &[String]) -> String {
    let mut command = Command::new(ella_tests::binary(binary).unwrap());
    command.args(arguments).arg("--help");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ELLA_")) {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{binary} {arguments:?} --help: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let list = help.split("\nCommands:\n").nth(1).unwrap_or_default().lines();
    let names = list.take_while(|line| line.starts_with("  ")).filter(|line| !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// A command's help and those of its own commands, in the order in which they are listed.
fn collect(binary: &str, path: &[String], into: &mut Vec<(String, String)>) {
    let help = printed(binary, path);
    let below = listed(&help);
    into.push(([&[binary.to_owned()], path].concat().join(" "), help));
    for name in below {
        collect(binary, &[path, &[name]].concat(), into);
    }
}

fn all() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for binary in BINARIES {
        collect(binary, &[], &mut found);
    }
    found
}

/// Every command's help.
pub(crate) fn help() -> String {
    let mut text = String::new();
    for (name, help) in all() {
        let lines = help.lines().map(|line| format!("{}\n", line.trim_end())).collect::<String>();
        let _ = write!(text, "## `{name}`\n\n```text\n{}\n```\n\n", lines.trim_end());
    }
    text
}

/// Every variable that the programs read: by the option whose place it takes, or by itself.
pub(crate) fn variables() -> String {
    let options = by_option();
    let known: BTreeSet<&str> = options.keys().map(String::as_str).chain(OTHERS.map(|(name, _)| name)).chain(OF_TESTS).collect();
    let read = in_sources();
    let unknown: Vec<&String> = read.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?} are read, and the reference knows nothing of them: see {}", file!());
    let gone: Vec<&str> = OTHERS.iter().map(|(name, _)| *name).filter(|name| !read.contains(*name)).collect();
    assert!(gone.is_empty(), "nothing reads {gone:?} any more: see {}", file!());
    let mut rows: BTreeMap<String, String> = OTHERS.map(|(name, what)| (name.to_owned(), what.to_owned())).into();
    rows.extend(options.into_iter().map(|(name, options)| (name, options.into_iter().collect::<Vec<_>>().join(", "))));
    let rows: String = rows.iter().map(|(name, what)| format!("| `{name}` | {what} |\n")).collect();
    format!("| variable | |\n|---|---|\n{rows}")
}

/// Variables that options take their values from, and those options.
fn by_option() -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (command, help) in all() {
        let binary = command.split(' ').next().unwrap_or_default();
        let mut option = "";
        for line in help.lines() {
            if let Some(at) = line.find("--").filter(|at| line[..*at].trim().len() <= 3) {
                option = line[at..].split([' ', ',']).next().unwrap_or_default();
            }
            if let Some(rest) = line.split("[env: ").nth(1) {
                let name = rest.split(['=', ']']).next().unwrap_or_default();
                found.entry(name.to_owned()).or_default().insert(format!("`{option}` of `{binary}`"));
            }
        }
    }
    found
}

/// All names of ours in text of the programs' sources.
fn in_sources() -> BTreeSet<String> {
    fn walk(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.extend(text.split('"').filter(|part| is_variable(part)).map(str::to_owned));
            }
        }
    }
    let mut found = BTreeSet::new();
    for member in std::fs::read_dir(super::at("")).unwrap() {
        let folder = member.unwrap().path().join("src");
        if folder.is_dir() && !folder.starts_with(super::at("tests")) {
            walk(&folder, &mut found);
        }
    }
    found
}

fn is_variable(text: &str) -> bool {
    text.strip_prefix("ELLA_").is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
}
