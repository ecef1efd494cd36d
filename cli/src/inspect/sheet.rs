//! A data set on one self-contained HTML page: pictures with their captions and sizes, and histograms.

use std::fmt::Write;

use ella_dataset::quantile_rank;

use super::data::{DataFacts, Looked, Shown};
use crate::report::{document, escape};

/// Bars of a histogram.
const BARS: usize = 32;
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 110.0;

const OWN: &str = "
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 18px 16px; }
.sheet figure { margin: 0; }
.sheet img { width: 100%; height: auto; }
.sheet figcaption { font-size: 13px; line-height: 1.4; margin-top: 6px; overflow-wrap: anywhere; }
.sheet figcaption p { margin: 4px 0; }
.none { border: 1px dashed var(--line); border-radius: 6px; padding: 28px 10px; text-align: center; color: var(--soft); }
.hists { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 8px 28px; }
rect { fill: var(--blue); }
";

/// The whole document.
pub(super) fn page(facts: &DataFacts, looked: &Looked) -> String {
    let title = facts.data.rsplit('/').next().unwrap_or(&facts.data);
    let mut body = format!("<h1>{}</h1>\n<pre class=\"scroll soft\" tabindex=\"0\">{}</pre>\n", escape(title), escape(facts.text()));
    let _ = writeln!(
        body,
        "<h2>Lengths and sizes</h2>\n<p class=\"soft\">of {} rows, spread over the data set</p>\n<div class=\"hists\">",
        looked.rows
    );
    for (name, values) in [
        ("words in a caption", &looked.words),
        ("width of the original, pixels", &looked.widths),
        ("height of the original, pixels", &looked.heights),
        ("width over height", &looked.aspects),
    ] {
        body += &histogram(name, values);
    }
    body += "</div>\n<h2>Samples</h2>\n<div class=\"sheet\">\n";
    looked.shown.iter().for_each(|shown| body += &figure(shown));
    body += "</div>\n";
    document(title, OWN, &body)
}

fn figure(shown: &Shown) -> String {
    let key = escape(&shown.key);
    let picture = match &shown.picture {
        Some(url) => format!("<img loading=\"lazy\" alt=\"{key}\" src=\"{url}\">"),
        None => "<div class=\"none\">no picture is stored</div>".to_owned(),
    };
    let by = |(width, height): (u32, u32)| format!("{width}×{height}");
    let sizes: Vec<String> = shown.original.map(by).into_iter().chain(shown.size.map(by)).collect();
    let captions: String =
        shown.captions.iter().filter(|caption| !caption.is_empty()).map(|caption| format!("<p>{}</p>", escape(caption))).collect();
    format!("<figure>{picture}<figcaption><code>{key}</code> <small>{}</small>{captions}</figcaption></figure>\n", sizes.join(" → "))
}

/// Bars over equal intervals up to the 99th percentile; what lies above counts in the last one.
fn histogram(name: &str, values: &[f64]) -> String {
    if values.is_empty() {
        return String::new();
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |percent: u64| sorted[quantile_rank(sorted.len() as u64, percent) as usize - 1];
    let (low, high) = (sorted[0], at(99).max(sorted[0] + 1e-9));
    let mut bars = [0usize; BARS];
    for value in values {
        let bar = ((value - low) / (high - low) * BARS as f64) as usize;
        bars[bar.min(BARS - 1)] += 1;
    }
    let most = bars.iter().max().copied().unwrap_or(1).max(1) as f64;
    let each = WIDTH / BARS as f64;
    let mut svg =
        format!("<figure style=\"margin:0\"><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{name}\">\n", HEIGHT + 20.0);
    for (i, count) in bars.iter().enumerate() {
        let height = HEIGHT * *count as f64 / most;
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"/>",
            i as f64 * each,
            HEIGHT - height,
            each - 1.0
        );
    }
    let label = |value: f64| if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") };
    let _ = write!(
        svg,
        "<text class=\"tick\" x=\"0\" y=\"{y}\">{}</text><text class=\"tick\" x=\"{WIDTH}\" y=\"{y}\" text-anchor=\"end\">{}</text></svg>\n\
         <figcaption><small>{name}: 5 % have {} or less, half have {}, 95 % have {}</small></figcaption></figure>\n",
        label(low),
        label(high),
        label(at(5)),
        label(at(50)),
        label(at(95)),
        y = HEIGHT + 15.0
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_every_value_and_odd_ones_do_no_harm() {
        assert_eq!(histogram("x", &[]), "");
        for values in [vec![3.0], vec![2.0; 9], (0..1000).map(f64::from).collect::<Vec<_>>()] {
            let svg = histogram("x", &values);
            assert_eq!(svg.matches("<rect").count(), BARS);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn quantiles_are_those_of_the_captions_statistics() {
        let words: Vec<usize> = (0..96).map(|n| n * n % 97).collect();
        let captions = words.iter().map(|words| "x ".repeat(*words));
        let stats = ella_dataset::caption_stats(captions, None).words;
        let html = histogram("words", &words.iter().map(|words| *words as f64).collect::<Vec<_>>());
        let shown = |n: u64| if n < 10 { format!("{n}.00") } else { n.to_string() };
        let said = format!("5 % have {} or less, half have {}, 95 % have {}<", shown(stats.p5), shown(stats.median), shown(stats.p95));
        assert!(html.contains(&said), "{said}: {html}");
    }

    #[test]
    fn captions_cannot_break_the_page() {
        let shown = Shown { key: "a\"b".into(), captions: vec!["<script>\u{1b}[31m\0".into()], original: None, size: None, picture: None };
        let html = figure(&shown);
        assert!(!html.contains(['\u{1b}', '\0']) && html.contains("\\u{1b}[31m\\u{0}"), "{html}");
        assert!(!html.contains("<script>") && html.contains("a&quot;b"), "{html}");
    }
}
