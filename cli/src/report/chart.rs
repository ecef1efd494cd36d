//! Curves as inline SVG. Colours are the page's classes, so that they follow light and dark.

use std::fmt::Write;

/// Inner size of a chart, and the room around it for labels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 34.0;
const RIGHT: f64 = 14.0;
/// Room for a mark's word.
const WORD: f64 = 170.0;

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub(super) struct Chart<'a> {
    /// What the chart shows, for readers who cannot see it.
    pub(super) label: &'a str,
    pub(super) height: f64,
    /// The last step.
    pub(super) steps: f64,
    /// Curves by class, drawn in this order.
    pub(super) lines: Vec<(&'a str, &'a [(f64, f64)])>,
    /// Points by class.
    pub(super) dots: Vec<(&'a str, &'a [(f64, f64)])>,
    /// Vertical lines with a word each.
    pub(super) marks: Vec<(f64, String)>,
    /// Ticks on the axis.
    pub(super) ticks: &'a [u64],
    /// The vertical axis begins at zero.
    pub(super) from_zero: bool,
}

/// From numbers to places.
struct Scale {
    x: f64,
    low: f64,
    high: f64,
    height: f64,
}

impl Scale {
    fn x(&self, step: f64) -> f64 {
        LEFT + WIDTH * step / self.x
    }

    fn y(&self, value: f64) -> f64 {
        let inside = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        TOP + self.height * (1.0 - inside)
    }
}

impl Chart<'_> {
    /// The SVG element.
    pub(super) fn svg(&self) -> String {
        let scale = self.scale();
        let (width, height) = (LEFT + WIDTH + RIGHT, TOP + self.height + BOTTOM);
        let mut svg = format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n", self.label);
        self.axes(&scale, &mut svg);
        for &step in self.ticks {
            let (x, y) = (scale.x(step as f64), TOP + self.height);
            let _ = writeln!(svg, "<path class=\"commit\" d=\"M{x:.1} {y}l-3.5 7h7z\"><title>commit of step {step}</title></path>");
        }
        for (class, points) in &self.lines {
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{:.1} {:.1}", scale.x(*x), scale.y(*y))).collect();
            if !path.is_empty() {
                let _ = writeln!(svg, "<path class=\"{class}\" d=\"M{}\"/>", path.join("L"));
            }
        }
        for (class, points) in &self.dots {
            for (x, y) in points.iter() {
                let (cx, cy) = (scale.x(*x), scale.y(*y));
                let _ = writeln!(
                    svg,
                    "<circle class=\"{class}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"2.6\"><title>step {x}: {y:.4}</title></circle>"
                );
            }
        }
        // A word that would run into the one before is left to the line's title.
        let mut free = 0.0;
        for (step, word) in &self.marks {
            let x = scale.x(*step);
            self.mark(x, (word, x >= free), &mut svg);
            free = if x >= free { x + WORD } else { free };
        }
        svg + "</svg>\n"
    }

    /// The range of what is drawn. Rare spikes run out at the top instead of flattening all the rest.
    fn scale(&self) -> Scale {
        let all = self.lines.iter().chain(&self.dots).flat_map(|(_, points)| points.iter().map(|(_, y)| *y));
        let mut values: Vec<f64> = all.collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values.get(((values.len().max(1) - 1) as f64 * share) as usize).copied().unwrap_or(0.0);
        let (low, usual, most) = (if self.from_zero { 0.0 } else { at(0.0) }, at(0.995), at(1.0));
        // What doubles the range at most flattens nothing, and is shown where it is.
        let high = if most - low <= 2.0 * (usual - low) { most } else { usual };
        let room = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-9);
        let low = if self.from_zero { 0.0 } else { low - room };
        Scale { x: self.steps.max(1.0), low, high: high + room, height: self.height }
    }

    fn axes(&self, scale: &Scale, svg: &mut String) {
        let values = nice(scale.low, scale.high, 5);
        let digits = digits(&values);
        for value in values {
            let y = scale.y(value);
            let _ = writeln!(
                svg,
                "<path class=\"rule\" d=\"M{LEFT} {y:.1}h{WIDTH}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                y + 4.0,
                format_args!("{value:.digits$}")
            );
        }
        let base = TOP + self.height;
        let _ = writeln!(svg, "<path class=\"axis\" d=\"M{LEFT} {base}h{WIDTH}\"/>");
        for step in nice(0.0, scale.x, 8) {
            let (x, word) = (scale.x(step), short(step));
            // Half of the word must have room beside it: a digit is some 7 wide.
            let x = x.min(LEFT + WIDTH + RIGHT - 3.6 * word.len() as f64);
            let _ = writeln!(svg, "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{word}</text>", base + 22.0);
        }
    }

    fn mark(&self, x: f64, (word, said): (&str, bool), svg: &mut String) {
        let _ = writeln!(svg, "<path class=\"mark\" d=\"M{x:.1} {TOP}v{}\"><title>{word}</title></path>", self.height);
        if said {
            // The word stays inside the picture.
            let (anchor, gap) = if x > LEFT + WIDTH - WORD { ("end", -5.0) } else { ("start", 5.0) };
            let (x, y) = (x + gap, TOP - 7.0);
            let _ = writeln!(svg, "<text class=\"word\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"{anchor}\">{word}</text>");
        }
    }
}

/// Round numbers between two bounds, about `count` of them.
fn nice(low: f64, high: f64, count: u32) -> Vec<f64> {
    let rough = (high - low) / f64::from(count);
    if !rough.is_normal() || rough <= 0.0 {
        return Vec::new();
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Decimal places that tell ticks apart.
fn digits(ticks: &[f64]) -> usize {
    let step = ticks.windows(2).map(|pair| pair[1] - pair[0]).fold(1.0, f64::min);
    // The step is 1, 2 or 5 times a power of ten, but for rounding.
    (-(step * 1.001).log10().floor()).clamp(0.0, 9.0) as usize
}

/// A number without digits that say nothing.
pub(crate) fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_bounds() {
        assert_eq!(nice(0.0, 400.0, 8), [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]);
        let ticks = nice(0.83, 1.21, 5);
        assert!((3..=8).contains(&ticks.len()) && ticks.iter().all(|t| (0.83..=1.21).contains(t)), "{ticks:?}");
        assert_eq!([digits(&[0.2, 0.4, 0.6]), digits(&[0.0, 50.0]), digits(&[0.00, 0.05]), digits(&[])], [1, 0, 2, 0]);
        assert!(nice(1.0, 1.0, 5).is_empty() && nice(f64::NAN, 1.0, 5).is_empty());
    }

    #[test]
    fn everything_is_drawn_inside_the_picture() {
        let line: Vec<(f64, f64)> = (0..500).map(|n| (f64::from(n), if n == 250 { 1e9 } else { 1.0 + 0.001 * f64::from(n) })).collect();
        let chart = Chart { label: "x", height: 200.0, steps: 499.0, lines: vec![("loss", &line)], ..Chart::default() };
        let scale = chart.scale();
        assert!(scale.high < 2.0, "one spike must not flatten the curve: {}", scale.high);
        assert!(line.iter().all(|(x, y)| (LEFT..=LEFT + WIDTH).contains(&scale.x(*x)) && (TOP..=TOP + 200.0).contains(&scale.y(*y))));
        let svg = chart.svg();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"));
        let long = Chart { label: "x", height: 200.0, steps: 1e6, lines: vec![("loss", &line)], ..Chart::default() }.svg();
        assert!(long.contains("x=\"900.8\" y=\"244.0\" text-anchor=\"middle\">1000000<"), "the last step's number has room: {long}");
        let empty = Chart { label: "x", height: 100.0, ..Chart::default() }.svg();
        assert!(!empty.contains("NaN") && !empty.contains("inf"));
    }

    /// The first losses of a short run are higher than all later ones, and no spikes: the axis must agree with the numbers beside it.
    #[test]
    fn a_high_beginning_is_shown_where_it_is() {
        let line: Vec<(f64, f64)> = (0..200).map(|n| (f64::from(n), 0.18 + 0.2 * (-0.1 * f64::from(n)).exp())).collect();
        let held_out = [(1.0, 0.42), (199.0, 0.17)];
        let chart = Chart { height: 200.0, steps: 199.0, lines: vec![("raw", &line)], dots: vec![("held", &held_out)], ..Chart::default() };
        let scale = chart.scale();
        assert!((0.42..0.45).contains(&scale.high), "{}", scale.high);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.25, 1.5, 12.0, 400.0, 0.0004].map(short), ["0", "0.25", "1.5", "12", "400", "0"]);
    }
}
