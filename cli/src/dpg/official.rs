//! Scores as `dpg_bench/compute_dpg_bench.py` of the official repository (TencentQQGYLab/ELLA) reckons them in a single process, with all that is
//! odd about it:
//!
//! - The first row of the set is dropped, though pandas has taken the header already (issue 61 there). A prompt with a question that depends on
//!   the one of that row raises a `KeyError`, unless another parent before it in the list was a no.
//! - Rows of an item that are not together: only the last ones count.
//! - A question whose parent was a no counts as no. That is done once, in the order of the rows, so it goes on to grandchildren only where
//!   parents come first.
//! - Whatever raises leaves the mean, and so does a picture that is not there.
//! - Categories count the last tile alone (issue 60 there), before dependencies take anything away.
//!
//! What it does in several processes cannot be reckoned anew: each goes through its own set of category names, in an order of strings' hashes
//! that differs from process to process, so the categories' scores are mixed up. The mean is the same then.

use std::collections::{BTreeMap, HashMap};

use super::answers::{Answers, Item};
use super::judged::{Judged, Prompt, Tally, Why};
use super::set::{Question, Set};

/// Judges every item.
pub(super) fn judge<'a>(set: &'a Set, answers: &Answers, tiles: u8) -> Judged<'a> {
    let mut judged = Judged::default();
    for (item, questions) in set.items.iter().zip(known(set)) {
        match prompt(item, &questions, answers.of(item), tiles) {
            Ok(prompt) => judged.prompts.push(prompt),
            Err(why) => judged.absent.push((item, why)),
        }
    }
    judged
}

/// What the script's dictionaries hold of every item, in their order.
fn known(set: &Set) -> Vec<Vec<&Question>> {
    let mut known: Vec<Vec<&Question>> = vec![Vec::new(); set.items.len()];
    let mut previous = None;
    for question in set.questions.iter().skip(1) {
        let of = &mut known[question.item];
        if previous != Some(question.item) {
            of.clear();
        }
        previous = Some(question.item);
        // A key that is there keeps its place and gets a new value.
        match of.iter_mut().find(|there| there.id == question.id) {
            Some(there) => *there = question,
            None => of.push(question),
        }
    }
    known
}

fn prompt<'a>(name: &'a str, questions: &[&'a Question], item: Option<&Item>, tiles: u8) -> Result<Prompt<'a>, Why> {
    let item = item.ok_or(Why::Missing)?;
    if let Some(error) = &item.error {
        return Err(Why::Unreadable(error.clone()));
    }
    if questions.is_empty() {
        return Err(Why::Dropped);
    }
    let (mut scores, mut last) = (Vec::new(), HashMap::new());
    for tile in 0..tiles {
        last = HashMap::new();
        for question in questions {
            let yes = item.yes(tile, question.id).ok_or(Why::Unanswered { tile, question: question.id })?;
            last.insert(question.id, yes);
        }
        scores.push(after_dependencies(questions, last.clone())?);
    }
    let mut categories: BTreeMap<&str, Tally> = BTreeMap::new();
    for question in questions {
        categories.entry(&question.level2).or_default().add(last.get(&question.id).copied().unwrap_or(false));
    }
    Ok(Prompt::new(name, scores, categories))
}

/// A tile's score, once the questions whose parents were a no are a no themselves.
fn after_dependencies(questions: &[&Question], mut yes: HashMap<i64, bool>) -> Result<f64, Why> {
    for question in questions {
        for parent in &question.parents {
            let stands = *yes.get(parent).ok_or(Why::NoParent { question: question.id, parent: *parent })?;
            if !stands {
                yes.insert(question.id, false);
                break;
            }
        }
    }
    Ok(yes.values().filter(|yes| **yes).count() as f64 / yes.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::super::answers::tests::answers;
    use super::super::set::tests::set;
    use super::*;

    /// The scores of one tile, for a set whose first row is another item's.
    fn scores(rows: &[(&str, i64, &str, &str)], told: &[(&str, u8, i64, &str)]) -> Vec<(String, Result<f64, Why>)> {
        let set = set(&[&[("first", 1, "0", "t")][..], rows].concat());
        let answers = answers(told);
        let judged = judge(&set, &answers, 1);
        let scored = judged.prompts.into_iter().map(|prompt| (prompt.item.to_owned(), Ok(prompt.score)));
        let absent = judged.absent.into_iter().filter(|(item, _)| *item != "first").map(|(item, why)| (item.to_owned(), Err(why)));
        scored.chain(absent).collect()
    }

    #[test]
    fn a_no_is_handed_on_in_the_order_of_the_rows_only() {
        let told = [("a", 0, 1, "no"), ("a", 0, 2, "yes"), ("a", 0, 3, "yes")];
        let down = [("a", 1, "0", "t"), ("a", 2, "1", "t"), ("a", 3, "2", "t")];
        assert_eq!(scores(&down, &told), [("a".to_owned(), Ok(0.0))]);
        // The grandchild comes before its parent, which is still a yes then.
        let up = [("a", 3, "2", "t"), ("a", 2, "1", "t"), ("a", 1, "0", "t")];
        assert_eq!(scores(&up, &told), [("a".to_owned(), Ok(1.0 / 3.0))]);
    }

    #[test]
    fn a_parent_that_is_not_there_raises_unless_a_no_comes_before_it() {
        let rows = [("a", 1, "0", "t"), ("a", 2, "1,9", "t"), ("b", 1, "0", "t"), ("b", 2, "9,1", "t")];
        let told = |first| [("a", 0, 1, first), ("a", 0, 2, "yes"), ("b", 0, 1, first), ("b", 0, 2, "yes")];
        let gone = || Err(Why::NoParent { question: 2, parent: 9 });
        assert_eq!(scores(&rows, &told("no")), [("a".to_owned(), Ok(0.0)), ("b".to_owned(), gone())]);
        assert_eq!(scores(&rows, &told("yes")), [("a".to_owned(), gone()), ("b".to_owned(), gone())]);
    }

    #[test]
    fn the_first_row_is_dropped() {
        let told = answers(&[("a", 0, 1, "no"), ("a", 0, 2, "yes"), ("b", 0, 1, "yes")]);
        let alone = set(&[("a", 1, "0", "t"), ("a", 2, "0", "t"), ("b", 1, "0", "t")]);
        let judged = judge(&alone, &told, 1);
        assert_eq!(judged.prompts.iter().map(|prompt| prompt.score).collect::<Vec<_>>(), [1.0, 1.0]);
        let needed = set(&[("a", 1, "0", "t"), ("a", 2, "1", "t"), ("b", 1, "0", "t")]);
        assert_eq!(judge(&needed, &told, 1).absent, [("a", Why::NoParent { question: 2, parent: 1 })]);
        let only = set(&[("a", 1, "0", "t"), ("b", 1, "0", "t")]);
        assert_eq!(judge(&only, &told, 1).absent, [("a", Why::Dropped)]);
    }

    #[test]
    fn rows_apart_are_forgotten() {
        let rows = [("a", 1, "0", "t"), ("a", 2, "0", "t"), ("b", 1, "0", "t"), ("a", 3, "0", "t")];
        let told = [("a", 0, 1, "no"), ("a", 0, 2, "no"), ("a", 0, 3, "yes"), ("b", 0, 1, "no")];
        assert_eq!(scores(&rows, &told), [("a".to_owned(), Ok(1.0)), ("b".to_owned(), Ok(0.0))]);
    }

    #[test]
    fn categories_count_the_last_tile_before_dependencies() {
        let set = set(&[("x", 1, "0", "t"), ("a", 1, "0", "entity - whole (dog)"), ("a", 2, "1", "global (photo)")]);
        let told = answers(&[("a", 0, 1, "yes"), ("a", 0, 2, "no"), ("a", 1, 1, "no"), ("a", 1, 2, "yes")]);
        let judged = judge(&set, &told, 2);
        let found: Vec<_> = judged.prompts[0].categories.iter().map(|(name, tally)| (*name, tally.yes, tally.of)).collect();
        assert_eq!(found, [("entity - whole", 0, 1), ("global", 1, 1)]);
        assert_eq!(judged.prompts[0].tiles, [0.5, 0.0]);
    }
}
