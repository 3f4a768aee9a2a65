//! One pass over the logs: both listings compared key by key, what is missing or different brought here.
//!
//! A pass never deletes, and what it does not know at this site it keeps beside before it replaces it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dc_core::ids::Epoch;
use dc_plane::PlaneError;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::Instant;

use crate::copy::{Conditions, Copied, Copier};
use crate::join::{Below, Join, Lister, Pair};
use crate::memory::{Memory, Row};
use crate::store::Listed;

/// Copies in flight. A higher number pays on a WAN only.
const IN_FLIGHT: usize = 32;
/// Rows remembered by one commit.
const ROWS: usize = 1_000;

/// What a pass found and did.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// When its listings began: everything older is accounted for.
    pub(crate) began: Instant,
    /// How long it took.
    pub(crate) took: Duration,
    /// Objects that the other site shows.
    pub(crate) compared: u64,
    /// Of these, found missing or different here.
    pub(crate) pending: u64,
    /// Bytes of these.
    pub(crate) pending_bytes: u64,
    /// Server's time of the oldest of these, wall-clock milliseconds.
    pub(crate) oldest: Option<i64>,
    /// Brought and verified.
    pub(crate) brought: u64,
    /// Bytes of these.
    pub(crate) brought_bytes: u64,
    /// Names under which diverged objects of this site were kept.
    pub(crate) kept: Vec<String>,
    /// Still missing or different when the pass ended, with the first reason.
    pub(crate) left: u64,
    /// The first reason why something is left.
    pub(crate) why_left: Option<PlaneError>,
}

impl Report {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            took: Duration::ZERO,
            compared: 0,
            pending: 0,
            pending_bytes: 0,
            oldest: None,
            brought: 0,
            brought_bytes: 0,
            kept: Vec::new(),
            left: 0,
            why_left: None,
        }
    }
}

/// What a pass brings of what it finds missing or different.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Take {
    /// Everything.
    All,
    /// Nothing: it only counts.
    Nothing,
    /// Only what is not here and was never remembered; nothing else is counted.
    Unknown,
    /// That, and what is here as it was remembered and has another state there; nothing else is counted.
    Late,
}

/// What a pass is told.
pub(crate) struct Order {
    /// Where from and to.
    pub(crate) copier: Arc<Copier>,
    /// Prefix of the logs, with its slash.
    pub(crate) prefix: String,
    /// Keys below this are not part of the logs: our own probes.
    pub(crate) except: String,
    /// What to bring of what is found.
    pub(crate) take: Take,
    /// Conditions that this site's store was seen to honour.
    pub(crate) proved: Conditions,
    /// Of the site that is followed; part of the names of kept objects.
    pub(crate) epoch: Epoch,
    /// Set to end the pass after what is in flight.
    pub(crate) stop: Arc<AtomicBool>,
}

/// What is to be done about one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Both sides are the same, and remembered so.
    Same,
    /// Both sides are the same; remember it.
    Learn,
    /// It is not here.
    Missing,
    /// Ours is an earlier state of theirs.
    Older,
    /// Ours is something that this site does not know.
    Diverged,
}

fn decide(theirs: &Listed, ours: Option<&Listed>, row: Option<&Row>) -> Verdict {
    let Some(ours) = ours else { return Verdict::Missing };
    let same_size = theirs.size == ours.size;
    let remembered = |row: &Row| row.theirs == theirs.etag && row.ours == ours.etag && row.size == ours.size;
    if same_size && row.is_some_and(remembered) {
        return Verdict::Same;
    }
    if same_size && theirs.etag == ours.etag && !ours.etag.is_empty() {
        return Verdict::Learn;
    }
    match row {
        Some(row) if row.ours == ours.etag && row.size == ours.size && !ours.etag.is_empty() => {
            Verdict::Older
        }
        _ => Verdict::Diverged,
    }
}

/// What became of one key.
struct Outcome {
    key: String,
    bytes: u64,
    row: Result<Option<Row>, PlaneError>,
    brought: bool,
    kept: Option<String>,
}

async fn work(order: Arc<Order>, verdict: Verdict, theirs: Listed, ours: Option<Listed>) -> Outcome {
    let mut kept = None;
    let mut brought = false;
    let row = async {
        let own = ours.as_ref();
        if let (Verdict::Diverged, Some(own)) = (verdict, own) {
            if own.size == theirs.size && order.copier.same_bytes(&theirs.key).await? {
                let row = Row { theirs: theirs.etag.clone(), ours: own.etag.clone(), size: own.size };
                return Ok(Some(row));
            }
            kept = Some(order.copier.keep_beside(own, order.epoch).await?);
        }
        let done = order.copier.bring(&theirs, own, order.proved).await?;
        brought = matches!(done, Copied::Here { .. });
        Ok(match done {
            Copied::Here { etag } => Some(Row { theirs: theirs.etag.clone(), ours: etag, size: theirs.size }),
            Copied::Moved => None,
        })
    }
    .await;
    Outcome { key: theirs.key, bytes: theirs.size, row, brought, kept }
}

/// One pass and what it has learned so far.
struct Pass {
    order: Arc<Order>,
    memory: Arc<Memory>,
    report: Report,
    rows: Vec<(String, Row)>,
    flying: FuturesUnordered<BoxFuture<'static, Outcome>>,
}

/// Compares both sides once, and brings what is missing or different if so ordered.
///
/// Repeat: safe. Errors: a listing that failed or is not to be trusted (nothing was changed by that), or the disk;
/// a single object that fails is counted in `left` and ends nothing.
pub(crate) async fn pass(order: Order, memory: Memory) -> Result<Report, PlaneError> {
    let below = |store| Lister::new(Below { store, prefix: order.prefix.clone() });
    let mut join = Join::new(below(order.copier.theirs.clone()), below(order.copier.ours.clone()));
    let mut pass = Pass {
        order: Arc::new(order),
        memory: Arc::new(memory),
        report: Report::new(),
        rows: Vec::new(),
        flying: FuturesUnordered::new(),
    };
    let walked = pass.walk(&mut join).await;
    // what is in flight ends before the pass does, whatever the listing said
    while let Some(outcome) = pass.flying.next().await {
        pass.settle(outcome);
    }
    pass.remember().await?;
    walked?;
    pass.report.took = pass.report.began.elapsed();
    Ok(pass.report)
}

impl Pass {
    async fn walk(&mut self, join: &mut Join) -> Result<(), PlaneError> {
        while let Some(pair) = join.next().await? {
            if self.order.stop.load(Ordering::SeqCst) {
                return Err(PlaneError::refused("DC-0513", "the pass was told to end"));
            }
            let Pair { theirs: Some(theirs), ours } = pair else { continue };
            if theirs.key.starts_with(&self.order.except) {
                continue;
            }
            self.meet(theirs, ours)?;
            while self.flying.len() >= IN_FLIGHT {
                match self.flying.next().await {
                    Some(outcome) => self.settle(outcome),
                    None => break,
                }
            }
            if self.rows.len() >= ROWS {
                self.remember().await?;
            }
        }
        Ok(())
    }

    fn meet(&mut self, theirs: Listed, ours: Option<Listed>) -> Result<(), PlaneError> {
        self.report.compared += 1;
        let row = self.memory.get(&theirs.key)?;
        let verdict = decide(&theirs, ours.as_ref(), row.as_ref());
        let unknown = verdict == Verdict::Missing && row.is_none();
        let skipped = match self.order.take {
            Take::All | Take::Nothing => false,
            Take::Unknown => !unknown,
            // replaced only where a write that comes here meanwhile is seen
            Take::Late => !(unknown || verdict == Verdict::Older && self.order.proved.is),
        };
        if skipped {
            return Ok(());
        }
        match verdict {
            Verdict::Same => return Ok(()),
            Verdict::Learn => {
                let row = Row { theirs: theirs.etag.clone(), ours: theirs.etag, size: theirs.size };
                self.rows.push((theirs.key, row));
                return Ok(());
            }
            Verdict::Missing | Verdict::Older | Verdict::Diverged => {}
        }
        self.report.pending += 1;
        self.report.pending_bytes += theirs.size;
        self.report.oldest = match (self.report.oldest, theirs.modified) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if self.order.take == Take::Nothing {
            self.report.left += 1;
        } else {
            self.flying.push(Box::pin(work(Arc::clone(&self.order), verdict, theirs, ours)));
        }
        Ok(())
    }

    fn settle(&mut self, outcome: Outcome) {
        self.report.kept.extend(outcome.kept);
        if outcome.brought {
            self.report.brought += 1;
            self.report.brought_bytes += outcome.bytes;
        }
        match outcome.row {
            Ok(Some(row)) => self.rows.push((outcome.key, row)),
            Ok(None) => self.report.left += 1,
            Err(cause) => {
                self.report.left += 1;
                self.report.why_left.get_or_insert(cause);
            }
        }
    }

    async fn remember(&mut self) -> Result<(), PlaneError> {
        let rows = std::mem::take(&mut self.rows);
        if rows.is_empty() {
            return Ok(());
        }
        let memory = Arc::clone(&self.memory);
        tokio::task::spawn_blocking(move || memory.learn(&rows))
            .await
            .map_err(|e| PlaneError::failed("remember pairs", &e))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(etag: &str, size: u64) -> Listed {
        Listed { key: "k".into(), size, etag: etag.into(), modified: None }
    }
    fn row(theirs: &str, ours: &str, size: u64) -> Row {
        Row { theirs: theirs.into(), ours: ours.into(), size }
    }

    #[test]
    fn an_object_is_replaced_in_silence_only_when_it_is_known() {
        let (new, old) = (object("b", 9), object("a", 5));
        assert_eq!(decide(&new, None, None), Verdict::Missing);
        assert_eq!(decide(&new, Some(&old), Some(&row("x", "a", 5))), Verdict::Older);
        assert_eq!(decide(&new, Some(&old), Some(&row("", "a", 5))), Verdict::Older);
        assert_eq!(decide(&new, Some(&old), None), Verdict::Diverged);
        assert_eq!(decide(&new, Some(&old), Some(&row("x", "other", 5))), Verdict::Diverged);
    }

    #[test]
    fn each_side_is_compared_with_its_own_etag() {
        let (theirs, ours) = (object("p-2", 9), object("q-3", 9));
        assert_eq!(decide(&theirs, Some(&ours), Some(&row("p-2", "q-3", 9))), Verdict::Same);
        assert_eq!(decide(&theirs, Some(&object("q-4", 9)), Some(&row("p-2", "q-3", 9))), Verdict::Diverged);
        assert_eq!(decide(&theirs, Some(&object("p-2", 9)), None), Verdict::Learn);
    }

    #[test]
    fn an_empty_etag_never_makes_two_objects_the_same() {
        assert_eq!(decide(&object("", 9), Some(&object("", 9)), None), Verdict::Diverged);
    }
}
