//! Hello: taking workers in, turning them away, and knowing those again that were here before.

use super::members::{Held, Member};
use super::refusal::check_form;
use super::{ConnId, Core, Effect, Failure, Loss, Note, Outcome, Phase, Refusal, Time, Who, device, shown};
use ella_proto::v1::{self, to_worker};

impl Core {
    pub(super) fn hello(&mut self, now: Time, conn: ConnId, mut hello: v1::Hello) {
        if self.members.contains(conn) {
            return self.counts.add("refused_second_hello", 1);
        }
        if let Err(refusal) = self.admit(&hello) {
            return self.refuse(conn, shown(&hello.worker_id), refusal);
        }
        self.make_way(&hello);
        let place = hello.place.take();
        let before = self.members.conn_of(&hello.worker_id);
        if let (Some(before), Some(place)) = (before, &place)
            && self.goes_on(before, place)
        {
            return self.reattach(now, conn, before, hello);
        }
        if let Some(place) = &place {
            self.number_after(place);
        }
        let (worker, device) = (hello.worker_id.clone(), device(&hello));
        let held = if place.is_some() { Held::Busy(None) } else { Held::Loading };
        self.members.insert(conn, Member::new(hello, held, now));
        self.joined += 1;
        self.send(conn, to_worker::Body::Welcome(self.config.welcome.clone()));
        let (have, need) = (self.attached(), self.need());
        self.note(Note::Attached { worker, device, have, need });
        if let Some(before) = before {
            self.lost(now, before, Loss::Replaced);
        }
        if let Some(place) = place {
            self.came_back(now, conn, place);
        }
        self.settle(now);
    }

    fn admit(&self, hello: &v1::Hello) -> Result<(), Refusal> {
        match &self.phase {
            Phase::Over(Outcome::Failed(failure)) if matches!(**failure, Failure::Superseded { .. }) => return Err(Refusal::Superseded),
            Phase::Over(outcome) | Phase::Ending { outcome, .. } => {
                return Err(Refusal::RunOver { outcome: outcome.on_the_wire(), permanent: outcome.is_permanent() });
            }
            _ => {}
        }
        check_form(hello)?;
        Refusal::of_another_build(hello, &self.config.version, &self.config.welcome.config_digest)?;
        // Its generation is of a coordinator that came after this one, which has not noticed yet. To end it would be wrong.
        if hello.place.as_ref().is_some_and(|place| place.term > self.term.0) {
            return Err(Refusal::Superseded);
        }
        self.check_kind(hello)?;
        for (_, member) in self.members.iter().filter(|(_, member)| member.open) {
            let other = &member.hello;
            let holder = || Box::new(Who::of(other, member.rank()));
            if other.worker_id == hello.worker_id {
                if (&other.host, other.pid) != (&hello.host, hello.pid) {
                    return Err(Refusal::DuplicateWorker { holder: holder() });
                }
                continue;
            }
            if !hello.device_uuid.is_empty() && other.device_uuid == hello.device_uuid {
                return Err(Refusal::DuplicateDevice { uuid: hello.device_uuid.clone(), holder: holder() });
            }
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, conn: ConnId, worker: String, refusal: Refusal) {
        self.counts.add(refusal.counter(), 1);
        self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
        self.effects.push(Effect::Close(conn));
        self.note(Note::Refused { worker, why: refusal.to_string() });
    }

    /// Whether a worker whose stream of before still counts goes on in the place that it has here.
    fn goes_on(&self, before: ConnId, place: &v1::Place) -> bool {
        let runs = matches!(self.phase, Phase::Training | Phase::Draining { .. });
        // It may not have heard that it was adopted.
        let adopted = self.lineup.as_ref().and_then(|lineup| lineup.adopted);
        let of_term = place.term == self.term.0 || Some(place.term) == adopted;
        let is_ours = of_term && (place.generation, place.world as usize) == (self.generation.0, self.world());
        runs && is_ours && self.members.rank(before).is_some_and(|rank| rank.0 == place.rank)
    }

    /// A worker's stream broke, and it was back before that was seen here. Nothing has happened but that messages may be lost, so what
    /// holds now is said again.
    fn reattach(&mut self, now: Time, conn: ConnId, before: ConnId, hello: v1::Hello) {
        let Some(member) = self.members.remove(before) else { return };
        self.close_stream(before);
        self.members.insert(conn, Member { hello, heard: now, ..member });
        self.counts.add("workers_reattached", 1);
        self.send(conn, to_worker::Body::Welcome(self.config.welcome.clone()));
        self.send(conn, to_worker::Body::Adopted(v1::Adopted {}));
        self.send(conn, to_worker::Body::Start(v1::Start {}));
        let Some(lineup) = &mut self.lineup else { return };
        lineup.shaken = Some(now);
        let regroup = v1::Regroup { at_boundary: true, reason: lineup.why.clone() };
        match (&self.phase, lineup.boundary) {
            (Phase::Draining { reason, .. }, _) => {
                let reason = reason.clone();
                self.send(conn, to_worker::Body::Drain(v1::Drain { reason }));
            }
            (_, true) => self.send(conn, to_worker::Body::Regroup(regroup)),
            _ => {}
        }
    }
}
