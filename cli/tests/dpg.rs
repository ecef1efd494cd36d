//! `ella dpg questions` and `ella dpg score`, as black boxes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::ella;
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

/// What scripts/dpg_reference.py made.
fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dpg").join(name)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// The scores of one of the reference's sets.
fn score(set: &str, more: &[&str]) -> Value {
    let (csv, answers) = (data(&format!("{set}.csv")).display().to_string(), data(&format!("{set}.jsonl")).display().to_string());
    let here = tempfile::tempdir().unwrap();
    ella(here.path(), &[&["dpg", "score", "--csv", &csv, "--answers", &answers, "--json"], more].concat()).ok().json()
}

#[track_caller]
fn close(found: &Value, expected: &Value, what: &str) {
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((found - expected).abs() < 1e-9, "{what}: {found}, expected {expected}");
}

#[test]
fn official_scores_are_those_of_the_official_script() {
    let reference: Value = serde_json::from_str(&text(&data("expected.json"))).unwrap();
    for set in ["corners", "drawn"] {
        for tiles in ["1", "2", "4"] {
            let (found, expected) = (&score(set, &["--mode", "official", "--pic-num", tiles])["official"], &reference[set][tiles]);
            close(&found["score"]["value"], &expected["score"], set);
            for level in ["level1", "level2"] {
                let (found, expected) = (found[level].as_object().unwrap(), expected[level].as_object().unwrap());
                assert!(found.keys().eq(expected.keys()), "{set} {tiles}: {found:?}");
                expected.iter().for_each(|(category, value)| close(&found[category]["value"], value, category));
            }
            let prompts = found["by_prompt"].as_array().unwrap();
            assert_eq!(prompts.len(), expected["by_prompt"].as_object().unwrap().len());
            for prompt in prompts {
                let item = prompt["item_id"].as_str().unwrap();
                let expected = &expected["by_prompt"][item];
                close(&prompt["score"], &expected["score"], item);
                let tiles = prompt["tiles"].as_array().unwrap().iter().zip(expected["tiles"].as_array().unwrap());
                tiles.for_each(|(found, expected)| close(found, expected, item));
            }
            // Whatever the script failed at is told of, and so is what it never saw; `stranger` is none of the set's.
            let absent: Vec<&str> = found["absent"].as_array().unwrap().iter().map(|one| one["item_id"].as_str().unwrap()).collect();
            let failed = expected["failed"].as_array().unwrap().iter().map(|item| item.as_str().unwrap());
            assert!(failed.filter(|item| *item != "stranger").all(|item| absent.contains(&item)), "{absent:?}");
            assert_eq!(absent.len() + prompts.len(), if set == "corners" { 14 } else { 50 });
        }
    }
}

#[test]
fn both_modes_stand_side_by_side_with_what_to_know() {
    let found = score("corners", &[]);
    assert_eq!((&found["prompts"], &found["questions"], &found["pic_num"]), (&json!(14), &json!(35), &json!(4)));
    let (official, correct) = (&found["official"], &found["correct"]);
    assert_eq!((&official["score"]["of"], &correct["score"]["of"]), (&json!(8), &json!(14)), "every prompt is in the correct mean");
    for mode in [official, correct] {
        let (value, interval) = (mode["score"]["value"].as_f64().unwrap(), &mode["score"]["interval"]);
        assert!(interval[0].as_f64().unwrap() < value && value < interval[1].as_f64().unwrap(), "{mode}");
    }
    let kinds: BTreeMap<&str, u64> =
        found["notes"].as_array().unwrap().iter().map(|note| (note["kind"].as_str().unwrap(), note["count"].as_u64().unwrap())).collect();
    let expected = [
        ("cycle", 3),
        ("missing", 1),
        ("near_yes", 6),
        ("repeated_question", 1),
        ("split_item", 1),
        ("unanswered", 1),
        ("unknown_item", 1),
        ("unknown_parent", 3),
        ("unknown_question", 1),
        ("unreadable", 1),
    ];
    assert_eq!(kinds, BTreeMap::from(expected));
    let reasons: BTreeMap<&str, &str> = official["absent"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["item_id"].as_str().unwrap(), one["reason"].as_str().unwrap()))
        .collect();
    assert!(reasons["first"].starts_with("KeyError: 1 ") && reasons["later"].starts_with("KeyError: 9 "), "{reasons:?}");
    assert!(
        reasons["partial"].contains("question 2 of tile 3 has no answer") && reasons["broken"].contains("cannot identify"),
        "{reasons:?}"
    );
    assert!(found["published"].as_array().unwrap().iter().any(|row| row["model"] == "ELLA SDXL" && row["score"] == 80.23));
}

#[test]
fn the_same_seed_gives_the_same_intervals() {
    let interval = |more: &[&str]| score("drawn", more)["correct"]["level1"]["entity"]["interval"].clone();
    let first = interval(&[]);
    assert_eq!(first, interval(&["--mode", "correct"]), "what else is reckoned does not matter");
    assert_ne!(first, interval(&["--seed", "1"]));
    assert_eq!(score("drawn", &["--mode", "correct"]).get("official"), None);
}

#[test]
fn a_report_is_a_page_a_text_and_markdown() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let (csv, answers) = (data("corners.csv").display().to_string(), data("corners.jsonl").display().to_string());
    let all = ["dpg", "score", "--csv", &csv, "--answers", &answers];
    let shown = ella(here, &[&all[..], &["--out", "report.html"]].concat()).ok().stdout;
    ella(here, &[&all[..], &["--out", "report.md"]].concat()).ok();
    let (page, markdown) = (text(&here.join("report.html")), text(&here.join("report.md")));
    for (form, text) in [("terminal", &shown), ("page", &page), ("markdown", &markdown)] {
        for words in [
            "official",
            "correct",
            "95 % interval",
            "attribute - color",
            "39.58",
            "ELLA SDXL",
            "80.23",
            "arXiv 2403.05135",
            "not DPG-Bench",
        ] {
            assert!(text.contains(words), "{form} lacks {words:?}:\n{text}");
        }
    }
    let one = ella(here, &[&all[..], &["--mode", "correct"]].concat()).ok().stdout;
    assert!(one.contains("correct: all rows") && !one.contains("official: as"), "the legend of a column that is not there:\n{one}");
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg") && !page.contains("src=") && !page.contains("href="));
    assert!(markdown.contains("| model | score | global |") && shown.contains("report: report.html"));
    ella(here, &[&all[..], &["--out", "report.pdf", "--json"]].concat()).fails(2, &["report.pdf", ".html or .md"]);
}

/// A picture of four tiles, each of its own grey.
fn grid(path: &Path, tile: u32) {
    let grey = |x: u32, y: u32| Rgb([(40 * (x / tile + 2 * (y / tile))) as u8; 3]);
    RgbImage::from_fn(2 * tile, 2 * tile, grey).save(path).unwrap();
}

const SET: &str = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n\
                   a,A,1,0,entity - whole (a),Is there an A?\n\
                   a,A,2,1,\"attribute - color (a, red)\",\"Is the \"\"A\"\" red, or not?\"\n\
                   b,B,1,0,global (b),Is it B?\n\
                   c,C,1,0,global (c),Is it C?\n";

#[test]
fn every_question_is_asked_of_every_tile_and_answers_become_scores() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("set.csv"), SET).unwrap();
    std::fs::create_dir_all(here.join("images/folder")).unwrap();
    grid(&here.join("images/a.run1.png"), 8);
    std::fs::write(here.join("images/b.png"), "no picture").unwrap();
    std::fs::write(here.join("images/results.txt"), "").unwrap();
    let all = ["dpg", "questions", "--csv", "set.csv", "--images", "images", "--out", "list.jsonl"];
    let made = ella(here, &[&all[..], &["--json"]].concat()).ok().json();
    assert_eq!((&made["questions"], &made["pictures"], &made["resolution"]), (&json!(8), &json!(1), &json!(8)));
    assert_eq!(made["missing"], json!(["c"]));
    assert!(made["unreadable"][0].as_str().unwrap().starts_with("b: "), "{made}");
    let told = ella(here, &all).ok().stdout;
    for words in ["8 questions about 1 picture in list.jsonl", "prompts without a picture: 1 (c)", "folder, results.txt"] {
        assert!(told.contains(words), "{told}");
    }
    let list: Vec<Value> = text(&here.join("list.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let expected = json!({
        "image": "images/a.run1.png", "box": [8, 0, 16, 8], "item_id": "a", "tile": 1, "proposition_id": 2,
        "question": "Is the \"A\" red, or not?",
    });
    assert_eq!(list[3], expected);

    // A model that looks at the tile: only the last one, of grey 120, is a yes.
    let picture = image::open(here.join("images/a.run1.png")).unwrap().to_rgb8();
    let answer = |ask: &Value| {
        let at = |side: usize| ask["box"][side].as_u64().unwrap() as u32;
        let answer = if picture.get_pixel(at(0), at(1)).0[0] == 120 { "yes" } else { "no" };
        json!({ "item_id": ask["item_id"], "tile": ask["tile"], "proposition_id": ask["proposition_id"], "answer": answer }).to_string()
            + "\n"
    };
    std::fs::write(here.join("answers.jsonl"), list.iter().map(answer).collect::<String>()).unwrap();
    let found = ella(here, &["dpg", "score", "--csv", "set.csv", "--answers", "answers.jsonl", "--mode", "correct", "--json"]).ok().json();
    close(&found["correct"]["score"]["value"], &json!(100.0 * 0.25 / 3.0), "one tile of one prompt of three");
}

#[test]
fn pictures_that_do_not_fit_are_refused_with_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("set.csv"), SET).unwrap();
    let all = ["dpg", "questions", "--csv", "set.csv", "--images", "images", "--out", "list.jsonl", "--json"];
    let more = |more: &[&str]| ella(here, &[&all[..], more].concat());
    more(&[]).fails(4, &["images", "cannot be read"]);
    std::fs::create_dir(here.join("images")).unwrap();
    more(&[]).fails(4, &["images: has no readable picture of any item of set.csv", "a.png"]);
    grid(&here.join("images/a.png"), 8);
    for side in ["4", "16"] {
        more(&["--resolution", side]).fails(2, &["--resolution", "is the side of one tile", "images/a.png is 16×16", "give 8"]);
    }
    more(&["--resolution", "16", "--pic-num", "1"]).ok();
    more(&["--resolution", "0"]).fails(2, &["--resolution"]);
    more(&["--pic-num", "5"]).fails(2, &["--pic-num"]);
    grid(&here.join("images/b.png"), 6);
    more(&[]).fails(4, &["images/b.png is 12×12", "images/a.png is 16×16", "of one size"]);
    RgbImage::new(16, 8).save(here.join("images/b.png")).unwrap();
    more(&[]).fails(4, &["images/b.png is 16×8", "must be square"]);
    std::fs::remove_file(here.join("images/b.png")).unwrap();
    grid(&here.join("images/a.jpg.png"), 8);
    more(&[]).fails(4, &["two of \"a\"", "a.jpg.png", "one picture"]);
}

#[test]
fn bad_sets_and_answers_are_refused_with_file_place_and_rule() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let answer = "{\"item_id\":\"a\",\"tile\":0,\"proposition_id\":1,\"answer\":\"yes\"}\n";
    let run = |set: &str, answers: &str, more: &[&str]| {
        std::fs::write(here.join("set.csv"), set).unwrap();
        std::fs::write(here.join("answers.jsonl"), answers).unwrap();
        ella(here, &[&["dpg", "score", "--csv", "set.csv", "--answers", "answers.jsonl", "--json"], more].concat())
    };
    run(SET, answer, &[]).ok();
    run(&SET.replace("tuple", "tupel"), answer, &[]).fails(4, &["set.csv: has no column `tuple`", "tupel"]);
    run(&SET.replace("b,B,1,0", "b,B,1,none"), answer, &[]).fails(4, &["set.csv: row 3 (line 4), column `dependency`", "\"none\""]);
    let twice = SET.replace("a,A,2,1", "a,A,1,0");
    run(&twice, answer, &[]).fails(4, &["set.csv: row 2 (line 3) has item_id \"a\" with proposition_id 1", "row 1 (line 2)"]);
    let found = run(&twice, answer, &["--mode", "official"]).ok().json();
    assert_eq!(found["notes"][0]["kind"], "repeated_question", "the official script takes the last one");
    run(SET, &answer.repeat(2), &[]).fails(4, &["answers.jsonl: line 2 answers proposition_id 1 of tile 0 a second time", "line 1"]);
    run(SET, &answer[..20], &[]).fails(4, &["answers.jsonl: line 1 is no JSON object"]);
    run(SET, &answer.replace("\"a\"", "\"z\""), &[]).fails(4, &["answers.jsonl: none of its answers", "\"z\""]);
    run(SET, answer, &["--resamples", "1"]).fails(2, &["--resamples"]);
    ella(here, &["dpg", "score", "--csv", "none.csv", "--answers", "answers.jsonl", "--json"]).fails(4, &["none.csv", "cannot be read"]);
    ella(here, &["dpg", "score", "--csv", "set.csv", "--json"]).fails(2, &["--answers"]);
    run(SET, "\n", &[]).fails(4, &["answers.jsonl: holds no answers"]);
    // No picture could be looked at: no official score, and 0 in the correct mode.
    let found = run(SET, "{\"item_id\":\"a\",\"error\":\"no picture\"}\n", &[]).ok().json();
    assert_eq!((&found["official"]["score"], &found["correct"]["score"]["value"]), (&Value::Null, &json!(0.0)));
}
