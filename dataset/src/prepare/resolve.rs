//! Which samples are left out of a data set as duplicates of others, once its parts are prepared.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ella_store::Created;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use super::duplicates::{At, Finder, Of, Repeat, SharedKey};
use super::judge::Judge;
use super::{Preparation, READ_AT_ONCE, piece_of};
use crate::error::DataError;
use crate::ipc::unspoolable;
use crate::manifest::{SCHEMA, at, parse, pretty, read};
use crate::picture::Scratch;
use crate::plan::{DUPLICATES, Part, Plan, same};
use crate::report::Refusal;
use crate::source::stem;

/// Of this many sources the first samples are looked at, of those that share a name first.
const LOOKED_AT: usize = 32;

/// One sample that is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LeftOut {
    pub(super) key: String,
    pub(super) why: Refusal,
    /// The key of the sample that is kept.
    of: String,
}

/// What `duplicates.json` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LeftOuts {
    schema: u32,
    /// By part.
    pub(super) parts: BTreeMap<usize, Vec<LeftOut>>,
}

impl LeftOuts {
    /// The keys left out of a part.
    pub(super) fn keys(&self, part: usize) -> Vec<String> {
        self.parts.get(&part).into_iter().flatten().map(|left| left.key.clone()).collect()
    }
}

impl Preparation {
    /// Finds keys that sources share (an error), and duplicates: the parts to prepare without them.
    pub fn resolve(&self) -> BoxFuture<'_, Result<Vec<usize>, DataError>> {
        Box::pin(async move {
            if let Some(there) = self.read_left_out().await? {
                return Ok(there.parts.into_keys().collect());
            }
            let plan = self.planned().await?;
            let parts = &plan.parts().collect::<Vec<_>>();
            let mut finder = Finder::new(plan.settings.duplicates);
            let records = stream::iter(0..parts.len());
            let records = records.map(|index| async move { Ok::<_, DataError>((index, self.done(index, &parts[index], &[]).await?)) });
            let mut records = records.buffered(READ_AT_ONCE);
            while let Some((index, record)) = records.try_next().await? {
                finder.add(index as u32, parts[index].source, &record).map_err(unspoolable)?;
            }
            let found = tokio::task::spawn_blocking(move || finder.find()).await;
            let found = found.unwrap_or_else(|stopped| Err(std::io::Error::other(stopped))).map_err(unspoolable)?;
            let repeats = match found {
                Ok(repeats) => repeats,
                Err(shared) => return Err(self.shared_key(plan, shared).await?),
            };
            let found = LeftOuts { schema: SCHEMA, parts: self.name_repeats(&repeats).await? };
            if self.out.create(DUPLICATES, pretty(&found)).await? == Created::AlreadyThere {
                let there: LeftOuts = parse(&at(&self.out, DUPLICATES), &self.out.get_record(DUPLICATES).await?)?;
                same(&found, &there, at(&self.out, DUPLICATES))?;
            }
            Ok(found.parts.into_keys().collect())
        })
    }

    pub(super) async fn read_left_out(&self) -> Result<Option<LeftOuts>, DataError> {
        let Some(bytes) = read(&self.out, DUPLICATES).await? else { return Ok(None) };
        parse(&at(&self.out, DUPLICATES), &bytes).map(Some)
    }

    /// What was found of duplicates; that must have been looked for.
    pub(super) async fn left_outs(&self) -> Result<&LeftOuts, DataError> {
        let hint = "duplicates were not looked for yet: run `ella prepare` again";
        let missing = || DataError::RecordMissing { file: at(&self.out, DUPLICATES), hint };
        self.left_out.get_or_try_init(|| async { self.read_left_out().await?.ok_or_else(missing) }).await
    }

    /// The keys of repeats, by part.
    async fn name_repeats(&self, repeats: &[Repeat]) -> Result<BTreeMap<usize, Vec<LeftOut>>, DataError> {
        let keys = self.keys_at(repeats.iter().flat_map(|repeat| [repeat.at, repeat.of.place().unwrap_or(repeat.at)]).collect()).await?;
        let key = |at: At| keys.get(&at).cloned().unwrap_or_default();
        let mut left_out = BTreeMap::<usize, Vec<LeftOut>>::new();
        for Repeat { at, of } in repeats {
            let (why, of) = match of {
                Of::Key => (Refusal::DuplicateKey, *at),
                Of::Content(of) => (Refusal::DuplicateImage, *of),
                Of::Look(of) => (Refusal::NearDuplicate, *of),
            };
            left_out.entry(at.0 as usize).or_default().push(LeftOut { key: key(*at), why, of: key(of) });
        }
        Ok(left_out)
    }

    /// The keys of some samples.
    async fn keys_at(&self, wanted: BTreeSet<At>) -> Result<HashMap<At, String>, DataError> {
        let plan = self.planned().await?;
        let parts: Vec<_> = plan.parts().collect();
        let mut keys = HashMap::new();
        for wanted in wanted.into_iter().collect::<Vec<_>>().chunk_by(|a, b| a.0 == b.0) {
            let part = wanted[0].0 as usize;
            let mut record = self.done(part, &parts[part], &[]).await?;
            let mut key = |at: At| record.keys.get_mut(at.1 as usize).map(std::mem::take).unwrap_or_default();
            keys.extend(wanted.iter().map(|at| (*at, key(*at))));
        }
        Ok(keys)
    }

    async fn shared_key(&self, plan: &Plan, shared: SharedKey) -> Result<DataError, DataError> {
        let key = self.keys_at([shared.at].into()).await?.remove(&shared.at).unwrap_or_default();
        let source = |part: u32| plan.parts().nth(part as usize).map_or(usize::MAX, |part| part.source);
        Ok(self.taken(plan, key, source(shared.first), source(shared.at.0)))
    }

    /// The error that two sources have the same key.
    fn taken(&self, plan: &Plan, key: String, first: usize, second: usize) -> DataError {
        let name = |source: usize| self.sources.get(source).map_or_else(String::new, |source| source.name().to_owned());
        let hint = match plan.settings.key_prefix {
            true => "rename one, or leave one of the sources out",
            false => "rename one, or prepare with key prefixes (the source's name before each key: --key-prefix) into a new destination",
        };
        DataError::DuplicateKey { key, first: name(first), second: name(second), hint }
    }

    /// Sources often number their samples alike, most of all those of one name. If their first samples show it, that is told before anything is
    /// prepared, and not when all is.
    pub(super) async fn refuse_alike(&self, plan: &Plan) -> Result<(), DataError> {
        if plan.settings.key_prefix || plan.sources.len() == 1 {
            return Ok(());
        }
        let mut namesakes = BTreeMap::<&str, BTreeMap<usize, Part<'_>>>::new();
        for part in plan.parts() {
            namesakes.entry(stem(&plan.sources[part.source].name)).or_default().entry(part.source).or_insert(part);
        }
        let mut alike: Vec<_> = namesakes.values().collect();
        alike.sort_by_key(|sources| sources.len() == 1);
        let mut parts: Vec<_> = alike.into_iter().flat_map(BTreeMap::values).copied().take(LOOKED_AT).collect();
        parts.sort_by_key(|part| part.source);
        let parts = &parts;
        let looks = stream::iter(0..parts.len()).map(|at| async move { self.first_key(plan, &parts[at]).await });
        let keys: Vec<Option<String>> = looks.buffered(READ_AT_ONCE).collect().await;
        let mut seen = HashMap::new();
        for (part, key) in parts.iter().zip(keys).filter_map(|(part, key)| Some((part, key?))) {
            if let Some(first) = seen.insert(key.clone(), part.source) {
                return Err(self.taken(plan, key, first, part.source));
            }
        }
        Ok(())
    }

    /// The key of the first sample of a part, if it will be kept. What cannot be read is told when it is prepared.
    async fn first_key(&self, plan: &Plan, part: &Part<'_>) -> Option<String> {
        let source = self.source(part).ok()?.clone();
        let (piece, judge) = (piece_of(&source, part), Judge::new(&plan.settings, String::new(), &self.options, HashMap::new()));
        let look = tokio::task::spawn_blocking(move || {
            let mut first = None;
            let read = source.read(&piece, &mut |sample| {
                first = Some(sample);
                false
            });
            let (key, kept) = judge.judge(first.filter(|_| read.is_ok())?, &mut Scratch::default());
            kept.is_ok().then_some(key)
        });
        look.await.ok().flatten()
    }
}
