//! An idealised log: linearizable, with leaders that change and proposals that get lost,
//! arrive twice, late, or without an answer.

use dc_core::ids::{SiteId, Token};
use dc_core::registry::{Command, Entry, Registry};

use crate::dice::Dice;
use crate::sin::{self, Sin};

struct Flight {
    due: u64,
    command: Command,
}

/// The log and the state that every committed entry gives.
pub struct Log {
    /// Committed entries, each with the tick of its commit.
    pub entries: Vec<(u64, Command)>,
    /// With all of them applied.
    pub truth: Registry,
    /// Who leads, if anyone does.
    pub leader: Option<SiteId>,
    /// No leader is elected before.
    pub vacant_until: u64,
    /// One proposal in so many arrives twice, up to two minutes apart.
    pub twice_in: u64,
    /// What was committed and what went wrong, in words.
    pub story: Vec<String>,
    sin: Option<Sin>,
    flights: Vec<Flight>,
}

impl Log {
    /// An empty log.
    pub fn new(sin: Option<Sin>) -> Self {
        Self {
            entries: Vec::new(),
            truth: Registry::default(),
            leader: None,
            vacant_until: 0,
            twice_in: 30,
            story: Vec::new(),
            sin,
            flights: Vec::new(),
        }
    }

    /// Sends a proposal on its way. Nobody is told what became of it: who cares reads the log.
    pub fn propose(&mut self, now: u64, command: Command, dice: &mut Dice) {
        if dice.once_in(40) {
            return; // lost
        }
        if dice.once_in(self.twice_in) {
            let late = now + dice.between(1, 2400);
            self.flights.push(Flight { due: late, command: command.clone() });
        }
        self.flights.push(Flight { due: now + dice.between(1, 4), command });
    }

    /// Commits what has arrived, in the order of its arrival.
    pub fn tick(&mut self, now: u64, dice: &mut Dice) {
        let mut later = Vec::new();
        for mut flight in std::mem::take(&mut self.flights) {
            if flight.due > now {
                later.push(flight);
            } else if self.leader.is_some() {
                self.commit(now, flight.command);
            } else if !dice.once_in(3) {
                flight.due = now + dice.between(1, 10);
                later.push(flight);
            }
        }
        self.flights = later;
    }

    fn commit(&mut self, now: u64, command: Command) {
        self.entries.push((now, command));
        let at = self.entries.len();
        if let Some((_, command)) = self.entries.last() {
            let answer = sin::apply(&mut self.truth, Token(at as u64), command, self.sin);
            if !matches!(command.entry, Entry::Renew { .. }) {
                let mut said = format!("{:?} -> {answer:?}", command.entry);
                said.truncate(said.floor_char_boundary(260));
                self.story.push(format!("tick {now}: [{at}] {} {said}", command.by));
            }
        }
    }

    /// Applies an entry to a site's copy of the state.
    pub fn apply_to(&self, state: &mut Registry, at: usize) {
        if let Some((_, command)) = self.entries.get(at) {
            sin::apply(state, Token(at as u64 + 1), command, self.sin);
        }
    }
}
