//! Ready: all ranks of a generation must agree before it trains, with each other and with what the run was trained on so far.

use super::refusal::shown;
use super::{ConnId, Core, Failure, Field, Loss, Note, Phase, Refusal, Than, Time};
use ella_proto::ids::{Rank, Step};
use ella_proto::v1::{self, to_worker};

impl Core {
    /// A rank has its state, and its collective stands. Once all have, training begins.
    pub(super) fn ready(&mut self, now: Time, conn: ConnId, ready: v1::Ready) {
        let starting = matches!(self.phase, Phase::Starting { .. }) && self.members.rank(conn).is_some();
        let Some(lineup) = self.lineup.as_ref().filter(|_| starting) else {
            return self.counts.add("refused_out_of_turn", 1);
        };
        let (from, survives) = (lineup.from, lineup.source.is_some());
        let mut digests = vec![(Field::Data, &*ready.data_digest), (Field::Models, &*ready.models_digest)];
        if !survives || !ready.state_digest.is_empty() {
            digests.push((Field::State, &ready.state_digest));
        }
        if let Some(failure) = self.malformed(conn, &digests) {
            return self.fail(failure);
        }
        if let Some(member) = self.members.get_mut(conn) {
            member.ready = Some(ready);
        }
        let Some(all) = self.members.all_ready() else { return };
        if survives && self.let_strangers_go(now) {
            return;
        }
        if let Some(failure) = self.judge_ready(&all, survives) {
            return self.fail(failure);
        }
        self.agreed = all.into_iter().next().map(|(_, ready)| ready);
        if let Some(lineup) = &mut self.lineup {
            lineup.started = true;
        }
        self.send_placed(&to_worker::Body::Start(v1::Start {}));
        self.note(Note::Started { generation: self.generation.0, step: from.0 });
        self.begin_training(now);
    }

    /// Why a worker that waits for a place can have none: it has other data or models than the run was trained on in this incarnation.
    pub(super) fn stranger(&self, idle: &v1::Idle) -> Option<Refusal> {
        let agreed = self.agreed.as_ref()?;
        let fields = [(Field::Data, &agreed.data_digest, &idle.data_digest), (Field::Models, &agreed.models_digest, &idle.models_digest)];
        let (field, ours, theirs) = fields.into_iter().find(|(_, ours, theirs)| !theirs.is_empty() && ours != theirs)?;
        Some(Refusal::Data { field, ours: ours.clone(), theirs: shown(theirs) })
    }

    /// Lets ranks go that read other data or models than the run was trained on in this incarnation. A worker that was set up wrongly and
    /// joins must not end a run that others can go on with.
    fn let_strangers_go(&mut self, now: Time) -> bool {
        let Some(agreed) = self.agreed.clone() else { return false };
        let samples = agreed.samples_per_epoch.to_string();
        let mut strangers = Vec::new();
        for (_, conn, member) in self.members.placed() {
            let Some(ready) = &member.ready else { continue };
            let fields = [
                (Field::Data, &agreed.data_digest, &ready.data_digest),
                (Field::Models, &agreed.models_digest, &ready.models_digest),
                (Field::SamplesPerEpoch, &samples, &ready.samples_per_epoch.to_string()),
            ];
            if let Some((field, expected, found)) = fields.into_iter().find(|(_, expected, found)| expected != found) {
                strangers.push((conn, Loss::Differs { field, expected: expected.clone(), found: found.clone() }));
            }
        }
        let are_some = !strangers.is_empty();
        for (conn, how) in strangers {
            self.let_go(now, conn, how);
        }
        are_some
    }

    fn judge_ready(&self, all: &[(Rank, v1::Ready)], survives: bool) -> Option<Failure> {
        let lineup = self.lineup.as_ref()?;
        let column = |text: fn(&v1::Ready) -> String| -> Vec<(Rank, String)> { all.iter().map(|(r, ready)| (*r, text(ready))).collect() };
        let data = column(|ready| ready.data_digest.clone());
        let models = column(|ready| ready.models_digest.clone());
        let step = column(|ready| ready.step.to_string());
        let state = column(|ready| ready.state_digest.clone());
        let from = lineup.commit.as_ref();
        let than = match from {
            _ if survives => Than::Survivor,
            Some(commit) => Than::Commit(Step(commit.step)),
            None => Than::FreshStart,
        };
        let steps = self.members.difference(Field::Step, lineup.from, &step, &lineup.from.to_string(), than);
        let with_commit = from.and_then(|commit| {
            let checks = [
                (Field::Data, &data, commit.data_digest.to_string()),
                (Field::Models, &models, commit.models_digest.to_string()),
                (Field::State, &state, commit.state_digest.to_string()),
            ];
            let checks = checks.into_iter().filter(|(field, ..)| !survives || *field != Field::State);
            let than = Than::Commit(Step(commit.step));
            checks
                .into_iter()
                .find_map(|(field, values, expected)| self.members.difference(field, Step(commit.step), values, &expected, than))
        });
        let columns = [
            (Field::Data, &data),
            (Field::Models, &models),
            (Field::SamplesPerEpoch, &column(|ready| ready.samples_per_epoch.to_string())),
            (Field::State, &state),
        ];
        let columns = columns.into_iter().filter(|(field, _)| !survives || *field != Field::State);
        let among = || columns.into_iter().find_map(|(field, values)| self.members.disagreement(field, lineup.from, values));
        steps.or(with_commit).or_else(among)
    }

    /// A digest that is none.
    pub(super) fn malformed(&self, conn: ConnId, digests: &[(Field, &str)]) -> Option<Failure> {
        let (field, found) = digests.iter().find(|(_, text)| text.parse::<ella_store::Digest>().is_err())?;
        Some(Failure::Malformed { who: self.members.who(conn)?, field: *field, found: shown(found) })
    }
}
