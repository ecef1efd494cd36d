//! `ella verify`: every byte of a data set against its records; damaged files are named, and made anew if asked.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use ella_dataset::{Damage, Inventory, Verified};
use ella_store::Store;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::prepare;
use crate::ui::{DONE, FAILED, Fail, Meter, Out, bytes, count, note};

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A prepared data set (path or URL)
    data: String,
    /// Make damaged shards anew from the sources, as `ella prepare` was told then; damaged features are deleted for `ella embed`, captions never
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
    /// Files that are still missing or damaged, for other commands to make.
    to_do: Vec<String>,
    /// Sources that are not what was prepared any more; null if they were not looked at.
    changed: Option<Vec<Damage>>,
}

impl Verify {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        if !self.sources.is_empty() && !self.repair && !self.originals {
            return Err(Fail::usage("--source: says where sources are for --repair or --originals; give one of them"));
        }
        if self.repair && !self.sources.is_empty() {
            // Before the data set is read: that may take hours.
            prepare::find_again(&self.data, &self.sources)?;
        }
        let runtime = crate::runtime()?;
        let store = Store::open(&self.data)?;
        let (inventory, verified) = runtime.block_on(read(&store))?;
        let (mut repaired, mut to_do) = (Vec::new(), Vec::new());
        if self.repair && !verified.damaged.is_empty() {
            let of = |kind| verified.damaged.iter().filter(|damage| Part::of(damage) == kind).cloned().collect::<Vec<_>>();
            let (shards, features) = (of(Part::Shard), of(Part::Features));
            if !shards.is_empty() {
                self.mend(&runtime, &inventory, &shards)?;
                repaired.extend(shards.into_iter().map(|damage| damage.file));
            }
            runtime.block_on(inventory.delete(&features))?;
            to_do.extend(features.into_iter().chain(of(Part::Captions)).map(|damage| damage.file));
        }
        let changed = self.originals.then(|| prepare::changed(&self.data, &self.sources)).transpose()?;
        let sound = verified.damaged.len() == repaired.len() && changed.as_ref().is_none_or(Vec::is_empty);
        let found = Found { data: store.url().to_owned(), verified, repaired, to_do, changed };
        out.result(&found, || text(&found, self.repair));
        Ok(if sound { DONE } else { FAILED })
    }

    /// Makes shards anew. What cannot be made stays as it was: much of a damaged shard may be sound, and its source may be gone.
    fn mend(&self, runtime: &Runtime, inventory: &Inventory, shards: &[Damage]) -> Result<(), Fail> {
        prepare::ready_again(&self.data, &self.sources)?;
        let aside = runtime.block_on(inventory.put_aside(shards)).map_err(Fail::from);
        match aside.and_then(|()| prepare::again(&self.data, &self.sources)) {
            Ok(()) => Ok(runtime.block_on(inventory.forget(shards))?),
            Err(fail) => {
                match runtime.block_on(inventory.put_back(shards)) {
                    Ok(()) => note("damaged shards that could not be made anew are left as they were"),
                    Err(error) => note(error),
                }
                Err(fail)
            }
        }
    }
}

/// What a file of a data set is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Shard,
    Features,
    Captions,
}

impl Part {
    fn of(damage: &Damage) -> Self {
        match damage.file.split('/').next() {
            Some("features") => Self::Features,
            Some("captions") => Self::Captions,
            _ => Self::Shard,
        }
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
            text += &format!("\n{} damaged", count(damaged, "file"));
            return text + &advice(&verified.damaged);
        }
        (damaged, made) => text += &format!("\n{} damaged, {made} made anew", count(damaged, "file")),
    }
    let (features, captions): (Vec<&str>, Vec<&str>) = to_do.iter().map(String::as_str).partition(|file| file.starts_with("features/"));
    if !features.is_empty() {
        text += &format!("\ndeleted; run the same `ella embed` again to make these anew: {}", features.join(", "));
    }
    if !captions.is_empty() {
        text += &format!("\nnot deleted, for captions may have been paid for: {}; {CAPTIONS}", captions.join(", "));
    }
    text
}

const CAPTIONS: &str = "restore them from a copy, or delete these files and run the same `ella caption` again";

/// What can be done about damaged files, by what they are.
fn advice(damaged: &[Damage]) -> String {
    let of = |kind| damaged.iter().filter(|damage| Part::of(damage) == kind).count();
    let mut text = String::new();
    if of(Part::Shard) > 0 {
        text += &format!("\n--repair makes {} anew from their sources", count(of(Part::Shard), "shard"));
    }
    if of(Part::Features) > 0 {
        let files = count(of(Part::Features), "file");
        text += &format!("\n--repair deletes {files} of features; the same `ella embed` makes them anew then");
    }
    if of(Part::Captions) > 0 {
        text += &format!("\n{} of captions: --repair leaves them as they are; {CAPTIONS}", count(of(Part::Captions), "file"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_repair_would_do_is_told_by_what_is_damaged() {
        let damage = |file: &str| Damage { file: file.to_owned(), what: "it is missing".to_owned() };
        let (shard, features, captions) =
            (damage("shards/0.arrow"), damage("features/f/caption/0.arrow"), damage("captions/dense/0.arrow"));
        let told = advice(std::slice::from_ref(&features));
        assert!(told.contains("1 file of features") && told.contains("ella embed") && !told.contains("shard"), "{told}");
        let told = advice(std::slice::from_ref(&captions));
        assert!(told.contains("leaves them as they are") && told.contains("ella caption") && !told.contains("features"), "{told}");
        let told = advice(&[shard, features, captions]);
        assert!(told.contains("makes 1 shard anew") && told.contains("of features") && told.contains("of captions"), "{told}");
    }
}
