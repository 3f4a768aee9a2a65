//! `status`: everything at a glance, and the one sensible next command.

use clap::Args;
use dc_core::act::Finding;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, SiteId};
use dc_core::observe::Role;
use dc_core::position::{Lag, LagUnit};
use dc_core::view::{GroupView, PlaneView, SiteView, StatusView};
use serde_json::json;

use super::fails::bad_name;
use super::local;
use super::out::{Out, bytes, clean, count, envelope, span};
use super::reach::{Home, Reach};
use super::table;

/// A reading is taken every second and passed on every second; three rounds of both
/// without a new one make it no longer known.
const STALE_MS: u64 = 6_000;

/// Of `status`.
#[derive(Debug, Default, Args)]
pub(crate) struct Status {
    /// Only this group
    group: Option<String>,
}

impl Status {
    /// Ends with 10 when something works worse than it should, or is not known.
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let only = self.group.as_deref().map(GroupName::new).transpose().map_err(|e| bad_name(&e))?;
        let mut home = reach.meet().await?;
        if let Some(only) = only {
            let known: Vec<_> = home.view.groups.iter().map(|g| g.name.to_string()).collect();
            home.view.groups.retain(|g| g.name == only);
            if home.view.groups.is_empty() {
                return Err(super::switchover::unknown_group(&only, &known));
            }
        }
        let notes = notes(&home.view);
        if out.human() {
            screen(reach, &home, &notes, out);
        } else {
            let mut body = json!(home.view);
            body["local_view"] = json!(home.local());
            body["notes"] = json!(notes);
            out.json(&envelope(body));
        }
        Ok(if notes.is_empty() { Exit::Done } else { Exit::Findings })
    }
}

fn screen(reach: &Reach, home: &Home, notes: &[String], out: &Out) {
    let view = &home.view;
    let environment = out.bold(&clean(&reach.environment));
    out.print(&format!("{environment}    asked: {}    {}", home.site, local::moment(view.wall)));
    if home.local() {
        out.print(&out.red("LOCAL VIEW - NO QUORUM: what follows is only what this one agent knows"));
    }
    out.print("");
    sites(view, out);
    for group in &view.groups {
        out.print("");
        group_screen(view, group, out);
    }
    if !notes.is_empty() {
        out.print("");
    }
    for note in notes {
        out.print(&out.yellow(&format!("! {}", clean(note))));
    }
    out.print(&format!("\nNext: {}", next(view)));
}

fn sites(view: &StatusView, out: &Out) {
    let quorum = &view.quorum;
    let leader = quorum.leader.as_ref().map_or("not known", SiteId::as_str);
    let answering =
        if quorum.answering { out.green("+ quorum answers") } else { out.red("x no quorum answers") };
    out.print(&format!("  {answering}, {} voters, leader {leader}, term {}", quorum.voters, quorum.term));
    let mut rows = vec![table::row(&["SITE", "KIND", "AGENT", "LEASE", "VERSION"])];
    for site in &view.sites {
        let version = site.version.as_deref().map_or_else(|| "?".to_owned(), clean);
        let kind = if site.witness { "witness" } else { "data" };
        rows.push(vec![
            site.site.to_string(),
            kind.into(),
            agent(view, site, out),
            lease(view, site),
            version,
        ]);
    }
    out.table("  ", &rows);
}

fn agent(view: &StatusView, site: &SiteView, out: &Out) -> String {
    match site.heard_ms {
        _ if site.site == view.asked => out.green("+ answers"),
        Some(ms) if ms <= STALE_MS => out.green(&format!("+ heard {} ago", span(ms))),
        Some(ms) => out.yellow(&format!("? silent for {}", span(ms))),
        None => out.yellow("? never heard"),
    }
}

fn lease(view: &StatusView, site: &SiteView) -> String {
    match site.lease_ms {
        Some(ms) => format!("{} left", span(ms)),
        None if site.site == view.asked => "none".into(),
        None => "-".into(),
    }
}

fn group_screen(view: &StatusView, group: &GroupView, out: &Out) {
    let opened = if group.opened { "" } else { ", NOT OPENED YET" };
    let release = group.release.as_ref().map(|r| format!("    DAGs {}", r.version())).unwrap_or_default();
    let title = format!("{}  ACTIVE at {}, epoch {}{opened}{release}", group.name, group.holder, group.epoch);
    out.print(&out.bold(&title));
    let mut rows = vec![table::row(&["PLANE", "SITE", "STATE", "LAG", "RPO", "READ", "SEEN"])];
    let mut last = None;
    for plane in &group.planes {
        let name = if last == Some(plane.plane) { String::new() } else { plane.plane.to_string() };
        last = Some(plane.plane);
        rows.push(plane_row(name, group, plane, out));
    }
    out.table("  ", &rows);
    for finding in group.planes.iter().filter_map(|p| p.facts.as_ref()).flat_map(|f| &f.findings) {
        out.print(&format!("  {}", super::plan::finding_line(out, finding)));
    }
    if let Some(run) = &group.run {
        let ago = view.sites.iter().find(|s| s.site == group.holder).and_then(|s| s.heard_ms);
        let told = ago.filter(|ms| *ms > STALE_MS).map(|_| ", holder silent").unwrap_or_default();
        out.print(&format!("  run {run} is open{told}: dc-switch run attach {run}"));
    }
}

/// Whether a reading still says how things are.
fn fresh(plane: &PlaneView) -> bool {
    plane.facts.is_some() && plane.age_ms.is_some_and(|ms| ms <= STALE_MS)
}

fn plane_row(name: String, group: &GroupView, plane: &PlaneView, out: &Out) -> Vec<String> {
    let read = plane.age_ms.map_or_else(|| "never".to_owned(), |ms| format!("{} ago", span(ms)));
    let Some(facts) = plane.facts.as_ref().filter(|_| fresh(plane)) else {
        let unknown = out.yellow("? not known");
        return vec![name, plane.site.to_string(), unknown, "?".into(), "?".into(), read, String::new()];
    };
    let lag = facts.lag.as_ref();
    let behind = follows(group, plane) || lag.is_some();
    let amount = lag.map_or_else(|| if behind { "?" } else { "-" }.to_owned(), amount);
    let rpo = match lag.map(rpo_ms) {
        Some(Some(ms)) => span(ms),
        None if !behind => "-".into(),
        _ => "?".into(),
    };
    vec![
        name,
        plane.site.to_string(),
        state(group, plane, facts.role, out),
        amount,
        rpo,
        read,
        clean(&facts.summary),
    ]
}

/// How old the oldest thing is that would be lost; nothing is lost where nothing lags.
fn rpo_ms(lag: &Lag) -> Option<u64> {
    lag.age_ms.or((lag.amount == 0).then_some(0))
}

fn amount(lag: &Lag) -> String {
    match lag.unit {
        LagUnit::Bytes => bytes(lag.amount),
        unit => format!("{} {}", count(lag.amount), unit.word()),
    }
}

fn follows(group: &GroupView, plane: &PlaneView) -> bool {
    plane.site != group.holder
}

/// A plane is well when it is what its site is to the group; while a run moves it, it may be anything.
fn state(group: &GroupView, plane: &PlaneView, role: Option<Role>, out: &Out) -> String {
    let (word, good) = match role {
        Some(Role::Writable) => ("writable", !follows(group, plane)),
        Some(Role::Following) => ("following", follows(group, plane)),
        Some(Role::Closed) => ("closed", false),
        Some(Role::Down) => ("down", false),
        None => return out.yellow("? not seen"),
    };
    match (good, &group.run) {
        (true, _) => out.green(&format!("+ {word}")),
        (false, Some(_)) => out.yellow(&format!("~ {word}")),
        (false, None) => out.red(&format!("x {word}")),
    }
}

/// What is worse than it should be, in words; empty when all is well and known.
fn notes(view: &StatusView) -> Vec<String> {
    let mut notes = Vec::new();
    if !view.quorum.answering {
        notes.push("no majority answers: nothing can be changed".into());
    }
    for site in &view.sites {
        if site.site != view.asked && site.heard_ms.is_none_or(|ms| ms > STALE_MS) {
            notes.push(format!("the agent of {} is not heard of by {}", site.site, view.asked));
        }
    }
    let mut versions: Vec<_> = view.sites.iter().filter_map(|s| s.version.as_deref()).collect();
    versions.sort_unstable();
    versions.dedup();
    if versions.len() > 1 {
        notes.push(format!("agents are of different versions: {}", versions.join(", ")));
    }
    for group in &view.groups {
        notes.extend(group.attention.iter().map(|text| format!("{}: {text}", group.name)));
        if group.run.is_none() {
            notes.extend(group.planes.iter().filter_map(|plane| ill(group, plane)));
        }
    }
    notes
}

fn ill(group: &GroupView, plane: &PlaneView) -> Option<String> {
    let whose = format!("{}: {} at {}", group.name, plane.plane, plane.site);
    let Some(facts) = plane.facts.as_ref().filter(|_| fresh(plane)) else {
        return Some(format!("{whose} was not read lately"));
    };
    let good = if follows(group, plane) { Role::Following } else { Role::Writable };
    if facts.role != Some(good) {
        return Some(format!("{whose} is not what it should be: {}", facts.summary));
    }
    let blocking: Vec<&Finding> = facts.findings.iter().filter(|f| f.blocking).collect();
    let codes: Vec<_> = blocking.iter().map(|f| f.code.as_str()).collect();
    (!codes.is_empty()).then(|| format!("{whose}: a switchover would be refused ({})", codes.join(", ")))
}

fn next(view: &StatusView) -> String {
    if let Some(run) = view.groups.iter().find_map(|g| g.run.as_ref()) {
        return format!("dc-switch run attach {run}");
    }
    match view.groups.first() {
        None => "dc-switch group apply FILE --dry-run".into(),
        Some(group) => match group.sites.iter().find(|site| **site != group.holder) {
            Some(other) => format!("dc-switch plan switchover {} --to {other}", group.name),
            None => format!("dc-switch group show {}", group.name),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_lag_means_nothing_to_lose_and_an_unknown_age_is_not_zero() {
        let lag = |amount, age_ms| Lag { amount, unit: LagUnit::Records, age_ms };
        assert_eq!(rpo_ms(&lag(0, None)), Some(0));
        assert_eq!(rpo_ms(&lag(7, None)), None);
        assert_eq!(rpo_ms(&lag(7, Some(400))), Some(400));
    }
}
