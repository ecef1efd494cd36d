//! Scores as the official script means them, its defects mended:
//!
//! - All rows count, the first one too.
//! - A question counts as no if any of those that it depends on, near or far, was a no, in whatever order the rows stand. A dependency on a
//!   question that is not there is passed over: nobody said no to it.
//! - Categories count all tiles, as the mean does, before dependencies take anything away.
//! - Every prompt of the set is in every mean. One whose picture is not there or cannot be looked at has 0, and a question without an
//!   answer is a no.

use std::collections::BTreeMap;

use super::answers::{Answers, Item};
use super::judged::{Judged, Prompt, Tally, Why};
use super::set::{Question, Set, ancestors};

/// Judges every item.
pub(super) fn judge<'a>(set: &'a Set, answers: &Answers, tiles: u8) -> Judged<'a> {
    let mut judged = Judged::default();
    for (name, questions) in set.items.iter().zip(set.by_item()) {
        let item = answers.of(name).filter(|item| item.error.is_none());
        judged.prompts.push(prompt(name, &questions, item, tiles));
        judged.absent.extend(why(&questions, answers.of(name), tiles).map(|why| (name.as_str(), why)));
    }
    judged
}

fn prompt<'a>(name: &'a str, questions: &[&'a Question], item: Option<&Item>, tiles: u8) -> Prompt<'a> {
    let ancestors = ancestors(questions);
    let (mut scores, mut categories) = (Vec::new(), BTreeMap::<&str, Tally>::new());
    for tile in 0..tiles {
        let yes: Vec<bool> = questions.iter().map(|question| item.and_then(|item| item.yes(tile, question.id)).unwrap_or(false)).collect();
        for (question, yes) in questions.iter().zip(&yes) {
            categories.entry(&question.level2).or_default().add(*yes);
        }
        let stands = |(yes_here, above): &(&bool, &Vec<usize>)| **yes_here && above.iter().all(|ancestor| yes[*ancestor]);
        scores.push(yes.iter().zip(&ancestors).filter(stands).count() as f64 / questions.len() as f64);
    }
    Prompt::new(name, scores, categories)
}

/// Why a prompt, or a part of it, counts as no.
fn why(questions: &[&Question], item: Option<&Item>, tiles: u8) -> Option<Why> {
    let Some(item) = item else { return Some(Why::Missing) };
    if let Some(error) = &item.error {
        return Some(Why::Unreadable(error.clone()));
    }
    let asked = (0..tiles).flat_map(|tile| questions.iter().map(move |question| (tile, question.id)));
    let mut open = asked.filter(|(tile, question)| item.yes(*tile, *question).is_none());
    open.next().map(|(tile, question)| Why::Unanswered { tile, question })
}

/// Each test is a difference from [`super::official`].
#[cfg(test)]
mod tests {
    use super::super::answers::tests::answers;
    use super::super::official;
    use super::super::set::tests::set;
    use super::*;

    type Rows<'a> = &'a [(&'a str, i64, &'a str, &'a str)];
    type Told<'a> = &'a [(&'a str, u8, i64, &'a str)];

    /// The scores of the prompts, official and correct.
    fn both(rows: Rows<'_>, told: Told<'_>, tiles: u8) -> [Vec<(String, f64)>; 2] {
        let (set, answers) = (set(rows), answers(told));
        [official::judge(&set, &answers, tiles), judge(&set, &answers, tiles)]
            .map(|judged| judged.prompts.into_iter().map(|prompt| (prompt.item.to_owned(), prompt.score)).collect())
    }

    fn scores<const N: usize>(scores: [(&str, f64); N]) -> Vec<(String, f64)> {
        scores.map(|(item, score)| (item.to_owned(), score)).to_vec()
    }

    #[test]
    fn the_first_row_counts() {
        let rows = [("a", 1, "0", "t"), ("a", 2, "0", "t"), ("b", 1, "0", "t")];
        let [official, correct] = both(&rows, &[("a", 0, 1, "no"), ("a", 0, 2, "yes"), ("b", 0, 1, "yes")], 1);
        assert_eq!((official, correct), (scores([("a", 1.0), ("b", 1.0)]), scores([("a", 0.5), ("b", 1.0)])));
    }

    #[test]
    fn what_depends_on_the_first_row_stays_in_the_mean() {
        let rows = [("a", 1, "0", "t"), ("a", 2, "1", "t"), ("b", 1, "0", "t")];
        let [official, correct] = both(&rows, &[("a", 0, 1, "yes"), ("a", 0, 2, "yes"), ("b", 0, 1, "yes")], 1);
        assert_eq!((official, correct), (scores([("b", 1.0)]), scores([("a", 1.0), ("b", 1.0)])));
    }

    #[test]
    fn a_no_is_handed_on_to_all_descendants_in_any_order() {
        let rows = [("x", 1, "0", "t"), ("a", 3, "2", "t"), ("a", 2, "1", "t"), ("a", 1, "0", "t")];
        let told = [("x", 0, 1, "yes"), ("a", 0, 1, "no"), ("a", 0, 2, "yes"), ("a", 0, 3, "yes")];
        let [official, correct] = both(&rows, &told, 1);
        assert_eq!((official, correct), (scores([("a", 1.0 / 3.0)]), scores([("x", 1.0), ("a", 0.0)])));
    }

    #[test]
    fn a_dependency_on_nothing_is_passed_over() {
        let rows = [("x", 1, "0", "t"), ("a", 1, "0", "t"), ("a", 2, "9,1", "t")];
        let told = [("x", 0, 1, "yes"), ("a", 0, 1, "yes"), ("a", 0, 2, "yes")];
        let [official, correct] = both(&rows, &told, 1);
        assert_eq!((official, correct), (scores([]), scores([("x", 1.0), ("a", 1.0)])));
    }

    #[test]
    fn rows_of_an_item_belong_together_wherever_they_stand() {
        let rows = [("x", 1, "0", "t"), ("a", 1, "0", "t"), ("x", 2, "0", "t"), ("a", 2, "1", "t")];
        let told = [("x", 0, 1, "yes"), ("x", 0, 2, "yes"), ("a", 0, 1, "no"), ("a", 0, 2, "yes")];
        let [official, correct] = both(&rows, &told, 1);
        assert_eq!((official, correct), (scores([("x", 1.0)]), scores([("x", 1.0), ("a", 0.0)])));
    }

    #[test]
    fn a_missing_picture_is_a_zero_in_the_mean_and_in_its_categories() {
        let rows = [("x", 1, "0", "global (a)"), ("x", 2, "0", "global (a)"), ("a", 1, "0", "global (a)"), ("b", 1, "0", "global (a)")];
        let told = [("x", 0, 1, "yes"), ("x", 0, 2, "yes"), ("b", 0, 1, "yes")];
        let [official, correct] = both(&rows, &told, 1);
        assert_eq!((official, correct), (scores([("x", 1.0), ("b", 1.0)]), scores([("x", 1.0), ("a", 0.0), ("b", 1.0)])));
        let (set, answers) = (set(&rows), answers(&told));
        let judged = judge(&set, &answers, 1);
        assert_eq!(judged.prompts[1].categories["global"], Tally { yes: 0, of: 1 });
        assert_eq!(judged.absent, [("a", Why::Missing)]);
    }

    #[test]
    fn a_question_without_an_answer_is_a_no_and_its_prompt_stays() {
        let rows = [("x", 1, "0", "t"), ("a", 1, "0", "t"), ("a", 2, "1", "t"), ("a", 3, "0", "t")];
        let told = [("x", 0, 1, "yes"), ("a", 0, 2, "yes"), ("a", 0, 3, "yes")];
        let [official, correct] = both(&rows, &told, 1);
        assert_eq!((official, correct), (scores([]), scores([("x", 1.0), ("a", 1.0 / 3.0)])));
    }

    #[test]
    fn categories_count_all_tiles() {
        let rows = [("x", 1, "0", "t"), ("a", 1, "0", "global (a)")];
        let told = [("x", 0, 1, "yes"), ("x", 1, 1, "yes"), ("a", 0, 1, "yes"), ("a", 1, 1, "no")];
        let (set, answers) = (set(&rows), answers(&told));
        assert_eq!(official::judge(&set, &answers, 2).prompts[0].categories["global"], Tally { yes: 0, of: 1 });
        assert_eq!(judge(&set, &answers, 2).prompts[1].categories["global"], Tally { yes: 1, of: 2 });
    }

    #[test]
    fn where_nothing_is_odd_both_agree() {
        let rows = [("x", 1, "0", "t"), ("a", 1, "0", "t"), ("a", 2, "1,0", "t"), ("a", 3, "1,2", "t")];
        for (first, second) in [("yes", "yes"), ("yes", "no"), ("no", "yes")] {
            let told = [("x", 0, 1, "yes"), ("a", 0, 1, first), ("a", 0, 2, second), ("a", 0, 3, "yes")];
            let [official, correct] = both(&rows, &told, 1);
            assert_eq!(official[0], correct[1]);
        }
    }
}
