//! A generation that outlived its coordinator goes on under the next one, if all its ranks come back (LIVE).

use super::members::Held;
use super::{ConnId, Core, Lineup, Note, Time};
use ella_proto::ids::{Generation, Rank, Step};
use ella_proto::v1::{self, to_worker};
use std::collections::BTreeSet;

/// The newest generation of which ranks have come back.
#[derive(Debug)]
pub(super) struct Returning {
    term: u64,
    generation: u64,
    /// The others have until then.
    pub(super) until: Time,
}

impl Core {
    /// Generations of this incarnation are numbered after those that came back.
    pub(super) fn number_after(&mut self, place: &v1::Place) {
        if self.adopts && place.term < self.term.0 {
            self.generation = self.generation.max(Generation(place.generation));
        }
    }

    /// A worker is back, and its generation runs as far as it knows.
    pub(super) fn came_back(&mut self, now: Time, conn: ConnId, place: v1::Place) {
        let this = (place.term, place.generation);
        let newest = self.returning.as_ref().map(|returning| (returning.term, returning.generation));
        if !self.adopts || place.term >= self.term.0 || newest.is_some_and(|newest| this < newest) {
            return self.regroup(conn, "its generation is over");
        }
        if newest.is_some_and(|newest| newest < this) {
            self.dismiss("a newer generation runs");
        }
        if newest != Some(this) {
            let (term, generation) = this;
            self.returning = Some(Returning { term, generation, until: now.after(self.config.welcome.lease_ms) });
        }
        if let Some(member) = self.members.get_mut(conn) {
            member.step = place.step;
            member.place = Some(place);
            member.trained = true;
        }
        self.try_adopt(now);
    }

    fn try_adopt(&mut self, now: Time) {
        let places: Vec<(ConnId, v1::Place)> = self.returned();
        if let Some(why) = self.unfit(&places) {
            return self.give_up_adoption(why);
        }
        if places.first().is_some_and(|(_, place)| place.world as usize == places.len()) {
            self.adopt(now, places);
        }
    }

    fn returned(&self) -> Vec<(ConnId, v1::Place)> {
        self.members.iter().filter(|(_, member)| member.open).filter_map(|(conn, member)| Some((conn, member.place.clone()?))).collect()
    }

    /// Ranks that have come back, and how many there are of their generation, while others are awaited.
    pub(super) fn awaited(&self) -> Option<(usize, usize)> {
        self.returning.as_ref()?;
        let places = self.returned();
        Some((places.len(), places.first().map_or(0, |(_, place)| place.world as usize)))
    }

    /// Why the generation that these are of cannot go on.
    fn unfit(&self, places: &[(ConnId, v1::Place)]) -> Option<&'static str> {
        let (_, first) = places.first()?;
        let agreed = |place: &v1::Place| {
            let v1::Ready { data_digest, models_digest, samples_per_epoch, .. } = place.ready.clone()?;
            let are_digests = [&data_digest, &models_digest].iter().all(|text| text.parse::<ella_store::Digest>().is_ok());
            are_digests.then_some((data_digest, models_digest, samples_per_epoch))
        };
        let ranks: BTreeSet<u32> = places.iter().map(|(_, place)| place.rank).collect();
        let alike = places.iter().all(|(_, place)| place.world == first.world && agreed(place) == agreed(first));
        if ranks.len() < places.len() || !alike || agreed(first).is_none() {
            return Some("the ranks that came back contradict each other");
        }
        if places.iter().any(|(_, place)| Step(place.step) < self.last_commit()) {
            return Some("the generation that came back is older than the last commit");
        }
        // What they have reported of their last commit the coordinator before has taken with it: the next generation begins with it.
        places.iter().any(|(_, place)| place.step >= self.config.steps).then_some("the generation that came back has applied its last step")
    }

    fn adopt(&mut self, now: Time, places: Vec<(ConnId, v1::Place)>) {
        let from = places.iter().map(|(_, place)| place.step).min().unwrap_or_default();
        let adopted = places.first().map(|(_, place)| place.term);
        self.lineup = Some(Lineup { started: true, adopted, ..Lineup::new(places.len(), Step(from)) });
        (self.returning, self.adopts) = (None, false);
        for (conn, place) in places {
            let Some(member) = self.members.get_mut(conn) else { continue };
            member.enter(Held::Busy(Some(Rank(place.rank))));
            member.step = place.step;
            self.agreed = place.ready.clone();
            member.ready = place.ready;
        }
        let ranks = self.members.placed();
        let workers = ranks.iter().map(|(_, _, member)| member.hello.worker_id.clone()).collect();
        let conns: Vec<ConnId> = ranks.iter().map(|(_, conn, _)| *conn).collect();
        self.send_to(&conns, &to_worker::Body::Adopted(v1::Adopted {}));
        self.note(Note::Adopted { generation: self.generation.0, workers, step: from });
        // All were ready. Those that their coordinator had not told so yet still wait for it.
        self.send_to(&conns, &to_worker::Body::Start(v1::Start {}));
        self.begin_training(now);
    }

    /// Not all ranks came in time.
    pub(super) fn adoption_expired(&mut self, now: Time) {
        if self.returning.as_ref().is_none_or(|returning| now < returning.until) {
            return;
        }
        if self.returned().is_empty() {
            // They left again; another window begins when the first is back.
            self.returning = None;
        } else {
            self.give_up_adoption("not all ranks of the generation came back");
        }
        self.settle(now);
    }

    pub(super) fn give_up_adoption(&mut self, why: &str) {
        self.note(Note::Regroup { generation: self.generation.0, reason: why.to_owned(), at_boundary: false });
        self.dismiss(why);
        (self.returning, self.adopts) = (None, false);
    }

    /// Ends the generations of those that came back.
    fn dismiss(&mut self, why: &str) {
        for (conn, _) in self.returned() {
            if let Some(member) = self.members.get_mut(conn) {
                member.place = None;
            }
            self.regroup(conn, why);
        }
    }

    /// Tells a worker that its generation is over, whichever that is.
    fn regroup(&mut self, conn: ConnId, why: &str) {
        self.send(conn, to_worker::Body::Regroup(v1::Regroup { at_boundary: false, reason: why.to_owned() }));
    }
}
