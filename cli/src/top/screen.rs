//! The terminal: keys in, pictures out. The source is asked beside it, so that keys never wait for a network.

use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::draw::{Ui, draw};
use super::snapshot::Snapshot;
use super::source::Source;
use crate::ui::Fail;

/// How soon a key is acted upon, and a new picture drawn.
const TICK: Duration = Duration::from_millis(100);

/// Shows it until a key ends that.
pub(super) fn show(runtime: &tokio::runtime::Runtime, source: Source, first: Snapshot, every: Duration) -> Result<(), Fail> {
    let (news, mut shown) = watch::channel(first);
    let _asking = AbortOnDropHandle::new(runtime.spawn(ask(source, news, every)));
    let broken = |error: std::io::Error| Fail::failed(format_args!("the terminal cannot be used ({error}); try --once"));
    let mut terminal = ratatui::try_init().map_err(broken)?;
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let result = watch_keys(&mut terminal, &mut shown, Ui { plain, ..Ui::default() });
    ratatui::restore();
    result.map_err(broken)
}

async fn ask(mut source: Source, news: watch::Sender<Snapshot>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        // What cannot be had now is shown as it was: `gone` says so.
        if let Ok(snapshot) = source.look().await
            && news.send(snapshot).is_err()
        {
            return;
        }
    }
}

fn watch_keys(terminal: &mut ratatui::DefaultTerminal, shown: &mut watch::Receiver<Snapshot>, mut ui: Ui) -> std::io::Result<()> {
    let mut due = true;
    loop {
        if due || shown.has_changed().unwrap_or(false) {
            let snapshot = shown.borrow_and_update().clone();
            terminal.draw(|frame| draw(frame, &snapshot, &ui))?;
        }
        due = event::poll(TICK)?;
        if due
            && let Event::Key(key) = event::read()?
            && !press(&mut ui, key)
        {
            return Ok(());
        }
    }
}

/// Acts upon a key; false ends it.
fn press(ui: &mut Ui, key: KeyEvent) -> bool {
    if key.kind == KeyEventKind::Release {
        return true;
    }
    let quits = matches!(key.code, KeyCode::Char('c' | 'd')) && key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        _ if quits => return false,
        KeyCode::Esc if ui.help => ui.help = false,
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('?' | 'h') => ui.help = !ui.help,
        KeyCode::Char('z') => ui.newest = !ui.newest,
        KeyCode::Right | KeyCode::Tab => (ui.pane, ui.scrolled) = (ui.pane.turned(1), 0),
        KeyCode::Left | KeyCode::BackTab => (ui.pane, ui.scrolled) = (ui.pane.turned(2), 0),
        KeyCode::Down => ui.scrolled += 1,
        KeyCode::Up => ui.scrolled = ui.scrolled.saturating_sub(1),
        KeyCode::PageDown => ui.scrolled += 10,
        KeyCode::PageUp => ui.scrolled = ui.scrolled.saturating_sub(10),
        KeyCode::Home => ui.scrolled = 0,
        _ => {}
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::draw::Pane;
    use super::*;

    #[test]
    fn keys_do_what_the_help_says() {
        let mut ui = Ui::default();
        let mut on = |code: KeyCode| {
            let goes_on = press(&mut ui, KeyEvent::new(code, KeyModifiers::NONE));
            (goes_on, ui.clone())
        };
        assert_eq!(on(KeyCode::Right).1.pane, Pane::Events);
        assert_eq!(on(KeyCode::PageDown).1.scrolled, 10);
        assert_eq!(on(KeyCode::Left).1.scrolled, 0, "another pane begins at its top");
        assert_eq!(on(KeyCode::Up).1.scrolled, 0);
        assert!(on(KeyCode::Char('z')).1.newest && on(KeyCode::Char('?')).1.help);
        let (goes_on, shown) = on(KeyCode::Esc);
        assert!(goes_on && !shown.help, "the help is closed first");
        assert!(!on(KeyCode::Char('q')).0 && !on(KeyCode::Esc).0);
        assert!(!press(&mut Ui::default(), KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }
}
