//! The report: what happened, as a file for scripts and a table for people. The names are read by scripts: kept.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;

use crate::oracle::{Reason, Verdict};
use crate::world::Plane;

/// Per plane.
pub type By<T> = BTreeMap<&'static str, T>;

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Format of this file.
    pub schema: &'static str,
    /// The worst of all reasons.
    pub verdict: Verdict,
    /// What was found; empty for `pass`.
    pub reasons: Vec<Reason>,
    /// Not all planes took part: never enough to accept a change.
    pub partial: bool,
    /// How the lab was run.
    pub settings: Settings,
    /// Versions of all parts.
    pub parts: BTreeMap<String, String>,
    /// One per move.
    pub moves: Vec<Move>,
    /// Peak resident memory of our own processes, in MiB: by program, then by site.
    pub rss_mib: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    /// Where the time went, in seconds.
    pub wall_s: BTreeMap<&'static str, f64>,
}

/// How the lab was run.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    /// Lease timing of the agents.
    pub profile: &'static str,
    /// What the agents were told to do wrong.
    pub sabotage: Option<String>,
    /// Delay of replication each way.
    pub delay_ms: u64,
    /// A timing run does not ask for a backlog at the fence.
    pub timing: bool,
    /// Writers and rates per plane.
    pub load: By<&'static str>,
}

/// One move.
#[derive(Debug, Default, Serialize)]
pub struct Move {
    /// Site that was left.
    pub from: String,
    /// Site that was asked for.
    pub to: String,
    /// Name of the run.
    pub run: String,
    /// `done`, `rolled_back`, `returned` or `needs_human`.
    pub result: String,
    /// Last acknowledged write at the old site to the first at the new one.
    pub outage_ms: By<f64>,
    /// The same for the writers that keep their clients, where it differs.
    pub outage_fixed_ms: By<f64>,
    /// How long planes without an outage of writes took to drain.
    pub drain_ms: By<f64>,
    /// Takeover to the new site's own scheduler row.
    pub scheduler_live_ms: Option<f64>,
    /// Steps of the run as the product tells them.
    pub steps: Vec<Value>,
    /// Acknowledged writes.
    pub acked: By<usize>,
    /// Refused writes.
    pub refused: By<usize>,
    /// Writes without an answer.
    pub unknown: By<usize>,
    /// Acknowledged and not yet readable at the target when the fence came.
    pub backlog_at_fence: By<usize>,
    /// Acknowledged and missing.
    pub lost: By<usize>,
    /// Copies beyond the first.
    pub duplicated: By<usize>,
    /// How long both sites acknowledged.
    pub overlap_ms: By<f64>,
    /// Consumer groups: positions compared, records read again, records skipped.
    pub groups: BTreeMap<&'static str, usize>,
}

/// Numbers to reach, in milliseconds: outage of the slowest plane (median of a timing run), scheduler after takeover.
const OUTAGE_MS: f64 = 1_500.0;
const SCHEDULER_MS: f64 = 5_000.0;
/// Peak memory of an agent, in MiB.
const AGENT_MIB: u64 = 60;

impl Report {
    /// Of a lab in which nothing happened.
    pub fn empty() -> Report {
        Report {
            schema: "dc-lab/report/v1",
            verdict: Verdict::Pass,
            reasons: Vec::new(),
            partial: true,
            settings: Settings {
                profile: "none",
                sabotage: None,
                delay_ms: 0,
                timing: true,
                load: BTreeMap::new(),
            },
            parts: BTreeMap::new(),
            moves: Vec::new(),
            rss_mib: BTreeMap::new(),
            wall_s: BTreeMap::new(),
        }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let mut t = String::from("\n");
        for m in &self.moves {
            m.write(&mut t);
        }
        let mut slowest: Vec<f64> = self.moves.iter().filter_map(Move::slowest_ms).collect();
        slowest.sort_by(f64::total_cmp);
        if let Some(median) = slowest.get(slowest.len() / 2) {
            let _ = writeln!(
                t,
                "outage of the slowest plane, median of {} moves: {}",
                slowest.len(),
                against(*median, OUTAGE_MS, "ms")
            );
        }
        for (program, of) in &self.rss_mib {
            let missed = |mib: u64| *program == "dc-agent" && mib > AGENT_MIB;
            let shown = |(site, mib): (&&str, &u64)| {
                format!(
                    "{site} {mib} MiB{}",
                    if missed(*mib) { format!(" MISSED ({AGENT_MIB})") } else { String::new() }
                )
            };
            let shown: Vec<String> = of.iter().map(shown).collect();
            let _ = writeln!(t, "memory of {program}: {}", shown.join(", "));
        }
        let parts: Vec<String> = self.parts.iter().map(|(k, v)| format!("{k} {v}")).collect();
        let _ = writeln!(t, "parts: {}", parts.join(", "));
        let wall: Vec<String> = self.wall_s.iter().map(|(k, v)| format!("{k} {v:.1} s")).collect();
        let _ = writeln!(t, "time: {}", wall.join(", "));
        for reason in &self.reasons {
            let _ = writeln!(t, "{reason}");
        }
        let note = match (self.partial, self.settings.timing) {
            (true, true) => " (partial: not all planes; timing run)",
            (true, false) => " (partial: not all planes)",
            (false, true) => " (timing run: no backlog asked for)",
            (false, false) => "",
        };
        let _ = writeln!(t, "verdict: {}{note}", self.verdict.name());
        t
    }
}

fn against(value: f64, limit: f64, unit: &str) -> String {
    if value > limit {
        format!("{value:.0} {unit} MISSED ({limit:.0})")
    } else {
        format!("{value:.0} {unit}")
    }
}

impl Move {
    /// Outage of the plane that was away longest.
    fn slowest_ms(&self) -> Option<f64> {
        self.outage_ms.values().copied().max_by(f64::total_cmp)
    }

    fn write(&self, t: &mut String) {
        let _ = writeln!(t, "{} -> {}  run {}  {}", self.from, self.to, self.run, self.result);
        let _ = writeln!(
            t,
            "  {:<10}{:>10}{:>9}{:>9}{:>9}{:>9}{:>6}{:>6}{:>9}",
            "plane", "outage ms", "acked", "refused", "unknown", "backlog", "lost", "dup", "overlap"
        );
        for plane in Plane::ALL.map(Plane::name) {
            let Some(acked) = self.acked.get(plane) else { continue };
            let number = |of: &By<usize>| of.get(plane).map_or("-".into(), ToString::to_string);
            let outage = self
                .outage_ms
                .get(plane)
                .or(self.drain_ms.get(plane))
                .map_or("-".into(), |ms| format!("{ms:.0}"));
            let overlap = self.overlap_ms.get(plane).map_or("-".into(), |ms| format!("{ms:.1}"));
            let _ = writeln!(
                t,
                "  {plane:<10}{outage:>10}{acked:>9}{:>9}{:>9}{:>9}{:>6}{:>6}{overlap:>9}",
                number(&self.refused),
                number(&self.unknown),
                number(&self.backlog_at_fence),
                number(&self.lost),
                number(&self.duplicated),
            );
        }
        if let Some(positions) = self.groups.get("positions") {
            let _ = writeln!(
                t,
                "  groups: {positions} positions, {} read again, {} skipped",
                self.groups.get("reread").unwrap_or(&0),
                self.groups.get("skipped").unwrap_or(&0)
            );
        }
        if let Some(ms) = self.scheduler_live_ms {
            let _ = writeln!(t, "  scheduler live after takeover: {}", against(ms, SCHEDULER_MS, "ms"));
        }
        self.write_stages(t);
    }

    /// Steps summed by stage, the slowest step of each named.
    fn write_stages(&self, t: &mut String) {
        let mut stages: Vec<(String, f64, String)> = Vec::new();
        for step in &self.steps {
            let stage = step["stage"].as_str().unwrap_or("?").to_string();
            let ms = step["ms"].as_f64().unwrap_or(0.0);
            let name = format!(
                "{}.{}",
                step["plane"].as_str().unwrap_or("quorum"),
                step["act"].as_str().unwrap_or("?")
            );
            match stages.iter_mut().find(|(s, _, _)| *s == stage) {
                Some((_, longest, _)) if *longest >= ms => {}
                Some(entry) => *entry = (stage, ms, name),
                None => stages.push((stage, ms, name)),
            }
        }
        let shown: Vec<String> =
            stages.iter().map(|(stage, ms, name)| format!("{stage} {ms:.0} ms ({name})")).collect();
        if !shown.is_empty() {
            let _ = writeln!(t, "  slowest step of each stage: {}", shown.join(", "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn keys(of: &Value) -> Vec<&str> {
        of.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default()
    }

    /// Names that scripts read, as they were agreed on.
    const WHOLE: [&str; 8] =
        ["schema", "verdict", "reasons", "settings", "parts", "moves", "rss_mib", "wall_s"];
    const SETTINGS: [&str; 4] = ["profile", "sabotage", "delay_ms", "load"];
    const MOVE: [&str; 15] = [
        "from",
        "to",
        "run",
        "result",
        "outage_ms",
        "drain_ms",
        "scheduler_live_ms",
        "steps",
        "acked",
        "refused",
        "unknown",
        "backlog_at_fence",
        "lost",
        "duplicated",
        "overlap_ms",
    ];
    /// Names that came later.
    const MORE: [&str; 4] = ["partial", "timing", "outage_fixed_ms", "groups"];

    #[test]
    fn keeps_every_name_that_scripts_read() -> Result<(), serde_json::Error> {
        let rss_mib = BTreeMap::from([
            ("dc-agent", BTreeMap::from([("rome", 41), ("fra", 40), ("oslo", 30)])),
            ("dc-guardian", BTreeMap::from([("rome", 3)])),
        ]);
        let wall_s = BTreeMap::from([("install", 1.0), ("build", 2.0), ("start", 3.0), ("moves", 4.0)]);
        let report = Report { moves: vec![Move::default()], rss_mib, wall_s, ..Report::empty() };
        let told = serde_json::to_value(&report)?;
        for (of, names) in
            [(&told, &WHOLE[..]), (&told["settings"], &SETTINGS[..]), (&told["moves"][0], &MOVE[..])]
        {
            let found = keys(of);
            assert!(names.iter().all(|n| found.contains(n)), "{names:?} in {found:?}");
            assert!(
                found.iter().all(|k| names.contains(k) || MORE.contains(k)),
                "{found:?} beside {names:?}"
            );
        }
        assert_eq!(told["schema"], "dc-lab/report/v1");
        assert_eq!(told["verdict"], "pass");
        assert_eq!(told["rss_mib"]["dc-agent"], json!({"rome": 41, "fra": 40, "oslo": 30}));
        assert_eq!(keys(&told["wall_s"]), ["build", "install", "moves", "start"]);
        Ok(())
    }

    #[test]
    fn marks_an_agent_that_is_larger_than_it_may_be() {
        let rss_mib = BTreeMap::from([("dc-agent", BTreeMap::from([("rome", 61), ("fra", 60)]))]);
        let text = Report { rss_mib, ..Report::empty() }.text();
        assert!(text.contains("memory of dc-agent: fra 60 MiB, rome 61 MiB MISSED (60)"), "{text}");
    }
}
