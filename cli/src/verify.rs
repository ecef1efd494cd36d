//! `ella verify`: every byte of a data set against its records; damaged files are named, and made anew if asked.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use ella_dataset::{Damage, Inventory, Verified};
use ella_store::Store;
use serde::Serialize;

use crate::prepare;
use crate::ui::{DONE, FAILED, Fail, Meter, Out, bytes, count, note};

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A prepared data set (path or URL)
    data: String,
    /// Make damaged shards anew from the sources, as `ella prepare` was told then; damaged features are deleted for `ella embed`
    #[arg(long)]
    repair: bool,
    /// Read the sources again too, and every picture that lists name: whether they are what was prepared
    #[arg(long)]
    originals: bool,
    /// Where the sources are now, if they were moved; with --repair or --originals
    #[arg(long = "source", value_name = "SRC")]
    sources: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Found {
    data: String,
    #[serde(flatten)]
    verified: Verified,
    /// Files that were made anew.
    repaired: Vec<String>,
    /// Files that are still missing, and what makes them.
    to_do: Vec<String>,
    /// Sources that are not what was prepared any more; null if they were not looked at.
    changed: Option<Vec<Damage>>,
}

impl Verify {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        if !self.sources.is_empty() && !self.repair && !self.originals {
            return Err(Fail::usage("--source: says where sources are for --repair or --originals; give one of them"));
        }
        if !self.sources.is_empty() {
            // Before anything damaged is deleted.
            prepare::find_again(&self.data, &self.sources)?;
        }
        let runtime = crate::runtime()?;
        let store = Store::open(&self.data)?;
        let (inventory, verified) = runtime.block_on(read(&store))?;
        let (mut repaired, mut to_do) = (Vec::new(), Vec::new());
        if self.repair && !verified.damaged.is_empty() {
            runtime.block_on(inventory.delete(&verified.damaged))?;
            let names =
                |shards: bool| verified.damaged.iter().map(|d| d.file.clone()).filter(move |file| file.starts_with("shards/") == shards);
            to_do.extend(names(false));
            if names(true).next().is_some() {
                prepare::again(&self.data, &self.sources)?;
                repaired.extend(names(true));
            }
        }
        let changed = self.originals.then(|| prepare::changed(&self.data, &self.sources)).transpose()?;
        let sound = verified.damaged.len() == repaired.len() && changed.as_ref().is_none_or(Vec::is_empty);
        let found = Found { data: store.url().to_owned(), verified, repaired, to_do, changed };
        out.result(&found, || text(&found, self.repair));
        Ok(if sound { DONE } else { FAILED })
    }
}

async fn read(store: &Store) -> Result<(Inventory, Verified), Fail> {
    let inventory = Inventory::of(store).await?;
    let meter = Mutex::new((Meter::new("verify", inventory.bytes()), 0));
    let watch = |read: u64| {
        let (meter, done) = &mut *meter.lock().unwrap_or_else(PoisonError::into_inner);
        *done += read;
        meter.at(*done, "bytes");
    };
    let verified = inventory.verify(watch).await?;
    Ok((inventory, verified))
}

fn text(found: &Found, repair: bool) -> String {
    let Found { data, verified, repaired, to_do, changed } = found;
    for Damage { file, what } in &verified.damaged {
        note(format_args!("{data}/{file}: {what}"));
    }
    let mut text = format!("{} read, {}", count(verified.files, "file"), bytes(verified.bytes));
    for stray in &verified.stray {
        text += &format!("\nleft half-written by a writer that was killed: {stray} (it does no harm, and may be deleted)");
    }
    for Damage { what, .. } in changed.iter().flatten() {
        note(what);
    }
    match changed.as_ref().map(Vec::len) {
        None => {}
        Some(0) => text += "\nthe sources are what was prepared",
        Some(n) => text += &format!("\n{} of the sources changed since they were prepared", count(n, "part")),
    }
    match (verified.damaged.len(), repaired.len()) {
        (0, _) => return text + "\nevery byte is as it was written",
        (damaged, 0) if !repair => {
            return text + &format!("\n{} damaged; --repair makes shards anew from their sources", count(damaged, "file"));
        }
        (damaged, made) => text += &format!("\n{} damaged, {made} made anew", count(damaged, "file")),
    }
    if !to_do.is_empty() {
        text += &format!("\nrun `ella embed` (features) or `ella caption` (captions) again to make these anew: {}", to_do.join(", "));
    }
    text
}
