//! Scores with their intervals on a common scale, for the page.

use std::fmt::Write;

use super::estimate::Estimate;
use crate::report::escape;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 690.0;
const ROW: f64 = 30.0;
const TOP: f64 = 12.0;
/// Of the modes.
pub(super) const HUES: [&str; 2] = ["var(--blue)", "var(--orange)"];

/// A name, and each mode's number, if it has one.
pub(super) type Bar = (String, Vec<(usize, Estimate)>);

/// Lines from end to end of the intervals, with a dot at the value; 0 to 100 %.
pub(super) fn svg(bars: &[Bar]) -> String {
    let height = TOP + ROW * bars.len() as f64;
    let x = |value: f64| LEFT + WIDTH * value.clamp(0.0, 100.0) / 100.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"Scores with their 95 % intervals\">\n",
        LEFT + WIDTH + 16.0,
        height + 26.0
    );
    for tick in (0..=100u8).step_by(20) {
        let (at, y) = (x(f64::from(tick)), height + 18.0);
        let _ = writeln!(
            svg,
            "<path class=\"rule\" d=\"M{at:.1} {TOP}V{height}\"/><text class=\"tick\" x=\"{at:.1}\" y=\"{y}\" text-anchor=\"middle\">{tick}</text>"
        );
    }
    for (row, (name, modes)) in bars.iter().enumerate() {
        let middle = TOP + ROW * (row as f64 + 0.5);
        let _ = writeln!(
            svg,
            "<text class=\"name\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 12.0,
            middle + 4.0,
            escape(name)
        );
        for (mode, estimate) in modes {
            let (y, hue) = (middle - 5.0 + 10.0 * *mode as f64, HUES[*mode % HUES.len()]);
            if let Some([low, high]) = estimate.interval {
                let _ = writeln!(svg, "<path d=\"M{:.1} {y:.1}H{:.1}\" style=\"stroke:{hue};stroke-width:2.5\"/>", x(low), x(high));
            }
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"3.6\" style=\"fill:{hue}\"><title>{:.2}</title></circle>",
                x(estimate.value),
                estimate.value
            );
        }
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_drawn_within_the_picture() {
        let estimate = |value, interval| Estimate { value, interval, of: 3 };
        let bars =
            [("a<b".to_owned(), vec![(0, estimate(0.0, Some([0.0, 12.0]))), (1, estimate(100.0, None))]), ("none".to_owned(), Vec::new())];
        let svg = svg(&bars);
        assert_eq!((svg.matches("<circle").count(), svg.matches("stroke:var").count()), (2, 1));
        assert!(svg.contains("a&lt;b") && svg.contains("cx=\"190.0\"") && svg.contains("cx=\"880.0\"") && !svg.contains("NaN"), "{svg}");
    }
}
