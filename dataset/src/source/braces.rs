//! Brace expansion as in bash and WebDataset: `{00000..00099}`, `{a,b}`.

/// No location stands for more files than this.
pub(super) const MOST: usize = 1_000_000;

/// All that a text with braces stands for, in its order. Braces without a comma or range stand for themselves.
pub(super) fn expand(text: &str) -> Result<Vec<String>, String> {
    let Some((open, close)) = first_group(text) else { return Ok(vec![text.to_owned()]) };
    let (head, body, tail) = (&text[..open], &text[open + 1..close], &text[close + 1..]);
    let too_many = || format!("the braces stand for more than {MOST} files; name fewer, or a folder");
    let middles = match range(body) {
        Some(numbers) => numbers.ok_or_else(too_many)?,
        None => {
            let mut all = Vec::new();
            for part in alternatives(body) {
                all.extend(expand(part)?);
                if all.len() > MOST {
                    return Err(too_many());
                }
            }
            all
        }
    };
    let tails = expand(tail)?;
    if middles.len().saturating_mul(tails.len()) > MOST {
        return Err(too_many());
    }
    Ok(middles.iter().flat_map(|middle| tails.iter().map(move |tail| format!("{head}{middle}{tail}"))).collect())
}

/// Where the first braces that stand for something else open and close.
fn first_group(text: &str) -> Option<(usize, usize)> {
    text.match_indices('{').find_map(|(open, _)| {
        let close = open + closing(&text[open..])?;
        let body = &text[open + 1..close];
        (range(body).is_some() || alternatives(body).len() > 1).then_some((open, close))
    })
}

/// Where the brace that a text begins with is closed.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.bytes().position(|b| {
        depth += i32::from(b == b'{') - i32::from(b == b'}');
        depth == 0
    })
}

/// The parts between commas that are in no deeper braces.
fn alternatives(body: &str) -> Vec<&str> {
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, b) in body.bytes().enumerate() {
        depth += i32::from(b == b'{') - i32::from(b == b'}');
        if b == b',' && depth == 0 {
            parts.push(&body[from..at]);
            from = at + 1;
        }
    }
    parts.push(&body[from..]);
    parts
}

/// The numbers of `3..7` or `007..012`, padded to the longer bound if either begins with a zero; `Some(None)` for too many.
fn range(body: &str) -> Option<Option<Vec<String>>> {
    let (first, last) = body.split_once("..")?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return None;
    }
    let padded = [first, last].iter().any(|bound| bound.len() > 1 && bound.starts_with('0'));
    let width = if padded { first.len().max(last.len()) } else { 0 };
    let (Ok(a), Ok(b)) = (first.parse::<u64>(), last.parse::<u64>()) else { return Some(None) };
    if a.abs_diff(b) >= MOST as u64 {
        return Some(None);
    }
    let number = |n: u64| format!("{n:0width$}");
    Some(Some(if a <= b { (a..=b).map(number).collect() } else { (b..=a).rev().map(number).collect() }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn braces_stand_for_what_bash_makes_of_them() {
        for (text, expected) in [
            ("plain.tar", "plain.tar"),
            ("{a,b}.tar", "a.tar b.tar"),
            ("x{1..3}", "x1 x2 x3"),
            ("{08..11}.tar", "08.tar 09.tar 10.tar 11.tar"),
            ("{0..10..5}", "{0..10..5}"),
            ("{3..1}", "3 2 1"),
            ("{000..2}", "000 001 002"),
            ("{a,b}{0..1}", "a0 a1 b0 b1"),
            ("{a{1..2},c}", "a1 a2 c"),
            ("{a,{b,c}}d", "ad bd cd"),
            ("{,x}y", "y xy"),
            ("{one}", "{one}"),
            ("{{a,b}}", "{a} {b}"),
            ("{a,b", "{a,b"),
            ("a}{b,c}", "a}b a}c"),
            ("{a..c}", "{a..c}"),
            ("{-1..1}", "{-1..1}"),
        ] {
            assert_eq!(expand(text).unwrap().join(" "), expected, "{text}");
        }
    }

    #[test]
    fn what_stands_for_too_many_is_refused_before_it_is_made() {
        assert_eq!(expand("{0..999999}").unwrap().len(), MOST);
        for text in ["{0..1000000}", "{1..1000}{1..1001}", "{0..99999999999999999999}", "{0..18446744073709551615}"] {
            assert!(expand(text).unwrap_err().contains("more than 1000000"), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_text_expands_or_is_refused(text in "[a{},.0-9é]{0,24}") {
            if let Ok(all) = expand(&text) {
                prop_assert!(!all.is_empty() && all.len() <= MOST);
            }
        }
    }
}
