//! What workers compute with. A run keeps to one kind of device. Otherwise it trains with whom it can get, and tells where that may cost its bits (SAME).

use super::refusal::KindOf;
use super::{ConnId, Core, Note, Refusal};
use ella_proto::v1::Hello;
use std::collections::{BTreeMap, BTreeSet};

/// By name; under [`DEVICE`] the device's kind.
pub(super) type Computes = BTreeMap<String, String>;

const DEVICE: &str = "device";

pub(super) fn computes(hello: &Hello) -> Computes {
    let named = hello.computes.iter().map(|(name, what)| (name.clone(), what.clone()));
    named.chain([(DEVICE.to_owned(), hello.device_kind.clone())]).collect()
}

fn are_alike(a: &Hello, b: &Hello) -> bool {
    a.device_kind == b.device_kind && a.computes == b.computes
}

/// In what one computes otherwise than another, in words.
fn differences(one: &Computes, other: &Computes) -> String {
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let said = |of: &Computes, name: &String| of.get(name).map_or_else(|| "unknown".to_owned(), |what| format!("`{what}`"));
    let differs = names.into_iter().filter(|name| one.get(*name) != other.get(*name));
    differs.map(|name| format!("{name} is {} instead of {}", said(one, name), said(other, name))).collect::<Vec<_>>().join(", ")
}

impl Core {
    /// Refuses a worker of another kind of device than the run's: the one that its config names, else the one that it was trained on, else that of the
    /// workers that are here.
    pub(super) fn check_kind(&self, hello: &Hello) -> Result<(), Refusal> {
        let theirs = &hello.device_kind;
        let trained = || {
            Some((self.computed_with.as_ref().or(self.commits.last().map(|commit| &commit.computed_with))?.get(DEVICE)?, KindOf::Trained))
        };
        let others = || {
            let mut others = self.members.iter().map(|(_, member)| member).filter(|member| member.open).map(|member| &member.hello);
            let other = others.find(|other| other.worker_id != hello.worker_id && other.device_kind != *theirs)?;
            Some((&other.device_kind, KindOf::Others)).filter(|_| !self.makes_way(theirs))
        };
        let named = self.config.device.as_ref().map(|kind| (kind, KindOf::Config));
        match named.or_else(trained).or_else(others) {
            Some((ours, of)) if ours != theirs => Err(Refusal::DeviceKind { ours: ours.clone(), theirs: theirs.clone(), of }),
            _ => Ok(()),
        }
    }

    /// While nothing is trained, and nobody has a place, those without a GPU make way for those with one: who came first says nothing, and a worker whose
    /// GPU can't be used comes soonest.
    fn makes_way(&self, kind: &str) -> bool {
        let last = self.last_commit();
        kind == "cuda" && self.lineup.is_none() && !self.members.any(|member| member.is_busy() || member.state(last).is_some())
    }

    /// Sends those away that are of another kind than a worker that was just let in.
    pub(super) fn make_way(&mut self, hello: &Hello) {
        let ours = &hello.device_kind;
        for conn in self.members.which(|member| member.hello.worker_id != hello.worker_id && member.hello.device_kind != *ours) {
            let theirs = self.members.get(conn).map(|member| member.hello.device_kind.clone()).unwrap_or_default();
            self.send_away(conn, Refusal::DeviceKind { ours: ours.clone(), theirs, of: KindOf::Others });
        }
    }

    /// Ends the stream of a worker that has no place.
    fn send_away(&mut self, conn: ConnId, refusal: Refusal) {
        if let Some(member) = self.members.remove(conn) {
            self.closed.insert(conn);
            self.refuse(conn, member.hello.worker_id, refusal);
        }
    }

    /// Tells where the ranks that begin to train compute otherwise than the commit that they resume from, or than each other: other bits may come of it.
    pub(super) fn tell_unlike(&mut self) {
        let placed = self.members.placed();
        let Some((_, _, first)) = placed.first() else { return };
        let mut told = Vec::new();
        let ours = computes(&first.hello);
        let commit = self.lineup.as_ref().filter(|lineup| lineup.source.is_none()).and_then(|lineup| lineup.commit.as_ref());
        if let Some(commit) = commit.filter(|commit| !commit.computed_with.is_empty() && commit.computed_with != ours) {
            let how = format!("than the commit of step {}: {}", commit.step, differences(&ours, &commit.computed_with));
            told.push((first.hello.worker_id.clone(), how));
        }
        let others: Vec<_> = placed.iter().filter(|(_, _, member)| !are_alike(&member.hello, &first.hello)).collect();
        if let Some((_, _, odd)) = others.first() {
            let how = differences(&computes(&odd.hello), &ours);
            told.push((
                odd.hello.worker_id.clone(),
                format!("than rank 0: {how}; unlike rank 0 are {} of {} ranks", others.len(), placed.len()),
            ));
        }
        self.computed_with = Some(ours);
        for (worker, how) in told {
            self.counts.add("ranks_unlike", 1);
            self.note(Note::Unlike { worker, how: format!("it computes otherwise {how}") });
        }
    }
}
