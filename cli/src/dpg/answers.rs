//! A model's answers, as a file: JSON lines, or CSV with the same names as columns.
//!
//! An answer is a line with `item_id`, `tile` (0 to 3), `proposition_id` and `answer`. A line with `item_id` and `error` instead says that the
//! item's picture could not be looked at, and why; answers on later lines take it back, so that a file may just be gone on with.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::set::{Set, whole};
use super::table::Table;
use super::{Note, TILES, bad};
use crate::ui::Fail;

/// The one answer that scores, to the letter (the official script's `answer == 'yes'`).
const YES: &str = "yes";

/// All answers, by item.
#[derive(Debug, Default)]
pub(super) struct Answers {
    file: String,
    items: HashMap<String, Item>,
}

/// What is known of one item.
#[derive(Debug, Default)]
pub(super) struct Item {
    /// Why its picture could not be looked at.
    pub(super) error: Option<String>,
    answers: HashMap<(u8, i64), Answer>,
}

#[derive(Debug)]
struct Answer {
    text: String,
    line: usize,
}

/// One line.
struct Told {
    item: String,
    what: What,
}

enum What {
    Error(String),
    Answer { tile: u8, question: i64, text: String },
}

impl Item {
    /// Whether a question was answered with yes; none if it was not answered.
    pub(super) fn yes(&self, tile: u8, question: i64) -> Option<bool> {
        self.answers.get(&(tile, question)).map(|answer| answer.text == YES)
    }
}

impl Answers {
    /// Reads a file: CSV if its name ends so, else JSON lines.
    pub(super) fn read(path: &Path) -> Result<Self, Fail> {
        let file = path.display().to_string();
        let all = if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("csv")) {
            Self::csv(&file, &Table::read(path)?)?
        } else {
            Self::jsonl(&file, &std::fs::read(path).map_err(|error| Fail::io(path, "read", &error))?)?
        };
        if all.items.is_empty() { Err(bad(format_args!("{file}: holds no answers"))) } else { Ok(all) }
    }

    pub(super) fn jsonl(file: &str, bytes: &[u8]) -> Result<Self, Fail> {
        let mut all = Self { file: file.to_owned(), ..Self::default() };
        for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let object: Value =
                serde_json::from_slice(line).map_err(|error| all.refused(at + 1, &format!("is no JSON object ({error})")))?;
            let told = object_told(&object).map_err(|rule| all.refused(at + 1, &rule))?;
            all.add(told, at + 1)?;
        }
        Ok(all)
    }

    fn csv(file: &str, table: &Table) -> Result<Self, Fail> {
        let mut all = Self { file: file.to_owned(), ..Self::default() };
        let (item, tile, question, answer) =
            (table.column("item_id")?, table.column("tile")?, table.column("proposition_id")?, table.column("answer")?);
        let error = table.optional("error");
        for row in &table.rows {
            let line = row.place.line;
            if row.get(item).is_empty() {
                return Err(all.refused(line, "must have `item_id`, a text"));
            }
            let number = |column| whole(row.get(column));
            let what = match error.map_or("", |column| row.get(column)) {
                "" => answer_told(number(tile), number(question), Some(row.get(answer))).map_err(|rule| all.refused(line, &rule))?,
                error => What::Error(error.to_owned()),
            };
            all.add(Told { item: row.get(item).to_owned(), what }, line)?;
        }
        Ok(all)
    }

    fn add(&mut self, told: Told, line: usize) -> Result<(), Fail> {
        let item = self.items.entry(told.item).or_default();
        match told.what {
            What::Error(error) => item.error = Some(error),
            What::Answer { tile, question, text } => {
                item.error = None;
                if let Some(before) = item.answers.insert((tile, question), Answer { text, line }) {
                    let rule = format!("answers proposition_id {question} of tile {tile} a second time, after line {}", before.line);
                    return Err(self.refused(line, &rule));
                }
            }
        }
        Ok(())
    }

    fn refused(&self, line: usize, rule: &str) -> Fail {
        bad(format_args!("{}: line {line} {rule}", self.file))
    }

    /// What is known of an item; none if no line tells of it.
    pub(super) fn of(&self, item: &str) -> Option<&Item> {
        self.items.get(item)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.items.values().map(|item| item.answers.len()).sum()
    }

    /// What of them counts for nothing, and what a set's questions lack.
    pub(super) fn notes(&self, set: &Set, tiles: u8) -> Result<Vec<Note>, Fail> {
        let by_item = set.by_item();
        let asked: HashMap<&str, Vec<i64>> =
            set.items.iter().zip(&by_item).map(|(item, of)| (item.as_str(), of.iter().map(|question| question.id).collect())).collect();
        let (mut strangers, mut unknown, mut beyond, mut near, mut used) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), 0);
        let mut names: Vec<&String> = self.items.keys().collect();
        names.sort_unstable();
        for name in names {
            let item = &self.items[name];
            let Some(ids) = asked.get(name.as_str()) else {
                strangers.push(name.as_str());
                continue;
            };
            for ((tile, question), answer) in &item.answers {
                if !ids.contains(question) {
                    unknown.push(format!("{name}/{question}"));
                } else if *tile >= tiles {
                    beyond.push(format!("{name}/{question}"));
                } else {
                    used += 1;
                    if is_near(&answer.text) {
                        near.push(format!("{name}/{question}: {:?}", answer.text));
                    }
                }
            }
        }
        if used == 0 && self.count() > 0 {
            let (first, ours) = (self.items.keys().min().map_or("", String::as_str), set.items.first().map_or("", String::as_str));
            return Err(bad(format_args!(
                "{}: none of its answers is to a question of {} (an item_id here: {first:?}, there: {ours:?}); give the answers to its questions",
                self.file, set.file
            )));
        }
        unknown.sort_unstable();
        // The scenes' dense and short lists have the same items: numbers that both have would be read as one another's.
        if unknown.len() > used {
            let (most, first) = (unknown.len(), unknown.first().map_or("", String::as_str));
            return Err(bad(format_args!(
                "{}: {most} of its {} answers are to questions that {} does not have, as {first}: they answer another list; give that as --csv",
                self.file,
                self.count(),
                set.file
            )));
        }
        near.sort_unstable();
        let mut notes: Vec<Note> = [
            Note::of("unknown_item", &strangers, "items that have answers and no questions", "not used"),
            Note::of("unknown_question", &unknown, "answers to questions that are not there", "not used"),
            Note::of("unused_tile", &beyond, &format!("answers to tiles beyond --pic-num {tiles}"), "not used"),
            Note::of(
                "near_yes",
                &near,
                "answers that people would read as yes",
                "0, as in the official script, which takes \"yes\" to the letter alone",
            ),
        ]
        .into_iter()
        .flatten()
        .collect();
        notes.extend(self.absent(set, tiles));
        Ok(notes)
    }

    /// What was not answered.
    fn absent(&self, set: &Set, tiles: u8) -> Vec<Note> {
        let (mut missing, mut unreadable, mut lacking) = (Vec::new(), Vec::new(), Vec::new());
        for (name, questions) in set.items.iter().zip(set.by_item()) {
            let item = self.of(name);
            if let Some(error) = item.and_then(|item| item.error.as_ref()) {
                unreadable.push(format!("{name}: {error}"));
                continue;
            }
            let asked = questions.iter().flat_map(|question| (0..tiles).map(|tile| (tile, question.id)));
            let open = |(tile, question): &(u8, i64)| item.is_none_or(|item| item.yes(*tile, *question).is_none());
            let open: Vec<(u8, i64)> = asked.filter(open).collect();
            if open.len() == questions.len() * usize::from(tiles) {
                missing.push(name.as_str());
            } else {
                lacking.extend(open.iter().map(|(tile, question)| format!("{name}/{question} of tile {tile}")));
            }
        }
        let out = "left out of the official mean, 0 in the correct one";
        [
            Note::of("missing", &missing, "prompts without any answer", out),
            Note::of("unreadable", &unreadable, "prompts whose pictures could not be looked at", out),
            Note::of(
                "unanswered",
                &lacking,
                "questions without an answer at prompts that have some",
                "these prompts are left out of the official mean; in the correct one the questions count as no",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// What a JSON object says, or how it must be.
fn object_told(object: &Value) -> Result<Told, String> {
    let item = match object.get("item_id") {
        Some(Value::String(item)) if !item.is_empty() => item.clone(),
        // As pandas writes item_ids that are all numbers.
        Some(Value::Number(number)) if number.is_i64() => number.to_string(),
        _ => return Err("must have `item_id`, a text".to_owned()),
    };
    let what = match object.get("error") {
        Some(Value::String(error)) => What::Error(error.clone()),
        Some(Value::Null) | None => {
            let number = |name| object.get(name).and_then(Value::as_i64);
            answer_told(number("tile"), number("proposition_id"), object.get("answer").and_then(Value::as_str))?
        }
        Some(_) => return Err("must have a text as `error`".to_owned()),
    };
    Ok(Told { item, what })
}

fn answer_told(tile: Option<i64>, question: Option<i64>, text: Option<&str>) -> Result<What, String> {
    let tile = tile.and_then(|tile| u8::try_from(tile).ok()).filter(|tile| *tile < TILES);
    let tile = tile.ok_or_else(|| format!("must have `tile`, 0 to {}", TILES - 1))?;
    let question = question.ok_or("must have `proposition_id`, a whole number")?;
    let text = text.ok_or("must have `answer`, a text, or else `error`")?.to_owned();
    Ok(What::Answer { tile, question, text })
}

/// Whether people would read an answer as yes that is none to the letter.
fn is_near(text: &str) -> bool {
    text != YES && text.trim().trim_end_matches(['.', '!', ',']).eq_ignore_ascii_case(YES)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::set::tests::set;
    use super::*;

    /// Answers of (item, tile, question, text).
    pub(in super::super) fn answers(all: &[(&str, u8, i64, &str)]) -> Answers {
        let line = |(item, tile, question, answer): &(&str, u8, i64, &str)| {
            serde_json::json!({ "item_id": item, "tile": tile, "proposition_id": question, "answer": answer }).to_string()
        };
        Answers::jsonl("a.jsonl", all.iter().map(line).collect::<Vec<_>>().join("\n").as_bytes()).unwrap()
    }

    #[test]
    fn only_yes_to_the_letter_is_one() {
        let texts = ["yes", "Yes", " yes", "yes.", "", "no", "true", "yes yes"];
        for (at, text) in texts.into_iter().enumerate() {
            let answers = answers(&[("a", 0, 1, text)]);
            assert_eq!(answers.of("a").unwrap().yes(0, 1), Some(at == 0), "{text:?}");
            assert_eq!(is_near(text), (1..4).contains(&at), "{text:?}");
        }
    }

    #[test]
    fn a_line_that_says_nothing_is_refused_with_its_number() {
        let good = r#"{"item_id":"a","tile":0,"proposition_id":1,"answer":"no","question":"Is it?"}"#;
        for (line, words) in [
            ("nothing", "line 3 is no JSON object"),
            ("[]", "line 3 must have `item_id`"),
            (r#"{"item_id":"a","tile":4,"proposition_id":1,"answer":"no"}"#, "line 3 must have `tile`, 0 to 3"),
            (r#"{"item_id":"a","tile":0,"answer":"no"}"#, "line 3 must have `proposition_id`"),
            (r#"{"item_id":"a","tile":0,"proposition_id":2,"answer":true}"#, "line 3 must have `answer`, a text"),
            (r#"{"item_id":"a","error":7}"#, "line 3 must have a text as `error`"),
            (good, "line 3 answers proposition_id 1 of tile 0 a second time, after line 1"),
        ] {
            let message = Answers::jsonl("a.jsonl", format!("{good}\n\n{line}\n").as_bytes()).unwrap_err().message;
            assert!(message.starts_with("a.jsonl: ") && message.contains(words), "{message}");
        }
    }

    #[test]
    fn an_error_stands_until_answers_come() {
        let error = r#"{"item_id":7,"error":"cannot be opened"}"#;
        let answer = r#"{"item_id":"7","tile":1,"proposition_id":1,"answer":"yes"}"#;
        let read = |lines: [&str; 2]| Answers::jsonl("a", lines.join("\n").as_bytes()).unwrap();
        assert_eq!(read([error, answer]).of("7").unwrap().error, None);
        assert_eq!(read([answer, error]).of("7").unwrap().error.as_deref(), Some("cannot be opened"));
    }

    #[test]
    fn csv_says_the_same() {
        let table =
            Table::of("a.csv", b"item_id,tile,proposition_id,answer,error\na,0,1,yes,\nb,,,,gone\na,1,1,\"no, it is not\",\n").unwrap();
        let answers = Answers::csv("a.csv", &table).unwrap();
        assert_eq!((answers.of("a").unwrap().yes(0, 1), answers.of("a").unwrap().yes(1, 1)), (Some(true), Some(false)));
        assert_eq!(answers.of("b").unwrap().error.as_deref(), Some("gone"));
        let table = Table::of("a.csv", b"item_id,tile,proposition_id,answer\na,x,1,yes\n").unwrap();
        let message = Answers::csv("a.csv", &table).unwrap_err().message;
        assert!(message.contains("a.csv: line 2 must have `tile`"), "{message}");
    }

    #[test]
    fn what_is_not_used_or_not_there_is_counted() {
        let set = set(&[("a", 1, "0", "t"), ("a", 2, "0", "t"), ("b", 1, "0", "t"), ("c", 1, "0", "t"), ("d", 1, "0", "t")]);
        let mut answers = answers(&[
            ("a", 0, 1, "Yes."),
            ("a", 0, 2, "yes"),
            ("a", 1, 1, "no"),
            ("a", 2, 1, "no"),
            ("a", 0, 9, "no"),
            ("b", 0, 1, "yes"),
            ("b", 1, 1, "yes"),
            ("x", 0, 1, "yes"),
        ]);
        answers.items.insert("d".to_owned(), Item { error: Some("gone".to_owned()), ..Item::default() });
        let notes = answers.notes(&set, 2).unwrap();
        let kinds: Vec<_> = notes.iter().map(|note| (note.kind, note.count)).collect();
        let expected = [
            ("unknown_item", 1),
            ("unknown_question", 1),
            ("unused_tile", 1),
            ("near_yes", 1),
            ("missing", 1),
            ("unreadable", 1),
            ("unanswered", 1),
        ];
        assert_eq!(kinds, expected);
        assert!(notes[1].text.contains("a/9") && notes[5].text.contains("d: gone"), "{notes:?}");
    }

    #[test]
    fn answers_to_another_set_are_refused() {
        let message = answers(&[("x", 0, 1, "yes")]).notes(&set(&[("a", 1, "0", "t")]), 4).unwrap_err().message;
        assert!(message.contains("none of its answers is to a question of set.csv") && message.contains("\"x\""), "{message}");
        let longer = answers(&[("a", 0, 1, "yes"), ("a", 0, 2, "yes"), ("a", 0, 3, "yes")]);
        let message = longer.notes(&set(&[("a", 1, "0", "t")]), 4).unwrap_err().message;
        assert!(message.contains("2 of its 3 answers are to questions that set.csv does not have, as a/2"), "{message}");
    }
}
