//! The run log (TERM, COMMIT): numbered records, each created only if absent, so that the store itself fences late writers.

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};

use crate::commit;
use crate::error::StoreError;
use crate::record::{Body, Commit, Record, Term};
use crate::store::{Meta, Store};
use crate::write::Created;

/// How often a claim, or an append that meets own records, tries again.
const MOST_TRIES: usize = 32;
/// Records fetched at once.
const READS: usize = 16;

/// Why the log could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store failed. After a failed append the record may or may not be there; appending again is safe.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A number is missing: a record was removed.
    #[error("{url}/{file}: missing, though the log goes on to number {last}; the log was damaged: restore the file from a copy")]
    Gap {
        /// The run.
        url: String,
        /// The missing file.
        file: String,
        /// The newest number there is.
        last: u64,
    },
    /// A file in the log's folder is no valid record.
    #[error("{url}/{file}: not a valid log record ({reason}); {remedy}")]
    Bad {
        /// The run.
        url: String,
        /// The file.
        file: String,
        /// The rule that it breaks.
        reason: String,
        /// What to do with it.
        remedy: &'static str,
    },
    /// Another coordinator has taken over the run: this one must stop.
    #[error("{url}: superseded: record {seq} was written by term {by_term}; another coordinator runs this run, so this one stops")]
    Superseded {
        /// The run.
        url: String,
        /// The number that was taken.
        seq: u64,
        /// The term of who took it.
        by_term: u64,
    },
    /// The record before the next one is not there any more: the run's folder was removed, or another put in its place.
    #[error(
        "{url}/{file}: not there any more, though this coordinator's log had it: the run's folder was removed or replaced while the run went on. Put it \
         back from a copy, or begin anew in another folder"
    )]
    Gone {
        /// The run.
        url: String,
        /// The missing file.
        file: String,
    },
    /// Others kept taking the next number.
    #[error("{url}: no term could be claimed in {tries} tries; too many coordinators start at once: leave one")]
    Contended {
        /// The run.
        url: String,
        /// How many numbers were tried.
        tries: usize,
    },
}

/// The file of record `seq`, relative to the run.
pub fn record_key(seq: u64) -> String {
    format!("log/{seq:012}.json")
}

/// The log of a run, held by the coordinator of the newest term.
#[derive(Debug)]
pub struct RunLog {
    store: Store,
    term: u64,
    nonce: String,
    /// The number of the record that began the term.
    claim: u64,
    next: u64,
}

impl RunLog {
    /// Reads the whole log and checks it: contiguous from 0, every record strictly parsed, each term begun by its own `term` record
    /// with a higher number than those before, and written by one incarnation. An empty log is valid.
    ///
    /// # Errors
    /// `Gap` and `Bad` name the file; `Store` for store failures.
    pub fn read(store: &Store) -> BoxFuture<'_, Result<Vec<Record>, LogError>> {
        Box::pin(async move {
            // The listing only tells how far the log goes: one taken while the log grows may leave out a record but show its successor.
            let count = count_listed(store, &store.list("log").await?)?;
            let mut fetched = stream::iter(0..count).map(|seq| fetch(store, seq)).buffered(READS);
            let mut records: Vec<Record> = Vec::new();
            while let Some(record) = fetched.next().await {
                let record = match record {
                    Err(LogError::Store(StoreError::NotFound { url, key })) => {
                        return Err(LogError::Gap { url, file: key, last: count - 1 });
                    }
                    other => other?,
                };
                check_order(records.last(), &record).map_err(|reason| bad(store, &record_key(record.seq), reason))?;
                records.push(record);
            }
            Ok(records)
        })
    }

    /// Begins a new term: reads the log and appends a `term` record with the next higher term. If another coordinator is faster, reads again.
    /// `nonce` must be unique to this incarnation. Gives the log and all its records, the own `term` record last.
    ///
    /// # Errors
    /// Those of [`RunLog::read`]; `Contended` if others keep being faster.
    pub fn claim<'a>(
        store: &'a Store,
        term: Term,
        nonce: &'a str,
        at_unix_ms: u64,
    ) -> BoxFuture<'a, Result<(Self, Vec<Record>), LogError>> {
        Box::pin(async move {
            for _ in 0..MOST_TRIES {
                let mut records = Self::read(store).await?;
                let (seq, number) = (records.len() as u64, records.last().map_or(0, |last| last.term) + 1);
                let record = Record { seq, term: number, nonce: nonce.to_owned(), at_unix_ms, body: Body::Term(term.clone()) };
                if store.create(&record_key(seq), encode(store, &record)?).await? == Created::Yes {
                    records.push(record);
                    let (store, nonce) = (store.clone(), nonce.to_owned());
                    return Ok((Self { store, term: number, nonce, claim: seq, next: seq + 1 }, records));
                }
            }
            Err(LogError::Contended { url: store.url().into(), tries: MOST_TRIES })
        })
    }

    /// Appends a record and gives its number. After a `Store` error, or when the call was dropped half-way, it is unknown whether
    /// the record was written; appending the same body again is safe, and never makes a second record of it.
    ///
    /// # Errors
    /// `Superseded` if the next number was taken by another coordinator; `Gone` if the log is not there any more, as far as a look at the record before
    /// this one tells: a folder that was removed must not come back with this record alone; `Bad` for a body that [`RunLog::read`] would refuse.
    pub fn append(&mut self, body: Body, at_unix_ms: u64) -> BoxFuture<'_, Result<u64, LogError>> {
        Box::pin(async move {
            if matches!(body, Body::Term(_)) {
                return Err(bad(&self.store, &record_key(self.next), "a term is begun by a claim, not by an append"));
            }
            for _ in 0..MOST_TRIES {
                let seq = self.next;
                self.check_there().await?;
                let record = Record { seq, term: self.term, nonce: self.nonce.clone(), at_unix_ms, body: body.clone() };
                let key = record_key(seq);
                check_body(&record).map_err(|reason| bad(&self.store, &key, reason))?;
                if self.store.create(&key, encode(&self.store, &record)?).await? == Created::Yes {
                    self.next += 1;
                    return Ok(seq);
                }
                let found = self.own(fetch(&self.store, seq).await?)?;
                // Our own earlier append, whose reply was lost.
                self.next += 1;
                if found.body == body {
                    return Ok(seq);
                }
            }
            Err(LogError::Contended { url: self.store.url().into(), tries: MOST_TRIES })
        })
    }

    /// Whether the log is there, and its next record nobody else's, as far as a look tells. Nothing is written.
    ///
    /// # Errors
    /// `Gone` or `Superseded` if not.
    pub fn check_held(&self) -> BoxFuture<'_, Result<(), LogError>> {
        Box::pin(async move {
            self.check_there().await?;
            match fetch(&self.store, self.next).await {
                Err(LogError::Store(StoreError::NotFound { .. })) => Ok(()),
                found => self.own(found?).map(|_| ()),
            }
        })
    }

    async fn check_there(&self) -> Result<(), LogError> {
        let before = record_key(self.next.saturating_sub(1));
        match self.store.head(&before).await? {
            Some(_) => Ok(()),
            None => Err(LogError::Gone { url: self.store.url().into(), file: before }),
        }
    }

    /// A record, unless another coordinator has written it.
    fn own(&self, found: Record) -> Result<Record, LogError> {
        match found.nonce == self.nonce {
            true => Ok(found),
            false => Err(LogError::Superseded { url: self.store.url().into(), seq: found.seq, by_term: found.term }),
        }
    }

    /// The file of the record that began the term, relative to the run, and what no other file there has in it.
    pub fn claim_record(&self) -> (String, String) {
        (record_key(self.claim), self.nonce.clone())
    }

    /// The term held.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// The number that the next record will get.
    pub fn next_seq(&self) -> u64 {
        self.next
    }
}

fn bad(store: &Store, file: &str, reason: impl Into<String>) -> LogError {
    LogError::Bad { url: store.url().into(), file: file.into(), reason: reason.into(), remedy: "restore it from a copy" }
}

fn encode(store: &Store, record: &Record) -> Result<Bytes, LogError> {
    let mut text = serde_json::to_vec_pretty(record).map_err(|error| bad(store, &record_key(record.seq), error.to_string()))?;
    text.push(b'\n');
    Ok(text.into())
}

/// How many records the newest name in the log's folder stands for.
fn count_listed(store: &Store, listed: &[Meta]) -> Result<u64, LogError> {
    // The largest number has no next one: its file is none of a log's.
    let next = |key: &str| {
        let seq = key.strip_prefix("log/")?.strip_suffix(".json")?.parse::<u64>().ok()?;
        (record_key(seq) == key).then(|| seq.checked_add(1)).flatten()
    };
    listed.iter().try_fold(0, |count, meta| match next(&meta.key) {
        Some(next) => Ok(count.max(next)),
        None => Err(LogError::Bad {
            url: store.url().into(),
            file: meta.key.clone(),
            reason: "the log's folder holds only files named like 000000000042.json".into(),
            remedy: "remove it: it is none of the run's",
        }),
    })
}

async fn fetch(store: &Store, seq: u64) -> Result<Record, LogError> {
    let key = record_key(seq);
    parse(store, &key, &store.get_record(&key).await?)
}

fn parse(store: &Store, key: &str, bytes: &[u8]) -> Result<Record, LogError> {
    let record: Record = serde_json::from_slice(bytes).map_err(|error| bad(store, key, error.to_string()))?;
    if record_key(record.seq) != key {
        return Err(bad(store, key, format!("it says that it is number {}", record.seq)));
    }
    check_body(&record).map_err(|reason| bad(store, key, reason))?;
    Ok(record)
}

fn check_body(record: &Record) -> Result<(), String> {
    match &record.body {
        Body::Term(_) | Body::End { .. } => Ok(()),
        Body::Commit(commit) => check_commit(commit, record.term),
        Body::Retire { commits } => commits.iter().try_for_each(|folder| match commit::parse_folder(folder) {
            Some(_) => Ok(()),
            None => Err(format!("{folder:?} is not a commit's folder (expected commits/STEP.TERM)")),
        }),
    }
}

fn check_commit(commit: &Commit, term: u64) -> Result<(), String> {
    match commit::parse_folder(&commit.folder) {
        Some((step, of)) if step == commit.step && of <= term => {}
        _ => {
            return Err(format!(
                "folder {:?} (expected {:?} or one of an earlier term)",
                commit.folder,
                commit::commit_folder(commit.step, term, commit.generation)
            ));
        }
    }
    if commit.parts.is_empty() {
        return Err("the commit has no parts".into());
    }
    for (index, part) in commit.parts.iter().enumerate() {
        if part.name.is_empty() || part.name.contains('/') || part.name.starts_with('.') {
            return Err(format!("part name {:?} (expected a plain file name)", part.name));
        }
        if commit.parts[..index].iter().any(|other| other.name == part.name) {
            return Err(format!("part {:?} is named twice", part.name));
        }
    }
    for epoch in &commit.ledger {
        if epoch.hash.len() != 32 || !epoch.hash.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(format!("ledger hash {:?} of epoch {} (expected 32 lower-case hex digits)", epoch.hash, epoch.epoch));
        }
    }
    Ok(())
}

/// TERM: a term begins with its `term` record, has a higher number than all before, and all of it is one incarnation's.
fn check_order(last: Option<&Record>, record: &Record) -> Result<(), String> {
    let Some(Record { term, nonce, .. }) = last else {
        return match record.body {
            Body::Term(_) => Ok(()),
            _ => Err("it is the first record (expected one of kind \"term\")".into()),
        };
    };
    match &record.body {
        Body::Term(_) if record.term <= *term => Err(format!("it begins term {} after term {term} (expected a higher one)", record.term)),
        Body::Term(_) => Ok(()),
        _ if record.term != *term || record.nonce != *nonce => {
            Err(format!("it is of term {} by {:?} (expected term {term} by {nonce:?}, who holds the log)", record.term, record.nonce))
        }
        _ => Ok(()),
    }
}
