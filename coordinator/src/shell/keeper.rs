//! The one task that writes the run's log, in the order in which it is asked to (TERM, COMMIT).

use super::RunError;
use super::driver::Input;
use super::start::unix_ms;
use crate::machine::Event;
use ella_proto::ids::Term;
use ella_store::{Body, LogError, RunLog, Store, remove_leftovers};
use tokio::sync::mpsc;

/// Appends that fail are tried so often; each has the store's own retries and deadline within.
const TRIES: usize = 3;

/// What the keeper is asked to do.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // some hundred bytes each, in a short queue
pub(super) enum Work {
    /// Append a record.
    Append(Body),
    /// Delete commit folders that the log gave up.
    Delete(Vec<String>),
}

/// A keeper of `log`, and where to send its work. It ends when the sender is dropped and all is done.
pub(super) fn keeper(
    log: RunLog,
    store: Store,
    inputs: mpsc::Sender<Input>,
) -> (mpsc::UnboundedSender<Work>, impl Future<Output = Result<(), RunError>>) {
    let (work, inbox) = mpsc::unbounded_channel();
    (work, keep(log, store, inbox, inputs))
}

async fn keep(
    mut log: RunLog,
    store: Store,
    mut inbox: mpsc::UnboundedReceiver<Work>,
    inputs: mpsc::Sender<Input>,
) -> Result<(), RunError> {
    while let Some(work) = inbox.recv().await {
        let event = match work {
            Work::Append(body) => append(&mut log, body).await,
            Work::Delete(folders) => {
                delete(store.clone(), folders).await;
                continue;
            }
        };
        let broken = matches!(event, Event::Superseded(_) | Event::AppendFailed(_) | Event::LogGone(_));
        // No receiver: the outcome was decided, and this was its record.
        let _ = inputs.send(Input::Event(event)).await;
        if broken {
            return Ok(());
        }
    }
    Ok(())
}

/// Costs space only if it fails. The store's future is not `Send`, so it runs on a thread of its own.
pub(super) async fn delete(store: Store, folders: Vec<String>) {
    let handle = tokio::runtime::Handle::current();
    let deleted = tokio::task::spawn_blocking(move || handle.block_on(remove_leftovers(&store, &folders))).await;
    let problem = match deleted {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(broken) => broken.to_string(),
    };
    tracing::warn!("{problem}; the next coordinator deletes what is left");
}

async fn append(log: &mut RunLog, body: Body) -> Event {
    let mut tries = 0;
    loop {
        tries += 1;
        match log.append(body.clone(), unix_ms()).await {
            Ok(_) => return Event::Appended(body),
            Err(LogError::Superseded { by_term, .. }) => return Event::Superseded(Term(by_term)),
            // Whether it was written is unknown then; appending again is safe.
            Err(LogError::Store(error)) if error.is_retryable() && tries < TRIES => tracing::warn!("{error}; appending again"),
            Err(error @ LogError::Gone { .. }) => return Event::LogGone(error.to_string()),
            Err(error) => return Event::AppendFailed(error.to_string()),
        }
    }
}
