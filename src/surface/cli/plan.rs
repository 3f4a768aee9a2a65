//! `plan`: what a command would do, with what it would meet now. Nothing is changed.

use std::time::Duration;

use clap::Subcommand;
use dc_core::act::Finding;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, SiteId};
use dc_core::plan::{PlannedStep, Stage};
use dc_core::view::PlanView;
use dc_wire::pb;
use serde_json::json;

use super::fails::bad_name;
use super::out::{Out, clean, envelope, span};
use super::reach::{Home, Reach};
use super::table;

/// Every plane's preflight at both sites has its own deadline below this.
const PLAN_LIMIT: Duration = Duration::from_mins(1);

/// Of `plan`.
#[derive(Debug, Subcommand)]
pub(crate) enum Plan {
    /// Plans a move and runs every check at both sites
    Switchover {
        /// Group to move
        group: String,
        /// Site that shall hold it
        #[arg(long, value_name = "SITE")]
        to: String,
    },
}

impl Plan {
    /// Ends with 5 when a finding forbids the move.
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let Self::Switchover { group, to } = self;
        let group = GroupName::new(&group).map_err(|e| bad_name(&e))?;
        let to = SiteId::new(&to).map_err(|e| bad_name(&e))?;
        let home = reach.meet().await?;
        let plan = fetch(reach, &home, &group, &to).await?;
        if out.human() {
            screen(&plan, out);
        } else {
            let mut body = json!(plan);
            body["blocked"] = json!(blocked(&plan));
            out.json(&envelope(body));
        }
        Ok(if blocked(&plan) { Exit::Refused } else { Exit::Done })
    }
}

/// Asks for a plan.
pub(crate) async fn fetch(
    reach: &Reach,
    home: &Home,
    group: &GroupName,
    to: &SiteId,
) -> Result<PlanView, Fail> {
    home.quorum()?;
    let asked = pb::PlanRequest { group: group.to_string(), to: to.to_string() };
    reach.call(home, "plan", PLAN_LIMIT, async |mut client| client.plan(asked.clone()).await).await
}

/// Whether a finding forbids the move.
pub(crate) fn blocked(plan: &PlanView) -> bool {
    plan.findings.iter().any(|f| f.blocking)
}

fn screen(view: &PlanView, out: &Out) {
    let plan = &view.plan;
    let short = view.hash.get(..16).unwrap_or(&view.hash);
    let title =
        format!("Plan {} (hash {short}...)  {}  {} -> {}", view.id, plan.group, plan.source, plan.target);
    out.print(&format!("{}    NOTHING HAS BEEN CHANGED\n", out.bold(&title)));
    let mut rows = vec![table::row(&["#", "STAGE", "STEP", "WHERE", "EXPECT", "AT MOST", "UNDO"])];
    let mut crossing = None;
    let (mut stage, opened) = (None, plan.steps.iter().find(|s| s.act.word() == "opened").map(|s| s.id));
    for (place, step) in plan.steps.iter().enumerate() {
        if step.stage >= Stage::Takeover && crossing.is_none() {
            crossing = Some(rows.len());
        }
        let word = if stage == Some(step.stage) { "" } else { step.stage.word() };
        stage = Some(step.stage);
        let expected = view.expected_ms.get(place).copied().flatten();
        rows.push(step_row(step, word, expected, opened));
    }
    for (place, line) in table::lines("  ", &rows).iter().enumerate() {
        if crossing == Some(place) {
            out.print("  ---------------------- point of no return ----------------------");
        }
        out.print(line);
    }
    out.print("");
    findings(view, out);
    let outage = match view.outage_ms {
        Some(ms) => format!("{}, as learned from earlier runs", span(ms)),
        None => "not known before a first run".into(),
    };
    out.print(&format!("  Expected write outage  {outage}"));
    out.print("  Data loss              none: a step that fails before the takeover is rolled back");
    let next = if blocked(view) {
        format!("mend what is blocked, then: dc-switch plan switchover {} --to {}", plan.group, plan.target)
    } else {
        format!("dc-switch switchover {} --to {} --plan {}", plan.group, plan.target, view.id)
    };
    out.print(&format!("\nNext: {next}"));
}

fn step_row(step: &PlannedStep, stage: &str, expected: Option<u64>, opened: Option<u32>) -> Vec<String> {
    let undo = match step.stage {
        _ if step.undo => "undone",
        stage if stage < Stage::Takeover => "-",
        _ if opened.is_some_and(|opened| step.id < opened) => "run return",
        _ => "switch back",
    };
    vec![
        step.id.to_string(),
        stage.to_owned(),
        step.act.to_string(),
        step.site.as_ref().map_or("quorum", SiteId::as_str).to_owned(),
        expected.map_or_else(|| "?".to_owned(), span),
        span(step.deadline_ms),
        undo.to_owned(),
    ]
}

fn findings(view: &PlanView, out: &Out) {
    let blocking = view.findings.iter().filter(|f| f.blocking).count();
    let summary = format!("{blocking} blocking, {} others", view.findings.len() - blocking);
    let summary =
        if blocking == 0 { out.green(&format!("+ {summary}")) } else { out.red(&format!("x {summary}")) };
    out.print(&format!("  Findings               {summary}"));
    for finding in &view.findings {
        out.print(&format!("    {}", finding_line(out, finding)));
    }
}

/// A finding on one line, as in `x blocks  DC-0207  kafka at fra: ...`.
pub(crate) fn finding_line(out: &Out, finding: &Finding) -> String {
    let word = if finding.blocking { out.red("x blocks") } else { out.yellow("! notice") };
    let plane = finding.plane.map_or("site", dc_core::ids::PlaneKind::word);
    format!("{word}  {}  {plane} at {}: {}", clean(&finding.code), finding.site, clean(&finding.text))
}
