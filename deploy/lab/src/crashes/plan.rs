//! Which process dies in which stage: derived from a seed, so that a round that failed can be played again.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use super::follow::Told;
use crate::world::{Plane, Site};

/// Part of a run in which a process is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Preflight,
    Prepare,
    Fence,
    Drain,
    Takeover,
    Promote,
    Open,
    Reverse,
    Verify,
}

impl Stage {
    /// In the order of a run.
    pub const ALL: [Stage; 9] = [
        Stage::Preflight,
        Stage::Prepare,
        Stage::Fence,
        Stage::Drain,
        Stage::Takeover,
        Stage::Promote,
        Stage::Open,
        Stage::Reverse,
        Stage::Verify,
    ];

    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Preflight => "preflight",
            Stage::Prepare => "prepare",
            Stage::Fence => "fence",
            Stage::Drain => "drain",
            Stage::Takeover => "takeover",
            Stage::Promote => "promote",
            Stage::Open => "open",
            Stage::Reverse => "reverse",
            Stage::Verify => "verify",
        }
    }

    /// Is this stage under way from that word on? `source` is the site that is left.
    ///
    /// A step that ended is told at once; what waited for nothing else has begun by then.
    fn entered_by(self, told: &Told, source: Site) -> bool {
        let step = match told {
            Told::Begun(_) => return self == Stage::Preflight,
            Told::Step(step) if step["state"] == "done" && step["past"] == false => step,
            _ => return false,
        };
        let is = |stage: &str, act: &str| step["stage"] == stage && (act.is_empty() || step["act"] == act);
        match self {
            // a takeover is told by several words, see `Entry`
            Stage::Preflight | Stage::Takeover => false,
            Stage::Prepare => is("preflight", "reserve_timelines"),
            Stage::Fence => is("fence", "fence_clients") && step["site"] != source.name,
            Stage::Drain => {
                is("fence", "fence_apps") || is("fence", "fence_clients") && step["site"] == source.name
            }
            Stage::Promote => is("takeover", "takeover"),
            Stage::Open => is("promote", "opened"),
            Stage::Reverse => is("open", ""),
            Stage::Verify => is("reverse", "follow"),
        }
    }
}

/// Waits for a stage to be entered.
#[derive(Debug)]
pub struct Entry {
    stage: Stage,
    source: Site,
    /// Last acts of the planes before the takeover, as far as they are not done.
    due: Vec<&'static str>,
}

impl Entry {
    /// Of a run that leaves `source` and moves these planes.
    pub fn new(stage: Stage, source: Site, planes: &BTreeSet<Plane>) -> Entry {
        let last = |plane: &Plane| match plane {
            Plane::Postgres => Some("replayed"),
            Plane::Kafka => Some("set_offsets"),
            Plane::S3 => Some("last_pass"),
            Plane::Airflow => None, // gone before anybody else is fenced
        };
        Entry { stage, source, due: planes.iter().filter_map(last).collect() }
    }

    /// Is the stage under way from that word on?
    pub fn by(&mut self, told: &Told) -> bool {
        if self.stage != Stage::Takeover {
            return self.stage.entered_by(told, self.source);
        }
        let Told::Step(step) = told else { return false };
        if step["state"] == "done" && step["past"] == false {
            self.due.retain(|act| step["act"] != *act);
        }
        self.due.is_empty()
    }
}

/// Whose agent dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// Of the site that leads the quorum just then.
    Leader,
    /// Of the site that is left.
    Source,
    /// Of the site that is moved to.
    Target,
}

impl Victim {
    const ALL: [Victim; 3] = [Victim::Leader, Victim::Source, Victim::Target];

    fn name(self) -> &'static str {
        match self {
            Victim::Leader => "leader",
            Victim::Source => "source",
            Victim::Target => "target",
        }
    }
}

/// One move during which an agent is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// When.
    pub stage: Stage,
    /// Who.
    pub victim: Victim,
    /// Started again only once the run has ended, asks for a human or stands still.
    pub late: bool,
    /// Otherwise started again after this time.
    pub pause: Duration,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.stage.name(), self.victim.name())?;
        if self.late { f.write_str("/late") } else { Ok(()) }
    }
}

/// The rounds of a seed. Each nine hold every stage once and every victim three times, once of them late; 27 hold
/// every victim in every stage.
pub fn rounds(seed: u64, count: usize) -> Vec<Round> {
    let mut dice = Dice(seed);
    let mut first: Vec<(usize, bool)> =
        (0..Victim::ALL.len()).flat_map(|v| [(v, true), (v, false), (v, false)]).collect();
    dice.shuffle(&mut first);
    let nine =
        |turn: usize| Stage::ALL.into_iter().zip(first.clone()).map(move |(s, (v, l))| (turn, s, v, l));
    let all = (0..).flat_map(nine).take(count);
    all.map(|(turn, stage, victim, late)| Round {
        stage,
        victim: Victim::ALL[(victim + turn) % Victim::ALL.len()],
        late,
        pause: Duration::from_millis(50 + dice.below(1_500)),
    })
    .collect()
}

/// Numbers that a seed decides (`SplitMix64`).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = usize::try_from(self.below(last as u64 + 1)).unwrap_or(last);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{FRA, ROME};
    use serde_json::json;

    #[test]
    fn holds_every_stage_and_every_victim_thrice_whatever_the_seed() {
        for seed in 0..50 {
            let nine = rounds(seed, 9);
            assert!(Stage::ALL.iter().all(|s| nine.iter().any(|r| r.stage == *s)));
            for victim in Victim::ALL {
                assert_eq!(nine.iter().filter(|r| r.victim == victim).count(), 3);
                assert_eq!(nine.iter().filter(|r| r.victim == victim && r.late).count(), 1);
            }
        }
    }

    #[test]
    fn holds_the_whole_grid_in_27_rounds() {
        let all = rounds(3, 27);
        let grid: BTreeSet<(Stage, Victim)> = all.iter().map(|r| (r.stage, r.victim)).collect();
        assert_eq!(grid.len(), Stage::ALL.len() * Victim::ALL.len());
    }

    #[test]
    fn plays_the_same_rounds_again_for_the_same_seed() {
        assert_eq!(rounds(7, 20), rounds(7, 20));
        assert_ne!(rounds(7, 9), rounds(8, 9));
    }

    #[test]
    fn knows_the_word_with_which_each_stage_begins() {
        let step = |stage: &str, act: &str, site: &str| {
            Told::Step(json!({"stage": stage, "act": act, "site": site, "state": "done", "past": false}))
        };
        assert!(Stage::Preflight.entered_by(&Told::Begun("X".into()), ROME));
        assert!(Stage::Prepare.entered_by(&step("preflight", "reserve_timelines", "quorum"), ROME));
        assert!(Stage::Fence.entered_by(&step("fence", "fence_clients", FRA.name), ROME));
        assert!(!Stage::Fence.entered_by(&step("fence", "fence_clients", ROME.name), ROME));
        assert!(Stage::Drain.entered_by(&step("fence", "fence_clients", ROME.name), ROME));
        assert!(Stage::Open.entered_by(&step("promote", "opened", "quorum"), ROME));
        let past = json!({"stage": "promote", "act": "opened", "state": "done", "past": true});
        assert!(!Stage::Open.entered_by(&Told::Step(past), ROME));
    }

    #[test]
    fn awaits_the_takeover_until_every_plane_is_drained() {
        let step = |act: &str| {
            Told::Step(json!({"stage": "drain", "act": act, "site": "fra", "state": "done", "past": false}))
        };
        let mut entry = Entry::new(Stage::Takeover, ROME, &BTreeSet::from([Plane::Postgres, Plane::Kafka]));
        assert!(!entry.by(&step("replayed")));
        assert!(!entry.by(&step("fence_mirror")));
        assert!(entry.by(&step("set_offsets")));
    }
}
