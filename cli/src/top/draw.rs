//! How it looks on a terminal, whatever its size.

use ella_coordinator::history::{Happening, Kind, Rank};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, BorderType, Cell, Chart, Clear, Dataset, Gauge, GraphType, Paragraph, Row, Table, Wrap};

use super::snapshot::{Curve, Snapshot, shares, told};
use crate::report::short;
use crate::ui::span;

/// The parts of a step, their colours, and their signs where there are none.
const PARTS: [(&str, Color, char); 9] = [
    ("data", Color::Yellow, 'd'),
    ("forward", Color::LightBlue, 'f'),
    ("backward", Color::Blue, 'b'),
    ("update", Color::Magenta, 'u'),
    ("commit", Color::Gray, 'c'),
    ("draw", Color::Green, 's'),
    ("other", Color::DarkGray, '.'),
    ("reduce", Color::Cyan, 'r'),
    ("waits", Color::Red, 'w'),
];

/// Characters of all their names and signs in one line.
const KEYS: u16 = 78;

/// What the lower part shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pane {
    /// Ranks; of a job, its workers.
    #[default]
    Ranks,
    Events,
    Counts,
}

impl Pane {
    const ALL: [(Self, &'static str); 3] = [(Self::Ranks, "Ranks"), (Self::Events, "Events"), (Self::Counts, "Counts")];

    /// The one `by` places further.
    pub(super) fn turned(self, by: usize) -> Self {
        let at = Self::ALL.iter().position(|(pane, _)| *pane == self).unwrap_or_default();
        Self::ALL[(at + by) % Self::ALL.len()].0
    }
}

/// What the keys have set.
#[derive(Clone, Debug, Default)]
pub(super) struct Ui {
    pub(super) pane: Pane,
    /// Lines of the pane that are above its top.
    pub(super) scrolled: usize,
    pub(super) help: bool,
    /// The newest tenth of the curves alone.
    pub(super) newest: bool,
    /// `NO_COLOR` is set.
    pub(super) plain: bool,
}

impl Ui {
    fn color(&self, color: Color) -> Style {
        if self.plain { Style::default() } else { Style::default().fg(color) }
    }

    fn dim(&self) -> Style {
        self.color(Color::DarkGray)
    }
}

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, snapshot: &Snapshot, ui: &Ui) {
    let area = frame.area();
    let charts = if area.height >= 26 {
        area.height / 3
    } else if area.height >= 18 {
        7
    } else {
        0
    };
    let facts = u16::from(area.width < 100) + 3;
    let rows = Layout::vertical([
        Constraint::Length(facts),
        Constraint::Length(1),
        Constraint::Length(charts),
        Constraint::Min(3),
        Constraint::Length(1),
    ]);
    let [head, gauge, curves, pane, foot] = rows.areas(area);
    header(frame, head, snapshot, ui);
    progress(frame, gauge, snapshot, ui);
    if charts > 0 {
        draw_curves(frame, curves, snapshot, ui);
    }
    draw_pane(frame, pane, snapshot, ui);
    footer(frame, foot, snapshot, ui);
    if ui.help {
        help(frame, area);
    }
}

fn header(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let phase = match snapshot.phase.as_str() {
        "training" | "working" | "done" => Color::Green,
        "failed" => Color::Red,
        _ => Color::Yellow,
    };
    let bold = Modifier::BOLD;
    let mut first = vec![
        Span::styled(format!("{} ", snapshot.phase), ui.color(phase).add_modifier(bold)),
        Span::styled(snapshot.run.clone(), Style::default().add_modifier(bold)),
    ];
    if !snapshot.reason.is_empty() {
        first.push(Span::styled(format!("  {}", snapshot.reason), ui.color(Color::Yellow)));
    }
    let mut facts = Vec::new();
    for (name, value) in snapshot.facts() {
        facts.push(Span::styled(format!("{name} "), ui.dim()));
        facts.push(Span::raw(format!("{value}   ")));
    }
    let lines = vec![Line::from(first), Line::from(facts)];
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }), area);
}

fn progress(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let (done, all) = snapshot.progress();
    let share = if all == 0 { 0.0 } else { (done as f64 / all as f64).clamp(0.0, 1.0) };
    let left = snapshot.seconds_left.map_or_else(String::new, |left| format!(", {} left", span(left)));
    let label = format!("{done} of {all}, {:.1} %{left}", 100.0 * share);
    frame.render_widget(Gauge::default().ratio(share).label(label).gauge_style(ui.color(Color::Blue)).use_unicode(true), area);
}

fn block(title: String) -> Block<'static> {
    Block::bordered().border_type(BorderType::Rounded).title(title)
}

fn draw_curves(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let curves = &snapshot.curves;
    if snapshot.job.is_some() {
        return curve(frame, area, "samples/s", &[(&curves.rate, Color::Cyan)], ui);
    }
    let halves =
        if area.width >= 90 { Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).split(area) } else { vec![area].into() };
    let held = if curves.held_out.is_empty() { "loss" } else { "loss, held out in yellow" };
    curve(frame, halves[0], held, &[(&curves.loss, Color::Blue), (&curves.held_out, Color::Yellow)], ui);
    if let Some(right) = halves.get(1) {
        curve(frame, *right, "samples/s", &[(&curves.rate, Color::Cyan)], ui);
    }
}

fn curve(frame: &mut Frame<'_>, area: Rect, title: &str, all: &[(&Curve, Color)], ui: &Ui) {
    let end = all.iter().flat_map(|(curve, _)| curve.last()).map(|(x, _)| *x).fold(0.0, f64::max);
    let begin = all.iter().flat_map(|(curve, _)| curve.first()).map(|(x, _)| *x).fold(end, f64::min);
    let from = if ui.newest { end - (end - begin) / 10.0 } else { begin };
    let shown: Vec<(Curve, Color)> =
        all.iter().map(|(curve, color)| (curve.iter().filter(|(x, _)| *x >= from).copied().collect(), *color)).collect();
    let values = || shown.iter().flat_map(|(curve, _)| curve).map(|(_, y)| *y);
    let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
    if low > high {
        let empty = Paragraph::new("nothing was measured yet").style(ui.dim());
        return frame.render_widget(empty.block(block(format!(" {title} "))), area);
    }
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
    let newest = all[0].0.last().map_or_else(String::new, |(_, y)| format!(" {}", short(*y)));
    let sets = shown
        .iter()
        .map(|(curve, color)| Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(ui.color(*color)).data(curve));
    let axis = |(low, high): (f64, f64)| Axis::default().style(ui.dim()).bounds([low, high]);
    let across = (from, end.max(from + 1.0));
    // A point may stand for some steps, and lies in their middle.
    let steps = axis(across).labels([short(across.0.ceil()), short(across.1.floor())]);
    let chart = Chart::new(sets.collect()).x_axis(steps).y_axis(axis((low, high)).labels([short(low), short(high)]));
    frame.render_widget(chart.block(block(format!(" {title}{newest} "))), area);
}

fn draw_pane(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let ranks = if snapshot.job.is_some() { "Workers" } else { "Ranks" };
    let mut title = vec![Span::raw(" ")];
    for (pane, name) in Pane::ALL {
        let style = if pane == ui.pane { Style::default().add_modifier(Modifier::BOLD | Modifier::REVERSED) } else { ui.dim() };
        title.push(Span::styled(format!(" {} ", if pane == Pane::Ranks { ranks } else { name }), style));
        title.push(Span::raw(" "));
    }
    let block = Block::bordered().border_type(BorderType::Rounded).title(Line::from(title));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    match (ui.pane, &snapshot.job) {
        (Pane::Ranks, None) => draw_ranks(frame, inner, snapshot, ui),
        (Pane::Ranks, Some(job)) => lines(frame, inner, job_lines(job), ui),
        (Pane::Events, _) => lines(frame, inner, snapshot.events.iter().map(|event| event_line(event, ui)).collect(), ui),
        (Pane::Counts, _) => lines(frame, inner, count_lines(snapshot), ui),
    }
}

fn lines(frame: &mut Frame<'_>, area: Rect, lines: Vec<Line<'_>>, ui: &Ui) {
    let lines = if lines.is_empty() { vec![Line::styled("nothing yet", ui.dim())] } else { lines };
    let above = ui.scrolled.min(lines.len().saturating_sub(1));
    frame.render_widget(Paragraph::new(lines.into_iter().skip(above).collect::<Vec<_>>()), area);
}

fn job_lines(job: &ella_coordinator::status::JobReport) -> Vec<Line<'static>> {
    let worker = |worker: &ella_coordinator::status::JobWorkerReport| {
        let held: Vec<String> = worker.held.iter().map(|held| format!("{} ({})", held.unit, held.done)).collect();
        let held = if held.is_empty() { "nothing".to_owned() } else { held.join(", ") };
        Line::raw(format!("{} pid {}, {}: {} units done, holds {held}", worker.host, worker.pid, worker.device, worker.units_done))
    };
    let failed = |unit: &ella_coordinator::status::FailedUnitReport| Line::raw(format!("given up: {}: {}", unit.unit, unit.error));
    job.workers.iter().map(worker).chain(job.given_up.iter().map(failed)).collect()
}

fn count_lines(snapshot: &Snapshot) -> Vec<Line<'static>> {
    let results = snapshot.job.iter().flat_map(|job| &job.results).map(|(name, n)| format!("{n:>12}  {name}"));
    let counts = snapshot.counts.iter().map(|(name, n)| format!("{n:>12}  {name}"));
    results.chain(counts).chain(snapshot.problems.iter().cloned()).map(Line::raw).collect()
}

fn event_line(event: &Happening, ui: &Ui) -> Line<'static> {
    let color = match event.kind {
        Kind::Lost => Color::Red,
        Kind::Trouble => Color::Yellow,
        Kind::Joined => Color::Green,
        Kind::Generation => Color::Blue,
        Kind::Commit => Color::DarkGray,
        Kind::Left | Kind::Phase | Kind::Other => Color::Reset,
    };
    Line::styled(told(event), ui.color(color))
}

fn draw_ranks(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let height = 1 + u16::from(usize::from(area.width) < snapshot.verdict.chars().count());
    let (keys, each) = if area.width < KEYS { (2, PARTS.len().div_ceil(2)) } else { (1, PARTS.len()) };
    let [said, legend, rest] = Layout::vertical([Constraint::Length(height), Constraint::Length(keys), Constraint::Min(0)]).areas(area);
    frame.render_widget(Paragraph::new(snapshot.verdict.as_str()).wrap(Wrap { trim: true }), said);
    let key = |(name, color, sign): &(&str, Color, char)| {
        let sign = if ui.plain { format!("{sign}=") } else { "■ ".to_owned() };
        [Span::styled(sign, ui.color(*color)), Span::styled(format!("{name} "), ui.dim())]
    };
    let keys = PARTS.chunks(each).map(|parts| Line::from(parts.iter().flat_map(key).collect::<Vec<_>>()));
    frame.render_widget(Paragraph::new(keys.collect::<Vec<_>>()), legend);
    let wide = area.width >= 70;
    let bar = usize::from(area.width).saturating_sub(if wide { 52 } else { 26 });
    let most = snapshot.ranks.iter().map(|rank| rank.seconds).fold(1e-9, f64::max);
    let rows = snapshot.ranks.iter().skip(ui.scrolled.min(snapshot.ranks.len().saturating_sub(1))).map(|rank| {
        let mut cells = vec![Cell::from(format!("{:>4}", rank.rank))];
        if wide {
            cells.push(Cell::from(rank.host.clone()));
        }
        cells.push(Cell::from(format!("{:>8.1}", 1000.0 * rank.seconds)));
        cells.push(Cell::from(format!("{:>8.1}", 1000.0 * rank.waits)));
        cells.push(Cell::from(bar_of(rank, most, bar, ui)));
        Row::new(cells)
    });
    let mut widths = vec![Constraint::Length(4), Constraint::Length(8), Constraint::Length(8), Constraint::Min(4)];
    let mut titles = vec!["rank", " step ms", "waits ms", "a step"];
    if wide {
        widths.insert(1, Constraint::Length(24));
        titles.insert(1, "host");
    }
    frame.render_widget(Table::new(rows, widths).header(Row::new(titles).style(ui.dim())), rest);
}

/// A step as a bar: its parts in their order, as long as they took.
fn bar_of(rank: &Rank, most: f64, width: usize, ui: &Ui) -> Line<'static> {
    let (mut spans, mut end, mut drawn) = (Vec::new(), 0.0, 0);
    for (name, seconds) in shares(rank) {
        let Some((_, color, sign)) = PARTS.iter().find(|(part, ..)| *part == name) else { continue };
        end += seconds;
        let until = ((end / most * width as f64).round() as usize).min(width);
        let sign = if ui.plain { sign.to_string() } else { "█".to_owned() };
        spans.push(Span::styled(sign.repeat(until.saturating_sub(drawn)), ui.color(*color)));
        drawn = drawn.max(until);
    }
    Line::from(spans)
}

fn footer(frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot, ui: &Ui) {
    let state = match (snapshot.gone, snapshot.live, snapshot.problems.first()) {
        (true, ..) => "the coordinator does not answer".to_owned(),
        (_, _, Some(problem)) => problem.clone(),
        (_, false, _) => "from the run's folder".to_owned(),
        (_, true, _) => "live".to_owned(),
    };
    let color = if snapshot.gone || !snapshot.problems.is_empty() { Color::Yellow } else { Color::DarkGray };
    let keys = Span::styled(" q quit  ←→ panes  ↑↓ scroll  z newest tenth  ? help   ", ui.dim());
    frame.render_widget(Line::from(vec![keys, Span::styled(state, ui.color(color))]), area);
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let text = "q, Esc, Ctrl-C   quit\n← → or Tab       ranks, events, counts\n↑ ↓, PgUp PgDn   scroll; Home: to the top\n\
                z                the newest tenth of the curves, or all\n?                this help";
    let [middle] = Layout::horizontal([Constraint::Length(60.min(area.width))]).flex(ratatui::layout::Flex::Center).areas(area);
    let [place] = Layout::vertical([Constraint::Length(7.min(area.height))]).flex(ratatui::layout::Flex::Center).areas(middle);
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(text).block(block(" Keys ".into())), place);
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::tests::{preparing, training};
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen(width: u16, height: u16, snapshot: &Snapshot, ui: &Ui) -> (String, bool) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, snapshot, ui)).unwrap();
        let buffer = terminal.backend().buffer();
        let colored = buffer.content().iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        let rows = buffer.content().chunks(usize::from(width));
        (rows.map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect::<String>() + "\n").collect(), colored)
    }

    #[test]
    fn a_run_is_drawn_with_its_curves_ranks_and_waits() {
        let (text, colored) = screen(120, 40, &training(), &Ui::default());
        for part in [
            "training runs/mine",
            "400 of 1000, 40.0 %, 10 min 00 s left",
            "loss 0.05",
            "samples/s 5",
            "others wait up to 99 ms",
            "■ waits",
            "   1 node-1",
            "████",
            "q quit",
            "live",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        assert!(colored && text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "a curve");
    }

    #[test]
    fn without_colour_parts_are_told_by_letters() {
        let (text, colored) = screen(120, 40, &training(), &Ui { plain: true, ..Ui::default() });
        assert!(!colored && text.contains("w=waits") && text.contains("ffrwwww") && text.contains("ddff"), "{text}");
    }

    #[test]
    fn a_usual_terminal_has_room_for_all_keys_and_the_first_step() {
        let mut snapshot = training();
        snapshot.curves.loss = vec![(0.5, 0.2), (2.5, 0.1)];
        let (text, _) = screen(80, 24, &snapshot, &Ui::default());
        assert!(text.contains("■ reduce ■ waits") && !text.contains("0.5  "), "{text}");
        assert!(screen(60, 24, &snapshot, &Ui::default()).0.contains("■ draw ■ other ■ reduce ■ waits"));
        let (text, _) = screen(80, 24, &snapshot, &Ui { help: true, ..Ui::default() });
        assert!(text.contains("the newest tenth of the curves, or all"), "{text}");
    }

    #[test]
    fn panes_scrolling_and_help() {
        let events = Ui { pane: Pane::Ranks.turned(1), ..Ui::default() };
        assert!(screen(100, 30, &training(), &events).0.contains("rank 2, w2 on h was lost: silent"));
        let counts = Ui { pane: Pane::Ranks.turned(2), ..Ui::default() };
        assert!(screen(100, 30, &training(), &counts).0.contains("1  workers_lost"));
        assert_eq!(Pane::Counts.turned(1), Pane::Ranks);
        let down = Ui { scrolled: 1, ..Ui::default() };
        let text = screen(100, 40, &training(), &down).0;
        assert!(text.contains("   1 node-1") && !text.contains("   0 node-1"), "{text}");
        assert!(screen(100, 30, &training(), &Ui { help: true, ..Ui::default() }).0.contains("scroll; Home"));
        let mut gone = training();
        gone.gone = true;
        assert!(screen(120, 30, &gone, &Ui::default()).0.contains("the coordinator does not answer"));
    }

    #[test]
    fn every_size_and_an_empty_run_can_be_drawn() {
        for (width, height) in [(1, 1), (10, 3), (40, 12), (60, 20), (80, 24), (200, 60)] {
            for snapshot in [Snapshot::default(), training(), preparing()] {
                for pane in [Pane::Ranks, Pane::Events, Pane::Counts] {
                    screen(width, height, &snapshot, &Ui { pane, help: width > 50, ..Ui::default() });
                }
            }
        }
        let (text, _) = screen(100, 30, &preparing(), &Ui::default());
        for part in ["working data/a", "4 of 9, 44.4 %", "node-1 pid 0", "given up: a.tar: cut", "Workers"] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
