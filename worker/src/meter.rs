//! What people see of long work, on stderr.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two plain lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// One line for whoever watches, on stderr.
pub fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{}", plain(&text.to_string()));
}

/// A text whose control characters, but for the ends of lines and tabs, are spelt out: what files hold must not steer a terminal.
pub fn plain(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(steers) {
        return text.into();
    }
    let spelt = |text: String, c: char| if steers(c) { text + &c.escape_default().to_string() } else { text + c.encode_utf8(&mut [0; 4]) };
    text.chars().fold(String::new(), spelt).into()
}

/// How far something has come: a bar on a terminal, now and then a plain line elsewhere.
#[derive(Debug)]
pub struct Meter {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: u64,
    shown: Instant,
}

impl Meter {
    /// `what` names the work, `total` is how much of it there is.
    pub fn new(what: &'static str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len}  {msg}  {elapsed_precise}, {eta_precise} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(what);
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bar, what, total, shown: Instant::now() }
    }

    /// Plain lines even on a terminal, where other lines come between.
    pub fn lines(what: &'static str, total: u64) -> Self {
        Self { bar: None, what, total, shown: Instant::now() }
    }

    /// How much there is in all, where that is found out on the way.
    pub fn of(&mut self, total: u64) {
        self.total = total;
        if let Some(bar) = self.bar.as_ref().filter(|bar| bar.length() != Some(total)) {
            bar.set_length(total);
        }
    }

    /// Where work that was begun before goes on: what was done then tells nothing about the time left.
    pub fn starts_at(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.reset_eta();
        }
    }

    /// So much is done; `message` says more.
    pub fn at(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if self.shown.elapsed() >= LINE_EVERY {
            self.shown = Instant::now();
            let gap = if message.is_empty() { "" } else { "  " };
            note(format_args!("{} {done}/{}{gap}{message}", self.what, self.total));
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_would_steer_a_terminal_is_spelt_out() {
        assert_eq!(plain("a\u{1b}[31m\0\u{7}\r\u{9b}b"), "a\\u{1b}[31m\\u{0}\\u{7}\\r\\u{9b}b");
        assert_eq!(plain("two\n\tlines, 日本"), "two\n\tlines, 日本");
    }
}
