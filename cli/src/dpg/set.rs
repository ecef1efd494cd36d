//! A set of questions: what is asked of each prompt's pictures, and which question stands or falls with which.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::table::{Place, Row, Table};
use super::{Note, bad};
use crate::ui::Fail;

/// Text that pandas, and so the official script, reads as a missing value.
const MISSING: [&str; 17] =
    ["", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "-1.#IND", "1.#QNAN"];

/// A row of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Whose it is: an index of [`Set::items`].
    pub(super) item: usize,
    /// `proposition_id`.
    pub(super) id: i64,
    /// `dependency`, without the 0 that stands for none.
    pub(super) parents: Vec<i64>,
    /// What stands before the first `(` in `tuple`.
    pub(super) level2: String,
    /// `question_natural_language`.
    pub(super) text: String,
    pub(super) place: Place,
}

impl Question {
    /// Whether it says the same as another of its id.
    fn same(&self, other: &Self) -> bool {
        (&self.parents, &self.level2, &self.text) == (&other.parents, &other.level2, &other.text)
    }
}

/// The first level of a category: what stands before its first `-`.
pub(super) fn level1(level2: &str) -> &str {
    level2.split('-').next().unwrap_or_default().trim()
}

/// All of it, in the order of the file.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) file: String,
    /// `item_id`s, in the order in which they first come.
    pub(super) items: Vec<String>,
    pub(super) questions: Vec<Question>,
}

impl Set {
    pub(super) fn read(path: &Path) -> Result<Self, Fail> {
        Self::of(&path.display().to_string(), &Table::read(path)?)
    }

    pub(super) fn of(file: &str, table: &Table) -> Result<Self, Fail> {
        let columns = Columns {
            file,
            item: table.column("item_id")?,
            id: table.column("proposition_id")?,
            dependency: table.column("dependency")?,
            tuple: table.column("tuple")?,
            question: table.column("question_natural_language")?,
        };
        let (mut items, mut known, mut questions) = (Vec::new(), HashMap::new(), Vec::new());
        for row in &table.rows {
            let name = columns.text(row, "item_id", columns.item)?;
            let item = *known.entry(name).or_insert_with(|| {
                items.push(name.to_owned());
                items.len() - 1
            });
            questions.push(columns.question(row, item)?);
        }
        if questions.is_empty() {
            return Err(bad(format_args!("{file}: has no rows, and must have one for each question")));
        }
        Ok(Self { file: file.to_owned(), items, questions })
    }

    /// Every item's questions. Of several with one id the last one counts, in the place of the first.
    pub(super) fn by_item(&self) -> Vec<Vec<&Question>> {
        let mut found: Vec<Vec<&Question>> = vec![Vec::new(); self.items.len()];
        let mut places: HashMap<(usize, i64), usize> = HashMap::new();
        for question in &self.questions {
            let of = &mut found[question.item];
            match places.get(&(question.item, question.id)) {
                Some(place) => of[*place] = question,
                None => {
                    places.insert((question.item, question.id), of.len());
                    of.push(question);
                }
            }
        }
        found
    }

    /// Refuses a set that asks two things under one id: only the official script knows which one it takes.
    pub(super) fn unambiguous(&self) -> Result<(), Fail> {
        let Some((first, second)) = self.repeated().into_iter().find(|(first, second)| !first.same(second)) else { return Ok(()) };
        Err(bad(format_args!(
            "{}: {} has item_id {:?} with proposition_id {}, which {} has already for another question: each must be there once (with --mode \
             official the last one counts, as in the official script)",
            self.file, second.place, self.items[second.item], second.id, first.place
        )))
    }

    /// Rows whose id came before, with the row before.
    fn repeated(&self) -> Vec<(&Question, &Question)> {
        let mut before: HashMap<(usize, i64), &Question> = HashMap::new();
        let mut again = Vec::new();
        for question in &self.questions {
            again.extend(before.insert((question.item, question.id), question).map(|first| (first, question)));
        }
        again
    }

    /// What is odd about it.
    pub(super) fn notes(&self) -> Vec<Note> {
        let tell = |question: &Question| format!("{}/{}", self.items[question.item], question.id);
        let repeated: Vec<String> = self.repeated().into_iter().map(|(_, second)| tell(second)).collect();
        let (split, dotted) = (self.split(), self.items.iter().filter(|item| item.contains('.')).collect::<Vec<_>>());
        let (unknown, cycles) = self.relations();
        let unknown: Vec<String> = unknown.into_iter().map(|(question, parent)| format!("{} on {parent}", tell(question))).collect();
        let cycles: Vec<String> = cycles.into_iter().map(tell).collect();
        let numbers = self.items.iter().all(|item| item.parse::<f64>().is_ok());
        [
            Note::of("repeated_question", &repeated, "questions that come again", "the last one counts"),
            Note::of("split_item", &split, "items whose rows are not together", "the official script forgets all but the last ones"),
            Note::of(
                "unknown_parent",
                &unknown,
                "dependencies on questions that are not there",
                "the official script gives up on the item, the correct mode passes over them",
            ),
            Note::of("cycle", &cycles, "questions that depend on themselves by way of others", "a no to one is a no to all in the correct mode"),
            Note::of("dotted_item", &dotted, "items with a dot in their names", "a picture's item ends at its first dot, so they have none"),
            numbers.then(|| Note {
                kind: "numbers",
                count: self.items.len(),
                text: "every item_id is a number: pandas reads them as such, and the official script then finds no picture; here they are text"
                    .to_owned(),
            }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Items whose rows are not together.
    fn split(&self) -> Vec<&str> {
        let runs = self.questions.chunk_by(|a, b| a.item == b.item).filter_map(|run| run.first()).map(|question| question.item);
        let (mut seen, mut split) = (HashSet::new(), Vec::new());
        for item in runs {
            if !seen.insert(item) && !split.contains(&self.items[item].as_str()) {
                split.push(self.items[item].as_str());
            }
        }
        split
    }

    /// Questions with a parent that is not there, and those that are their own ancestors.
    fn relations(&self) -> (Vec<(&Question, i64)>, Vec<&Question>) {
        let (mut unknown, mut cycles) = (Vec::new(), Vec::new());
        for questions in self.by_item() {
            let ids: HashSet<i64> = questions.iter().map(|question| question.id).collect();
            for question in &questions {
                let missing = question.parents.iter().filter(|parent| !ids.contains(parent));
                unknown.extend(missing.map(|parent| (*question, *parent)));
            }
            for (question, ancestors) in questions.iter().zip(ancestors(&questions)) {
                if ancestors.iter().any(|ancestor| questions[*ancestor].id == question.id) {
                    cycles.push(*question);
                }
            }
        }
        (unknown, cycles)
    }
}

/// For each of an item's questions all that it depends on, near and far, as indices; in whatever order they stand. Itself only in a cycle.
pub(super) fn ancestors(questions: &[&Question]) -> Vec<Vec<usize>> {
    let places: HashMap<i64, usize> = questions.iter().enumerate().map(|(place, question)| (question.id, place)).collect();
    let parents = |place: usize| questions[place].parents.iter().filter_map(|parent| places.get(parent).copied());
    let of = |place: usize| {
        let (mut found, mut open): (Vec<usize>, Vec<usize>) = (Vec::new(), parents(place).collect());
        while let Some(next) = open.pop() {
            if !found.contains(&next) {
                found.push(next);
                open.extend(parents(next));
            }
        }
        found
    };
    (0..questions.len()).map(of).collect()
}

/// Where the columns are that count.
struct Columns<'a> {
    file: &'a str,
    item: usize,
    id: usize,
    dependency: usize,
    tuple: usize,
    question: usize,
}

impl Columns<'_> {
    fn question(&self, row: &Row, item: usize) -> Result<Question, Fail> {
        let id = self.text(row, "proposition_id", self.id)?;
        let id = whole(id).ok_or_else(|| self.refused(row, "proposition_id", "a whole number", id))?;
        let dependency = self.text(row, "dependency", self.dependency)?;
        let parents: Option<Vec<i64>> = dependency.split(',').map(|parent| parent.trim().parse().ok()).collect();
        let rule = "numbers of questions with commas between, 0 for none";
        let mut parents = parents.ok_or_else(|| self.refused(row, "dependency", rule, dependency))?;
        parents.retain(|parent| *parent != 0);
        let level2 = self.text(row, "tuple", self.tuple)?.split('(').next().unwrap_or_default().trim().to_owned();
        let text = self.text(row, "question_natural_language", self.question)?.to_owned();
        Ok(Question { item, id, parents, level2, text, place: row.place })
    }

    fn text<'r>(&self, row: &'r Row, name: &str, column: usize) -> Result<&'r str, Fail> {
        let text = row.get(column);
        if MISSING.contains(&text) {
            let what = "text that pandas does not take for a missing value (as it does nothing, NA, None or null)";
            return Err(self.refused(row, name, what, text));
        }
        Ok(text)
    }

    fn refused(&self, row: &Row, column: &str, rule: &str, found: &str) -> Fail {
        bad(format_args!("{}: {}, column `{column}`: must be {rule} (found {found:?})", self.file, row.place))
    }
}

/// A whole number, also as pandas writes a column that has gaps: `3.0`.
pub(super) fn whole(text: &str) -> Option<i64> {
    let text = text.trim();
    text.strip_suffix(".0").unwrap_or(text).parse().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A set of (item, id, dependency, tuple); every question's text is unlike the others.
    pub(in super::super) fn set(rows: &[(&str, i64, &str, &str)]) -> Set {
        let mut text = "item_id,proposition_id,dependency,tuple,question_natural_language\n".to_owned();
        for (at, (item, id, dependency, tuple)) in rows.iter().enumerate() {
            text += &format!("{item},{id},\"{dependency}\",\"{tuple}\",Is it {at}?\n");
        }
        Set::of("set.csv", &Table::of("set.csv", text.as_bytes()).unwrap()).unwrap()
    }

    fn refused(csv: &str) -> String {
        Table::of("s.csv", csv.as_bytes()).and_then(|table| Set::of("s.csv", &table)).unwrap_err().message
    }

    #[test]
    fn categories_are_the_tuples_beginnings() {
        let set = set(&[("a", 1, "0", "entity - whole (dog, (big))"), ("a", 2, " 1, 0 ", " global  (style) "), ("b", 1, "0", "other")]);
        let found: Vec<_> = set.questions.iter().map(|q| (q.level2.as_str(), level1(&q.level2), q.parents.as_slice())).collect();
        assert_eq!(found, [("entity - whole", "entity", &[][..]), ("global", "global", &[1]), ("other", "other", &[])]);
        assert_eq!(set.items, ["a", "b"]);
        assert!(set.notes().is_empty(), "{:?}", set.notes());
    }

    #[test]
    fn a_bad_row_is_named_with_its_column_and_the_rule() {
        let head = "item_id,proposition_id,dependency,tuple,question_natural_language\n";
        for (rows, words) in [
            ("", "has no rows"),
            ("a,1,0,t,Q\nb,x,0,t,Q\n", "row 2 (line 3), column `proposition_id`: must be a whole number (found \"x\")"),
            ("a,1.5,0,t,Q\n", "column `proposition_id`: must be a whole number"),
            ("a,1,\"1,\",t,Q\n", "column `dependency`: must be numbers of questions with commas between, 0 for none (found \"1,\")"),
            (",1,0,t,Q\n", "column `item_id`: must be text"),
            ("a,1,0,NA,Q\n", "column `tuple`: must be text"),
            ("a,1,0,t,\n", "column `question_natural_language`: must be text"),
        ] {
            let message = refused(&format!("{head}{rows}"));
            assert!(message.starts_with("s.csv: ") && message.contains(words), "{message}");
        }
        for column in ["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"] {
            let message = refused(&head.replace(column, "else"));
            assert!(message.contains(&format!("no column `{column}`")), "{message}");
        }
        assert_eq!([whole("3"), whole(" 3.0 "), whole("3.5"), whole("")], [Some(3), Some(3), None, None]);
    }

    #[test]
    fn the_same_id_twice_is_refused_unless_it_says_the_same() {
        let set = set(&[("a", 1, "0", "global (x)"), ("a", 2, "0", "global (x)"), ("a", 1, "0", "global (x)")]);
        let message = set.unambiguous().unwrap_err().message;
        assert!(message.contains("row 3 (line 4) has item_id \"a\" with proposition_id 1, which row 1 (line 2) has already"), "{message}");
        // The last one counts, in the place of the first.
        assert_eq!(set.by_item()[0].iter().map(|q| (q.id, q.place.row)).collect::<Vec<_>>(), [(1, 3), (2, 2)]);
        let mut same = set;
        same.questions[2].text = same.questions[0].text.clone();
        assert!(same.unambiguous().is_ok());
        assert_eq!(same.notes().iter().map(|note| (note.kind, note.count)).collect::<Vec<_>>(), [("repeated_question", 1)]);
    }

    #[test]
    fn what_is_odd_is_told() {
        let set = set(&[("1", 1, "2", "t"), ("1", 2, "1", "t"), ("2.5", 1, "7,8", "t"), ("1", 3, "3", "t")]);
        let kinds: Vec<_> = set.notes().iter().map(|note| (note.kind, note.count)).collect();
        assert_eq!(kinds, [("split_item", 1), ("unknown_parent", 2), ("cycle", 3), ("dotted_item", 1), ("numbers", 2)]);
        assert!(set.notes()[1].text.contains("2.5/1 on 7, 2.5/1 on 8"), "{:?}", set.notes());
    }

    #[test]
    fn ancestors_are_found_in_any_order() {
        let set = set(&[("a", 1, "2", "t"), ("a", 2, "3,4", "t"), ("a", 3, "0", "t"), ("a", 4, "9", "t")]);
        let mut found = ancestors(&set.by_item()[0]);
        found.iter_mut().for_each(|ancestors| ancestors.sort_unstable());
        assert_eq!(found, [vec![1, 2, 3], vec![2, 3], vec![], vec![]]);
    }
}
