//! `ella status`, `ella inspect`, `ella plan` and `ella verify --originals` on a small data set.

use crate::{captions, json, prepared};
use anyhow::{Context as _, Result};
use ella_tests::{World, ella, exists, try_ella};
use std::path::Path;

#[test]
fn status_tells_of_a_data_set_and_of_what_is_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), 20)?;
    let status = json(&["status", &data])?;
    let work = &status["work"][0];
    assert_eq!(
        (&work["kind"], &work["whole"], &work["units"], &work["units_done"]),
        (&"prepare".into(), &true.into(), &3.into(), &3.into())
    );
    assert_eq!((&work["samples"], &work["counts"]["kept"], &work["seconds_left"]), (&20.into(), &20.into(), &().into()), "{status}");
    let text = ella(&["status", &data])?;
    assert!(text.contains("prepare  whole: 3 of 3 units done, 20 samples") && text.contains("kept 20"), "{text}");

    // Cut off after its first part.
    std::fs::remove_file(Path::new(&data).join("manifest.json"))?;
    let mut records: Vec<_> =
        std::fs::read_dir(Path::new(&data).join("units"))?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    records.sort();
    records[1..].iter().try_for_each(std::fs::remove_file)?;
    let status = json(&["status", &data])?;
    let work = &status["work"][0];
    assert_eq!((&work["whole"], &work["units_done"], &work["counts"]["kept"]), (&false.into(), &1.into(), &8.into()), "{status}");
    assert!(ella(&["status", &data])?.contains("prepare  under way: 1 of 3 units done, 8 samples"));

    let empty = folder.path().display().to_string();
    let refused = try_ella(&["status", &empty])?;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("run.toml: not found"), "{refused:?}");
    let refused = try_ella(&["status", "--coordinator", "127.0.0.1:1"])?;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("127.0.0.1:1"), "{refused:?}");
    Ok(())
}

#[test]
fn the_contact_sheet_is_one_file_with_pictures_captions_and_histograms() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), 20)?;
    let file = folder.path().join("sheet.html");
    let told = ella(&["inspect", &data, "--html", &file.display().to_string()])?;
    assert!(told.contains("20 samples in 3 shards") && told.contains("64×64: 20"), "{told}");
    let page = std::fs::read_to_string(&file)?;
    // Nothing is fetched: neither scripts, nor styles, nor pictures.
    for reference in ["src=\"http", "href=", "url(", "@import", "<link", "<script src", "src=\"/", "src=\"."] {
        assert!(!page.contains(reference), "{reference}");
    }
    assert_eq!(page.matches("src=\"data:image/jpeg;base64,/9j/").count(), 20);
    let escaped = |caption: &String| caption.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
    let own = captions(&data, "caption")?;
    assert!(own.iter().all(|caption| page.contains(&escaped(caption)) || page.contains(caption.as_str())));
    for what in ["words in a caption", "width of the original, pixels", "height of the original, pixels", "width over height"] {
        assert!(page.contains(&format!("aria-label=\"{what}\"")), "{what}");
    }
    assert_eq!((page.matches("<svg").count(), page.matches("<rect").count()), (4, 4 * 32));
    assert!(page.starts_with("<!") && page.trim_end().ends_with("</html>"));
    let refused = try_ella(&["inspect", &folder.path().display().to_string(), "--html", "x.html"])?;
    assert!(!refused.status.success() && !exists("x.html"), "{refused:?}");
    Ok(())
}

#[test]
fn captions_are_counted_beside_the_papers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), 20)?;
    let own = captions(&data, "caption")?;
    let words = own.iter().map(|caption| caption.split_whitespace().count()).sum::<usize>() as f64 / own.len() as f64;
    let stats = &json(&["inspect", &data, "--stats"])?["stats"]["caption"];
    assert_eq!(stats["captions"], 20);
    assert!((stats["words"]["mean"].as_f64().context("no mean")? - words).abs() < 1e-9, "{stats}");
    assert!(stats["speech"]["nouns"].as_f64() > Some(1.0), "{stats}");
    let text = ella(&["inspect", &data, "--stats"])?;
    for part in ["captions of caption", "LAION alt", "CogVLM", "49.87", &format!("{words:.2}"), "20 captions"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(json(&["inspect", &data])?.get("stats").is_none() && stats["tokens"].is_null());

    let models = folder.path().join("models").display().to_string();
    ella(&["init-base", "--preset", "nano", "--captions", &data, "--out", &models])?;
    let (text, stats) = (format!("{models}/text"), ["inspect", &data, "--stats", "--tokenizer"]);
    let tokens = json(&[&stats[..], &[&text]].concat())?["stats"]["caption"]["tokens"].as_f64().context("no tokens")?;
    // Words of a vocabulary that was made of these captions, marks, and an end.
    assert!((words..2.0 * words).contains(&tokens), "{tokens} tokens, {words} words");
    assert_eq!(try_ella(&["inspect", &data, "--tokenizer", &text])?.status.code(), Some(2));
    Ok(())
}

#[test]
fn a_plan_gives_every_figure_with_its_formula() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("run", 9, "")?;
    let config = run.config.display().to_string();
    let plan = json(&["plan", &config, "--gpu", "h200", "--gpu-hour", "3.5"])?;
    assert_eq!((&plan["assumed"]["gpu"], &plan["assumed"]["gpu_hour"]), (&"h200".into(), &3.5.into()));
    let figures = plan["figures"].as_array().context("no figures")?;
    let value = |name: &str| {
        let figure = figures.iter().find(|figure| figure["name"] == name).with_context(|| format!("{name}: {plan}"))?;
        assert!(figure["formula"].as_str().is_some_and(|formula| formula.len() > 5), "{figure}");
        figure["value"].as_f64().context("no value")
    };
    // 40 samples in global batches of 16.
    assert_eq!((value("steps per epoch")?, value("epochs")?), (3.0, 3.0));
    let width = plan["facts"]["text_width"].as_f64().context("no width")?;
    assert_eq!(value("features of a caption")?, 64.0 * width * 4.0);
    assert_eq!(value("features of the data set")?, 40.0 * 64.0 * width * 4.0);
    // What is there is what was reckoned.
    let bytes = |folder: &str| -> Result<f64> {
        let (mut bytes, mut folders) = (0, vec![world.path(folder)]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder)? {
                let path = entry?.path();
                match path.is_dir() {
                    true => folders.push(path),
                    false if path.extension().is_some_and(|extension| extension == "arrow") => bytes += path.metadata()?.len(),
                    false => {}
                }
            }
        }
        Ok(bytes as f64)
    };
    assert_eq!(value("shards")?, bytes("data/shards")?);
    let features = bytes("data/features")?;
    assert!((1.0..1.1).contains(&(features / value("features of the data set")?)), "{features}: {plan}");
    assert!(
        ["cache", "recompute"].iter().any(|cheaper| plan["cheaper"] == *cheaper)
            && plan["why"].as_str().is_some_and(|why| why.contains("epochs"))
    );

    let text = ella(&["plan", &config, "--set", "train.steps=30"])?;
    for figure in figures {
        let name = figure["name"].as_str().context("no name")?;
        let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("{name}: {text}"))?;
        assert!(line.contains("  = "), "{line}");
    }
    assert!(text.contains("30 steps / 3 per epoch") && text.contains("cheaper: "), "{text}");
    // Of any base, by its configuration: a tiny one's here.
    assert!(value("training")? > 0.0 && text.contains("GFLOP, there and back"), "{text}");
    // Memory: every part with its formula, their sum, and what fits.
    let memory = &json(&["plan", &config, "--gpu-memory", "2GiB"])?["memory"];
    let parts = memory["parts"].as_array().context("no parts")?;
    assert!(parts.iter().all(|part| part["formula"].as_str().is_some_and(|formula| formula.len() > 5)), "{memory}");
    let sum: u64 = parts.iter().filter_map(|part| part["bytes"].as_u64()).sum();
    assert_eq!((memory["bytes"].as_u64(), memory["fit"]["memory"].as_u64()), (Some(sum), Some(2 << 30)));
    assert!(memory["fit"]["largest"].as_u64() > Some(16) && memory["fit"]["of_the_batch"].as_u64() == Some(16), "{memory}");
    let two = ella(&["plan", &config, "--set", "workers.count=2"])?;
    assert!(two.contains("of those that divide the global batch of 16 and leave 2 workers (workers.count) a lane each, 8"), "{two}");
    assert!(text.contains("kept of up_blocks.0") && text.contains("fits into 79.6 GiB"), "{text}");
    let little = ella(&["plan", &config, "--gpu-memory", "512MiB"])?;
    assert!(little.contains("DOES NOT FIT into 512.0 MiB; not one sample does"), "{little}");
    let refused = try_ella(&["plan", &config, "--gpu", "abacus"])?;
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("h100"), "{refused:?}");
    Ok(())
}

/// A list tells nothing of a picture that changed behind it: reading the sources again does.
#[test]
fn verify_reads_the_originals_again_if_asked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let world = prepared(folder.path(), 8)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures)?;
    let mut list = String::new();
    runtime.block_on(async {
        let shard = ella_dataset::DataSet::open(&world).await?.shard(0).await?;
        for row in 0..shard.rows() {
            std::fs::write(pictures.join(format!("{row}.jpg")), shard.row(row)?.image.context("no picture")?)?;
            list += &format!("{{\"file_name\": \"{row}.jpg\", \"text\": \"number {row}\"}}\n");
        }
        anyhow::Ok(())
    })?;
    std::fs::write(pictures.join("metadata.jsonl"), list)?;
    let (source, data) = (pictures.display().to_string(), folder.path().join("listed").display().to_string());
    let prepare = ["prepare", &source, "--out", &data, "--resolution", "64"];
    ella(&prepare)?;
    assert_eq!(json(&["verify", &data, "--originals"])?["changed"], serde_json::json!([]));
    assert!(ella(&["verify", &data, "--originals"])?.contains("the sources are what was prepared"));

    std::fs::copy(pictures.join("1.jpg"), pictures.join("0.jpg"))?;
    ella(&prepare)?;
    assert_eq!(json(&["verify", &data])?["changed"], serde_json::Value::Null);
    let changed = try_ella(&["verify", &data, "--originals"])?;
    let said = String::from_utf8_lossy(&changed.stderr);
    assert!(changed.status.code() == Some(1) && said.contains("pictures/0.jpg") && said.contains("metadata.jsonl"), "{said}");
    assert!(String::from_utf8_lossy(&changed.stdout).contains("1 part of the sources changed"));

    // A list of other rows is seen at once.
    let list = std::fs::read_to_string(pictures.join("metadata.jsonl"))?;
    std::fs::write(pictures.join("metadata.jsonl"), list.lines().skip(1).map(|line| line.to_owned() + "\n").collect::<String>())?;
    let changed = try_ella(&["verify", &data, "--originals"])?;
    let said = String::from_utf8_lossy(&changed.stderr);
    assert!(changed.status.code() == Some(1) && said.contains("plan.json"), "{said}");
    Ok(())
}

#[test]
fn a_field_of_captions_that_no_sample_has_is_one_error_that_names_what_there_is() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (tars, data) = (folder.path().join("scenes").display().to_string(), folder.path().join("data").display().to_string());
    ella(&["scenes", "--out", &tars, "--count", "20", "--seed", "4", "--size", "64", "--per-tar", "20"])?;
    let refused = try_ella(&["prepare", &tars, "--out", &data, "--resolution", "64", "--caption", "dense=descripton"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("ella: ")).collect();
    assert!(refused.status.code() == Some(4) && lines.len() == 1, "{said}");
    for word in ["scenes-00000.tar", "(descripton)", "txt"] {
        assert!(lines[0].contains(word), "{word}: {said}");
    }
    assert!(!exists(Path::new(&data).join("manifest.json")));
    Ok(())
}

/// Much of a damaged shard may be sound still, and its source may be gone; captions may have been paid for.
#[test]
fn what_cannot_be_made_anew_is_not_deleted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), 16)?;
    let at = |name: &str| Path::new(&data).join(name);
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(at("manifest.json"))?)?;
    let shard = at(manifest["shards"][0]["name"].as_str().context("no shard")?);
    let sound = std::fs::read(&shard)?;
    let mut damaged = sound.clone();
    damaged[sound.len() / 2] ^= 1;
    std::fs::write(&shard, &damaged)?;
    let (tar, away) = (folder.path().join("scenes/scenes-00000.tar"), folder.path().join("away.tar"));
    let original = std::fs::read(&tar)?;
    std::fs::rename(&tar, &away)?;
    let refused = try_ella(&["verify", &data, "--repair"])?;
    assert!(!refused.status.success(), "{refused:?}");
    assert_eq!(std::fs::read(&shard)?, damaged, "the source is gone");

    // A source of the same size and other bytes is found out only when its shard is made.
    let mut other = original.clone();
    // The last file of a scene is its caption.
    let text = original.windows(4).rposition(|bytes| bytes == b" the").context("no caption")?;
    other[text + 1] = b'T';
    std::fs::write(&tar, &other)?;
    let refused = try_ella(&["verify", &data, "--repair"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("left as they were"), "{said}");
    assert_eq!(std::fs::read(&shard)?, damaged, "the source is another");
    assert!(!exists(at("damaged").join("shards")) || std::fs::read_dir(at("damaged/shards"))?.next().is_none());

    std::fs::write(&tar, &original)?;
    ella(&["verify", &data, "--repair"])?;
    assert_eq!(std::fs::read(&shard)?, sound);
    Ok(())
}

/// Whatever became of one source, the others are compared.
#[test]
fn every_source_that_changed_or_is_gone_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), 32)?;
    let tar = |number: u32| folder.path().join(format!("scenes/scenes-0000{number}.tar"));
    std::fs::remove_file(tar(0))?;
    let longer = [std::fs::read(tar(1))?, vec![0; 512]].concat();
    std::fs::write(tar(1), longer)?;
    let mut other = std::fs::read(tar(3))?;
    let text = other.windows(4).position(|bytes| bytes == b" the").context("no caption")?;
    other[text + 1] = b'T';
    std::fs::write(tar(3), other)?;
    let changed = try_ella(&["verify", &data, "--originals"])?;
    let (told, said) = (String::from_utf8_lossy(&changed.stdout), String::from_utf8_lossy(&changed.stderr));
    assert!(changed.status.code() == Some(1) && told.contains("3 parts of the sources changed"), "{told}{said}");
    for number in [0, 1, 3] {
        assert!(said.contains(&format!("scenes-0000{number}.tar")), "{said}");
    }
    assert!(!said.contains("scenes-00002.tar"), "{said}");
    Ok(())
}
