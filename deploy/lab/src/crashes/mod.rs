//! Crashes on real parts: one world, moved back and forth, in which a process dies in every stage of a move.
//!
//! An agent is killed as the run enters a stage, by event and not by time, and started again, soon or only when the
//! run needs it; a part of a plane is killed likewise. Whatever dies, the run must end as its takeover allows, with the
//! exit code of that end, and the oracle must find nothing lost, nothing twice and nothing at two sites. A kill that
//! missed its stage proves nothing and is made again. The rounds follow from a seed, which is printed first.

pub mod bench;
mod dies;
pub mod follow;
mod law;
mod plan;
mod rounds;

use std::collections::BTreeMap;

use anyhow::Result;

use crate::oracle::Verdict;
use crate::prereq;
use crate::run::{self, Order};
use crate::world::{ROME, World};
use bench::{Bench, Row};
use dies::Part;
use plan::Round;

/// What to play.
#[derive(Debug, Clone)]
pub struct Game {
    /// Name, planes, delay, and whether to leave it running.
    pub order: Order,
    /// What the rounds follow from.
    pub seed: u64,
    /// How many agents are killed; nine hold every stage once and every victim three times.
    pub rounds: usize,
    /// Only rounds whose name contains this.
    pub only: String,
}

/// One thing that is broken.
#[derive(Debug)]
enum Break {
    Agent(Round),
    Part(Part),
    Abort,
    Return,
}

impl Break {
    fn name(&self) -> String {
        match self {
            Break::Agent(round) => round.to_string(),
            Break::Part(part) => part.to_string(),
            Break::Abort => "fence/abort".to_owned(),
            Break::Return => "takeover/return".to_owned(),
        }
    }
}

/// Plays the rounds in a world of its own, prints the table and the verdict, and ends everything.
///
/// Errors: the world cannot be built or taken down. What goes wrong in a round is in the table.
pub async fn play(game: &Game) -> Result<Verdict> {
    prereq::check(&game.order.name, false)?;
    println!("seed {}", game.seed);
    run::inside(&game.order, |verdict| *verdict == Verdict::Pass, async |world| drive(world, game).await)
        .await
}

async fn drive(world: &World, game: &Game) -> Result<Verdict> {
    let under = run::begin(world, &game.order, &mut BTreeMap::new()).await?;
    let mut bench = Bench::new(&under.load.shared, ROME);
    let mut rows = Vec::new();
    for breaks in chosen(game) {
        let mut row = Row { name: breaks.name(), ..Row::default() };
        let done = match &breaks {
            Break::Agent(round) => rounds::crash(&mut bench, round, &mut row).await,
            Break::Part(part) => dies::dies(&mut bench, *part, &mut row).await,
            Break::Abort => rounds::abort(&mut bench, &mut row).await,
            Break::Return => rounds::turn(&mut bench, &mut row).await,
        };
        let stuck = done.is_err();
        if let Err(e) = done {
            row.wrong.push(format!("{e:#}"));
        }
        eprintln!("  {:>2} {}", rows.len() + 1, line(&row));
        rows.push(row);
        if stuck {
            break; // what the next round would meet is for a human to see
        }
    }
    under.load.stop().await;
    Ok(tell(game, &rows))
}

/// The rounds of the seed, then what an operator or a part may do.
fn chosen(game: &Game) -> Vec<Break> {
    // whoever asks for a whole grid, or for a round by its name, gets the rare ones too
    let rare = game.rounds >= 27 || !game.only.is_empty();
    let played = |part: &Part| game.order.planes.contains(&part.plane) && (rare || part.usual);
    let mut all: Vec<Break> = plan::rounds(game.seed, game.rounds).into_iter().map(Break::Agent).collect();
    all.extend(dies::ALL.into_iter().filter(played).map(Break::Part));
    all.extend([Break::Abort, Break::Return]);
    all.retain(|b| b.name().contains(&game.only));
    all
}

fn line(row: &Row) -> String {
    let met = if row.met.is_empty() { "-".to_owned() } else { row.met.join(" ") };
    let mut said: Vec<String> = row.wrong.iter().map(|w| format!("WRONG {w}")).collect();
    said.extend(row.notes.iter().map(|n| n.chars().take(160).collect()));
    let said = if said.is_empty() { "-".to_owned() } else { said.join("; ") };
    format!("{:<26} {:<14} {:<24} {:>6.1}  {met}  | {said}", row.name, row.victim, row.outcome, row.seconds)
}

fn tell(game: &Game, rows: &[Row]) -> Verdict {
    println!("\n   {:<26} {:<14} {:<24} {:>6}  met  | findings", "round", "victim", "outcome", "s");
    for (k, row) in rows.iter().enumerate() {
        println!("{:>2} {}", k + 1, line(row));
    }
    let wrong = rows.iter().filter(|r| !r.wrong.is_empty()).count();
    let whole = rows.len() == chosen(game).len();
    let verdict = if wrong == 0 && whole { Verdict::Pass } else { Verdict::Fail };
    let part = if game.only.is_empty() { "" } else { " (partial: not all rounds)" };
    println!(
        "verdict: {}{part}: {} of {} rounds went wrong, seed {}",
        verdict.name(),
        wrong,
        rows.len(),
        game.seed
    );
    verdict
}

/// A seed that nobody chose.
pub fn any_seed() -> u64 {
    crate::history::wall_ns() / 1_000_000 % 100_000
}
