//! Which faults a seed draws. Nothing here knows of processes.

use std::time::Duration;

use super::plan::{Kind, Off, Plan, Target};

/// Faults come before this share of the steps is done, so that none is left when the run is over.
const LAST: f64 = 0.92;
/// One of so many stops is the coordinator's.
const COORDINATORS: u64 = 4;

/// One fault, all of it decided but for who has which rank then.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) at_step: u64,
    pub(super) kind: Kind,
    pub(super) target: Target,
    /// The plan names its target: no other will do.
    pub(super) named: bool,
    /// How long it lasts, or who goes stays away.
    pub(super) lasts: Duration,
    pub(super) off: Off,
    /// A partition resets connections, where others only let nothing through.
    pub(super) resets: bool,
    /// A coordinator is not killed but hangs, and goes on when another has taken its place (TERM).
    pub(super) hangs: bool,
}

/// Numbers that look like chance, and are the same for the same seed.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn within(&mut self, [from, to]: [u64; 2]) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// The faults of a seed, for a run of so many steps whose lease is so many milliseconds, in the order of their steps.
pub(super) fn draw(plan: &Plan, seed: u64, steps: u64, lease: u64) -> Vec<Fault> {
    let mut dice = Dice::new(seed);
    let count = plan.drawn();
    // Each kind as often as the others, or once more.
    let mut kinds: Vec<Kind> = plan.chaos.kinds.clone();
    dice.shuffle(&mut kinds);
    let mut kinds: Vec<Kind> = kinds.into_iter().cycle().take(count).collect();
    dice.shuffle(&mut kinds);
    let last = ((steps as f64 * LAST) as u64).max(1);
    let mut at: Vec<u64> = (0..count).map(|_| 1 + dice.below(last)).collect();
    at.sort_unstable();
    let mut faults: Vec<Fault> = at.into_iter().zip(kinds).map(|(at_step, kind)| one(plan, lease, (at_step, kind), &mut dice)).collect();
    for named in &plan.fault {
        let drawn = one(plan, lease, (named.at_step, named.kind), &mut dice);
        faults.push(Fault {
            target: named.target.unwrap_or(drawn.target),
            named: named.target.is_some(),
            lasts: named.lasts.map_or(drawn.lasts, |lasts| lasts.duration()),
            off: named.from.unwrap_or_default(),
            ..drawn
        });
    }
    faults.sort_by_key(|fault| fault.at_step);
    faults
}

fn one(plan: &Plan, lease: u64, (at_step, kind): (u64, Kind), dice: &mut Dice) -> Fault {
    let chaos = &plan.chaos;
    let worker = Target::Worker(dice.below(chaos.workers as u64) as usize);
    let is_coordinators = kind == Kind::Coordinator || kind == Kind::Stop && dice.below(COORDINATORS) == 0;
    let lasts = chaos.lasts.map_or([lease / 20, lease * 3 / 2], |range| range.map(|time| time.0));
    let goes = matches!(kind, Kind::Kill | Kind::Coordinator | Kind::Leave | Kind::All);
    Fault {
        at_step,
        kind,
        target: if is_coordinators { Target::Coordinator } else { worker },
        named: false,
        lasts: dice.within(if goes { chaos.restart_after.map(|time| time.0) } else { lasts }),
        off: [Off::Coordinator, Off::Peers, Off::Both][dice.below(3) as usize],
        resets: dice.below(3) == 0,
        hangs: kind == Kind::Coordinator && dice.below(3) == 0,
    }
}

impl Fault {
    /// What is to happen, in words.
    pub(super) fn words(&self) -> String {
        let Self { kind, target, lasts, .. } = self;
        let seconds = lasts.as_secs_f64();
        match kind {
            Kind::Kill | Kind::Leave => format!("{} {target}, back after {seconds:.1} s", kind.name()),
            Kind::Coordinator if self.hangs => format!("the coordinator hangs, another comes after {seconds:.1} s"),
            Kind::Coordinator => format!("kill the coordinator, back after {seconds:.1} s"),
            Kind::Stop | Kind::Slow => format!("{} {target} for {seconds:.1} s", kind.name()),
            Kind::Partition => {
                let from = match self.off {
                    Off::Coordinator => "the coordinator",
                    Off::Peers => "its peers",
                    Off::Both => "all",
                };
                let how = if self.resets { " by resets" } else { "" };
                format!("cut {target} off from {from}{how} for {seconds:.1} s")
            }
            Kind::Store => format!("a bad time of the store for {seconds:.1} s"),
            Kind::Join => "one more worker comes".to_owned(),
            Kind::All => format!("kill all, back after {seconds:.1} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(more: &str) -> Plan {
        Plan::parse(&format!("[chaos]\nrun = \"r\"\noutput = \"o\"\n{more}"), "plan.toml").unwrap()
    }

    #[test]
    fn a_seed_draws_the_same_faults_and_another_seed_others() {
        let plan = plan("");
        let drawn = |seed| draw(&plan, seed, 300, 1_000);
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
    }

    #[test]
    fn kinds_come_equally_often_at_rising_steps_before_the_end() {
        let plan = plan("");
        for seed in 0..50 {
            let faults = draw(&plan, seed, 300, 1_000);
            assert_eq!(faults.len(), 40);
            for kind in &plan.chaos.kinds {
                assert_eq!(faults.iter().filter(|fault| fault.kind == *kind).count(), 5, "{kind:?} of seed {seed}");
            }
            assert!(faults.is_sorted_by_key(|fault| fault.at_step));
            assert!(faults.iter().all(|fault| (1..=276).contains(&fault.at_step)));
            assert!(faults.iter().all(|fault| matches!(fault.target, Target::Worker(0..4) | Target::Coordinator)));
            let longest = faults.iter().filter(|f| f.kind == Kind::Stop).map(|f| f.lasts).max();
            assert!(longest <= Some(Duration::from_millis(1_500)));
        }
        let all: Vec<_> = (0..50).flat_map(|seed| draw(&plan, seed, 300, 1_000)).collect();
        let stops = || all.iter().filter(|fault| fault.kind == Kind::Stop);
        assert!(stops().any(|stop| stop.target == Target::Coordinator) && stops().any(|stop| stop.target != Target::Coordinator));
        assert!(stops().any(|stop| stop.lasts > Duration::from_millis(1_000)), "beyond the lease");
        assert!(all.iter().any(|fault| fault.hangs) && all.iter().all(|fault| !fault.hangs || fault.kind == Kind::Coordinator));
    }

    #[test]
    fn named_faults_are_as_they_are_named() {
        let text = "faults = 2\n[[fault]]\nat_step = 30\nkind = \"partition\"\ntarget = \"rank 1\"\nfor = \"500ms\"\nfrom = \"peers\"\n";
        let faults = draw(&plan(text), 1, 100, 1_000);
        let named = faults.iter().find(|fault| fault.named).unwrap();
        assert_eq!((named.at_step, named.target, named.lasts), (30, Target::Rank(1), Duration::from_millis(500)));
        assert_eq!((named.off, faults.len()), (Off::Peers, 3));
        assert!(named.words().starts_with("cut rank 1 off from its peers"), "{}", named.words());
    }
}
