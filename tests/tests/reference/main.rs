//! What the docs say of the code is made of the code: config keys, exit codes, variables, commands, files. In every page of `docs/`, what stands
//! between `<!-- reference: NAME ... -->` and `<!-- end -->` is made here; `make reference` (`ELLA_WRITE_DOCS=1`) writes it anew. And every whole
//! config that a page or the README shows is one that ella takes.

#![allow(clippy::unwrap_used)] // helpers of tests may panic as tests do

mod commands;
mod keys;
mod source;

use ella_proto::config::{JobConfig, RunConfig};
use source::Source;
use std::path::{Path, PathBuf};

const OPEN: &str = "<!-- reference: ";
const CLOSE: &str = "<!-- end -->";

/// A path in the repository.
fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// All pages below `docs/`.
fn pages() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut folders = vec![at("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// What stands in a block of this name.
fn block(name: &str) -> String {
    let words: Vec<&str> = name.split(' ').collect();
    match words[..] {
        ["config"] => keys::run(),
        ["jobs"] => keys::jobs(),
        ["exit-codes"] => keys::exit_codes(),
        ["commands"] => commands::help(),
        ["variables"] => commands::variables(),
        ["fields", file, name] => keys::fields(&Source::read(&[file]), name),
        ["variants", file, name] => keys::variants(&Source::read(&[file]), name),
        _ => panic!("nothing makes a block `{name}`"),
    }
}

/// A page with all its blocks made anew.
fn renewed(path: &Path, page: &str) -> String {
    let mut done = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once(OPEN) {
        let (name, after) = after.split_once(" -->\n").unwrap_or_else(|| panic!("{}: `{OPEN}` without its end", path.display()));
        let (_, after) = after.split_once(CLOSE).unwrap_or_else(|| panic!("{}: block `{name}` without {CLOSE}", path.display()));
        done.extend([before, OPEN, name, " -->\n\n", block(name).trim_end(), "\n\n", CLOSE]);
        rest = after;
    }
    done + rest
}

#[test]
fn the_reference_is_what_the_code_says() {
    let mut stale = Vec::new();
    for path in pages() {
        let page = std::fs::read_to_string(&path).unwrap();
        let wanted = renewed(&path, &page);
        if page == wanted {
            continue;
        }
        if std::env::var_os("ELLA_WRITE_DOCS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        } else {
            let differs = page.lines().zip(wanted.lines()).enumerate().find(|(_, (is, should))| is != should);
            let (line, (is, should)) = differs.unwrap_or((page.lines().count(), ("", "(more)")));
            stale.push(format!("{}:{}: is\n  {is}\nshould be\n  {should}", path.display(), line + 1));
        }
    }
    assert!(stale.is_empty(), "the docs are not what the code says; `make reference` writes them anew:\n{}", stale.join("\n"));
}

/// The TOML blocks of a page.
fn toml_blocks(page: &str) -> impl Iterator<Item = &str> {
    page.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next())
}

#[test]
fn every_config_that_the_docs_show_is_taken() {
    let mut taken = 0;
    for path in pages().into_iter().chain([at("README.md")]) {
        for text in toml_blocks(&std::fs::read_to_string(&path).unwrap()) {
            let origin = path.display().to_string();
            // Parts of a config have no [run].
            if text.contains("[run]") {
                RunConfig::parse(text, &origin, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
                taken += 1;
            } else if text.contains("[job]") {
                JobConfig::parse(text, &origin, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
                taken += 1;
            }
        }
    }
    assert!(taken > 1, "the docs show no config any more, or this test does not find it");
}

#[test]
fn every_fused_operator_is_named() {
    let variables = commands::variables();
    // `timed` is how some of them are chosen.
    for operator in Source::read(&["cuda/src/fused.rs"]).get("Fused").members.iter().filter(|member| member.name != "timed") {
        assert!(variables.contains(&format!("`{}`", operator.name)), "{}", operator.name);
    }
}

#[test]
fn only_what_stands_in_blocks_is_made() {
    let page = "# Title\n\n<!-- reference: exit-codes -->\nold\n<!-- end -->\n\nafter\n";
    let new = renewed(Path::new("x.md"), page);
    assert!(
        new.starts_with("# Title\n\n<!-- reference: exit-codes -->\n\n| code |") && new.ends_with("\n\n<!-- end -->\n\nafter\n"),
        "{new}"
    );
    assert_eq!(renewed(Path::new("x.md"), &new), new);
}
