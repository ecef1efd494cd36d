//! Disks that are full or read-only: small ones in memory, mounted where only the commands under test see them.

use super::{CONNECTOR, FAILED, PERMANENT, refused, shared};
use anyhow::Result;
use ella_tests::{binary, lead, wait};
use std::fmt::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Output};

/// One thing to do on the small disk.
enum Do<'a> {
    /// Run `ella`.
    Ella(&'a [&'a str]),
    /// Mount it again with another option.
    Remount(&'a str),
}

/// Mounts a disk of that size at a folder, does all of it there, and gives what each `ella` left behind. None if the machine permits no
/// mounts.
fn on_disk(disk: &Path, size: &str, steps: &[Do]) -> Result<Option<Vec<Output>>> {
    std::fs::create_dir_all(disk)?;
    let results = disk.with_extension("results");
    std::fs::create_dir_all(&results)?;
    let result = |at: usize, what: &str| results.join(format!("{at}.{what}"));
    let quoted = |path: &Path| format!("'{}'", path.display());
    let (folder, ella) = (quoted(disk), quoted(&binary("ella")?));
    let mut script =
        format!("set -e\nmount -t tmpfs -o size={size} ella {folder}\n: >{mounted}\n", mounted = quoted(&results.join("mounted")));
    for (at, step) in steps.iter().enumerate() {
        match step {
            Do::Remount(option) => writeln!(script, "mount -o remount,{option} {folder}")?,
            Do::Ella(arguments) => {
                let arguments = arguments.iter().map(|a| format!("'{a}'")).collect::<Vec<_>>().join(" ");
                let [out, err, code] = ["out", "err", "code"].map(|what| quoted(&result(at, what)));
                writeln!(script, "code=0; {ella} {arguments} >{out} 2>{err} || code=$?; echo $code >{code}")?;
            }
        }
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    let done = match lead(command) {
        Ok(child) => wait(child)?,
        Err(error) => {
            println!("skipped: there is no `unshare` to mount a small disk with ({error})");
            return Ok(None);
        }
    };
    if !results.join("mounted").exists() {
        println!("skipped: this machine permits no mounts: {}", String::from_utf8_lossy(&done.stderr).trim());
        return Ok(None);
    }
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let output = |at: usize| -> Result<Output> {
        let code: i32 = std::fs::read_to_string(result(at, "code"))?.trim().parse()?;
        let read = |what: &str| std::fs::read(result(at, what));
        Ok(Output { status: ExitStatus::from_raw(code << 8), stdout: read("out")?, stderr: read("err")? })
    };
    let ran = steps.iter().enumerate().filter(|(_, step)| matches!(step, Do::Ella(_)));
    Ok(Some(ran.map(|(at, _)| output(at)).collect::<Result<_>>()?))
}

/// It succeeded; gives its one JSON object.
#[track_caller]
fn done(output: &Output) -> serde_json::Value {
    let (out, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{said}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

#[test]
fn a_full_disk_ends_training_and_keeps_every_commit() -> Result<()> {
    let shared = shared()?;
    let disk = shared.world.path("small");
    // Room for two commits, and not for the third.
    let run = shared.world.run("on-small", 8, "[checkpoint]\nevery = 2\nkeep = 9\n")?;
    let output = format!("run.output={}/run", disk.display());
    let (train, folder) = (run.train(&[&output]), format!("{}/run", disk.display()));
    let train: Vec<&str> = train.iter().map(String::as_str).chain(["--json"]).collect();
    let audit = Do::Ella(&["audit", &folder, "--json"]);
    let steps = [Do::Ella(&train), audit, Do::Remount("size=64m"), Do::Ella(&train), Do::Ella(&["audit", &folder, "--json"])];
    let Some(ran) = on_disk(&disk, "4m", &steps)? else { return Ok(()) };
    refused(ran[0].clone(), FAILED, &["no space left", "small/run/commits/000000000006.1/", "step 6"]);
    let audit = done(&ran[1]);
    assert_eq!((&audit["ok"], &audit["step"]), (&true.into(), &4.into()), "{audit}");
    assert_eq!(done(&ran[2])["outcome"], "done");
    let audit = done(&ran[3]);
    assert_eq!((&audit["ok"], &audit["step"]), (&true.into(), &8.into()), "{audit}");
    Ok(())
}

#[test]
fn a_full_disk_ends_prepare_and_embed_which_go_on_once_there_is_room() -> Result<()> {
    let shared = shared()?;
    let disk = shared.world.path("tight");
    let data = format!("{}/data", disk.display());
    let (scenes, text) = (shared.path("scenes"), shared.path("models/text"));
    let prepare = ["prepare", &scenes, "--out", &data, "--resolution", "64", "--json"];
    let embed = ["embed", &data, "--text", &text, "--max-tokens", "64", "--json"];
    let ella = |arguments| Do::Ella(arguments);
    let steps =
        [ella(&prepare), ella(&embed), Do::Remount("size=500k"), ella(&prepare), ella(&embed), Do::Remount("size=64m"), ella(&embed)];
    let Some(ran) = on_disk(&disk, "100k", &steps)? else { return Ok(()) };
    refused(ran[0].clone(), FAILED, &["no space left", "tight/data/shards/"]);
    refused(ran[1].clone(), PERMANENT, &["tight/data", "manifest.json"]);
    assert_eq!(done(&ran[2])["kept"], 48);
    refused(ran[3].clone(), FAILED, &["no space left", "tight/data/features/"]);
    assert_eq!(done(&ran[4])["captions"], 48);
    Ok(())
}

#[test]
fn a_full_disk_is_named_by_what_writes_files() -> Result<()> {
    let shared = shared()?;
    let disk = shared.world.path("tiny");
    let at = |name: &str| format!("{}/{name}", disk.display());
    let (connector, tars, models, run) = (at("c.safetensors"), at("tars"), at("models"), shared.path("run"));
    let steps = [
        Do::Ella(&["export", &run, "--out", &connector]),
        Do::Ella(&["scenes", "--out", &tars, "--count", "100"]),
        Do::Ella(&["init-base", "--preset", "nano", "--out", &models]),
    ];
    let Some(ran) = on_disk(&disk, "64k", &steps)? else { return Ok(()) };
    for (output, file) in ran.into_iter().zip(["tiny/c.safetensors", "tiny/tars/", "tiny/models/base/"]) {
        refused(output, FAILED, &[file, "No space left", "space"]);
    }
    Ok(())
}

#[test]
fn a_read_only_disk_is_a_refusal() -> Result<()> {
    let shared = shared()?;
    let disk = shared.world.path("read-only");
    let run = shared.world.run("on-read-only", 4, "")?;
    let train = run.train(&[&format!("run.output={}/run", disk.display())]);
    let data = format!("{}/data", disk.display());
    let steps = [
        Do::Remount("ro"),
        Do::Ella(&train.iter().map(String::as_str).collect::<Vec<_>>()),
        Do::Ella(&["prepare", &shared.path("scenes"), "--out", &data, "--resolution", "64"]),
    ];
    let Some(ran) = on_disk(&disk, "1m", &steps)? else { return Ok(()) };
    refused(ran[0].clone(), PERMANENT, &["read-only/run/", "refused", "Read-only file system", "permissions"]);
    refused(ran[1].clone(), PERMANENT, &["read-only/data/", "refused", "Read-only file system", "permissions"]);
    Ok(())
}

#[test]
fn a_full_or_read_only_disk_ends_drawing_and_keeps_every_grid() -> Result<()> {
    let shared = shared()?;
    let disk = shared.world.path("narrow");
    std::fs::create_dir_all(shared.world.path("prompts"))?;
    for number in 0..8 {
        std::fs::write(shared.world.path(&format!("prompts/item{number}.txt")), format!("{number} red circles"))?;
    }
    let (prompts, out, connector) = (shared.path("prompts"), format!("{}/grids", disk.display()), shared.path(CONNECTOR));
    let (base, text, elsewhere) = (shared.path("models/base"), shared.path("models/text"), format!("{out}2"));
    let models = ["--connector", &connector, "--base", &base, "--text", &text, "--max-tokens", "64"];
    let draw: Vec<&str> =
        ["dpg", "generate", "--prompts", &prompts, "--out", &out, "--steps", "2", "--json"].into_iter().chain(models).collect();
    let other: Vec<&str> = draw.iter().map(|argument| if *argument == out { &elsewhere } else { *argument }).collect();
    let ella = || Do::Ella(&draw);
    let steps = [ella(), Do::Remount("size=64m"), ella(), Do::Remount("ro"), ella(), Do::Ella(&other)];
    // Room for the record and some grids of 128×128, and not for all.
    let Some(ran) = on_disk(&disk, "200k", &steps)? else { return Ok(()) };
    refused(ran[0].clone(), FAILED, &["no space left", "narrow/grids/item"]);
    let made = done(&ran[1]);
    assert!(made["there"].as_u64() > Some(0) && made["drawn"].as_u64() > Some(0) && made["replaced"] == 0, "{made}");
    // With all of it there nothing is written.
    assert_eq!(done(&ran[2])["there"], 8);
    refused(ran[3].clone(), PERMANENT, &["narrow/grids2/generate.json", "refused", "Read-only file system"]);
    Ok(())
}
