//! Statistics of captions: by hand, merged from parts, and of any text at all.
#![allow(clippy::unwrap_used, missing_docs)]

use ella_dataset::{CaptionCounter, CaptionStats, caption_stats, is_whole, sentences};
use proptest::collection::vec;
use proptest::prelude::*;

const CUP: &str = "A cup of espresso seen from above on a wooden table. The cup is dark red outside and white inside.";

#[test]
fn sentences_end_where_readers_see_an_end() {
    for (text, expected) in [
        ("", vec![]),
        (" \n", vec![]),
        ("One. Two! Three?", vec!["One.", "Two!", "Three?"]),
        ("It costs 3.50 euros. \"Stop.\" He left", vec!["It costs 3.50 euros.", "\"Stop.\"", "He left"]),
        ("Dogs, cats, etc. are here.", vec!["Dogs, cats, etc. are here."]),
        ("No end", vec!["No end"]),
        ("Well...  So it\u{a0}is.\n", vec!["Well...", "So it\u{a0}is."]),
    ] {
        assert_eq!(sentences(text), expected, "{text:?}");
    }
    assert!(is_whole("He said (twice).") && is_whole("\"Yes!\" ") && !is_whole("He said") && !is_whole(""));
}

#[test]
fn captions_are_counted_as_by_hand() {
    let stats = caption_stats([CUP, "Red red Red,"], Some(&|caption: &str| caption.len()));
    assert_eq!(stats.captions, 2);
    assert_eq!((stats.words.mean, stats.words.p5, stats.words.median, stats.words.p95, stats.words.most), (11.5, 3, 3, 20, 20));
    assert_eq!((stats.histogram[0], stats.histogram[2], stats.histogram.iter().sum::<u64>()), (1, 1, 2));
    assert_eq!((stats.sentences, stats.characters), (1.5, (CUP.len() + 12) as f64 / 2.0));
    assert_eq!(stats.tokens, Some((CUP.len() + 12) as f64 / 2.0));
    // a cup of espresso seen from above on wooden table the is dark red outside and white inside
    assert_eq!((stats.distinct_words, stats.more_distinct_words), (18, false));
}

#[test]
fn parts_of_speech_are_those_of_a_dictionary() {
    let speech = caption_stats(["The old dog's tail lies quickly under the small table (a xyzzy)."], None).speech;
    // dog, tail, table; old, quickly, small; lies; under.
    assert_eq!((speech.nouns, speech.adjectives, speech.verbs, speech.prepositions, speech.untagged), (3.0, 3.0, 1.0, 1.0, 1.0));
}

#[test]
fn nothing_and_the_longest_have_statistics_too() {
    let none = caption_stats(Vec::<String>::new(), None);
    assert_eq!((none.captions, none.words.mean, none.words.p95, none.tokens), (0, 0.0, 0, None));
    let long = "word ".repeat(100_000);
    let stats = caption_stats([long.as_str(), ""], None);
    assert_eq!((stats.words.most, stats.words.p5, stats.histogram.last(), stats.histogram[0]), (100_000, 0, Some(&1), 1));
    assert_eq!(stats.distinct_words, 1);
}

#[test]
fn the_table_stands_beside_the_papers() {
    let text = caption_stats([CUP], Some(&|_: &str| 25)).to_string();
    for line in [
        "words                     20.00       9.81      49.87       9.83      50.71",
        "tokens                    25.00      11.88      62.33      11.89      63.05",
        "1 captions, 18 distinct words",
        "  20–29                 1 ████████████████████████████████████████",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(caption_stats([CUP], None).to_string().contains("tokens                        -"));
}

proptest! {
    #[test]
    fn counts_add_up_however_captions_are_dealt(captions in vec("(\\PC|[a-c .!?'\n]){0,40}", 0..12), cut in 0usize..12) {
        let whole = caption_stats(&captions, Some(&|caption: &str| caption.len()));
        let (left, right) = captions.split_at(cut.min(captions.len()));
        let tokens = |caption: &str| caption.len();
        let count = |part: &[String]| {
            let mut counter = CaptionCounter::new(Some(&tokens));
            part.iter().for_each(|caption| counter.add(caption));
            counter
        };
        let mut counter = count(left);
        counter.merge(count(right));
        prop_assert_eq!(&counter.finish(), &whole);
        prop_assert_eq!(whole.captions, captions.len() as u64);
        prop_assert_eq!(whole.histogram.iter().sum::<u64>(), whole.captions);
        prop_assert!(whole.words.p5 <= whole.words.median && whole.words.median <= whole.words.p95 && whole.words.p95 <= whole.words.most);
        let json = serde_json::to_string(&whole).unwrap();
        prop_assert_eq!(serde_json::from_str::<CaptionStats>(&json).unwrap(), whole);
        for caption in &captions {
            // Nothing but white space is lost between sentences.
            let joined: String = sentences(caption).concat().split_whitespace().collect();
            prop_assert_eq!(joined, caption.split_whitespace().collect::<String>());
        }
    }
}
