//! `switchover`: shows the plan, lets it be confirmed by name, begins the run and follows it.

use std::time::Duration;

use clap::Args;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, RunId, SiteId};
use dc_core::view::{GroupView, RunView};
use dc_wire::pb;
use serde_json::json;

use super::ask::confirmed;
use super::fails::bad_name;
use super::follow::{Goal, follow};
use super::out::{Out, clean, envelope, span};
use super::plan::{blocked, fetch, finding_line};
use super::reach::{Home, Reach};

/// How long an order may take to be confirmed by the quorum.
pub(crate) const ORDER_LIMIT: Duration = Duration::from_secs(30);

/// Of `switchover`.
#[derive(Debug, Args)]
pub(crate) struct Switchover {
    /// Group to move
    group: String,
    /// Site that shall hold it
    #[arg(long, value_name = "SITE")]
    to: String,
    /// Run this plan and no other
    #[arg(long, value_name = "ID")]
    plan: Option<String>,
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Confirm without being asked: the name of the site to activate
    #[arg(long, value_name = "SITE")]
    confirm: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

/// How long to stay with a run.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Wait {
    /// Begin it and leave
    #[arg(long, conflicts_with = "timeout")]
    no_wait: bool,
    /// Leave it after this time, as in 5m; it goes on
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

impl Switchover {
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let group = GroupName::new(&self.group).map_err(|e| bad_name(&e))?;
        let to = SiteId::new(&self.to).map_err(|e| bad_name(&e))?;
        let home = reach.meet().await?;
        home.quorum()?;
        let known: Vec<_> = home.view.groups.iter().map(|g| g.name.to_string()).collect();
        let held =
            home.view.groups.iter().find(|g| g.name == group).ok_or_else(|| unknown_group(&group, &known))?;
        if let Some(run) = open_to(reach, &home, held, &to).await? {
            out.say(&format!("run {run} already goes there; following it"));
            return self.wait.follow(reach, &home, &run, out, (Goal::Moved, false)).await;
        }
        let plan = self.show(reach, &home, held, &to, out).await?;
        let command = format!("dc-switch switchover {group} --to {to} --confirm {to}");
        confirmed(out, to.as_str(), self.confirm.as_deref(), "Type the site to ACTIVATE: ", &command)?;
        let order = pb::SwitchoverRequest {
            group: group.to_string(),
            to: to.to_string(),
            plan: plan.unwrap_or_default(),
            reason: self.reason.clone(),
            confirm: to.to_string(),
        };
        let run: RunId = reach
            .call(&home, "run", ORDER_LIMIT, async |mut client| client.switchover(order.clone()).await)
            .await?;
        out.say(&format!("run {run} begins"));
        self.wait.follow(reach, &home, &run, out, (Goal::Moved, false)).await
    }

    /// Before a person is asked: what would happen. A script has seen it, or does not want to.
    async fn show(
        &self,
        reach: &Reach,
        home: &Home,
        held: &GroupView,
        to: &SiteId,
        out: &Out,
    ) -> Result<Option<String>, Fail> {
        if self.confirm.is_some() || !out.asks() {
            return Ok(self.plan.clone());
        }
        out.say("checking both sites ...");
        let plan = fetch(reach, home, &held.name, to).await?;
        let talk = out.for_talk();
        for finding in &plan.findings {
            out.say(&format!("  {}", finding_line(&talk, finding)));
        }
        if blocked(&plan) {
            let what = format!("switchover of {} to {to} refused", held.name);
            let blocking = plan.findings.iter().filter(|f| f.blocking).count();
            return Err(Fail::refused(Code::PREFLIGHT, what, format!("findings that block it: {blocking}"))
                .next(format!("dc-switch plan switchover {} --to {to}", held.name)));
        }
        let outage = match plan.outage_ms {
            Some(ms) => format!("for about {}, as earlier runs took", span(ms)),
            None => "for a time that no earlier run has shown".into(),
        };
        out.say(&format!(
            "You are {} ({}).  {}  {}.  ACTIVE {} becomes standby; {to} becomes ACTIVE.",
            reach.me.name(),
            reach.me.role(),
            talk.bold(&clean(&reach.environment)),
            held.name,
            held.holder,
        ));
        out.say(&format!(
            "Writers are shut out {outage}.  No data is lost: until the takeover a failure brings {} back.",
            held.holder
        ));
        Ok(self.plan.clone().or(Some(plan.id)))
    }
}

impl Wait {
    /// Stays with a run as long as was asked. `ordered`: an order to an old run was just given.
    pub(crate) async fn follow(
        self,
        reach: &Reach,
        home: &Home,
        run: &RunId,
        out: &Out,
        (goal, ordered): (Goal, bool),
    ) -> Result<Exit, Fail> {
        if !self.no_wait {
            return follow(reach, home, run, out, (goal, self.timeout, ordered)).await;
        }
        if out.human() {
            out.print(&run.to_string());
        } else {
            out.json(&envelope(json!({"run": run, "result": "running", "exit": 0, "steps": []})));
        }
        out.say(&format!("follow it: dc-switch run attach {run}"));
        Ok(Exit::Done)
    }
}

/// The group's open run, when it goes to that very site.
async fn open_to(reach: &Reach, home: &Home, held: &GroupView, to: &SiteId) -> Result<Option<RunId>, Fail> {
    let Some(open) = &held.run else { return Ok(None) };
    let asked = pb::RunRequest { run: open.to_string() };
    let view: RunView =
        reach.call(home, "run", ORDER_LIMIT, async |mut client| client.run_show(asked.clone()).await).await?;
    let goes = view.run.ended.is_none() && view.run.aborting.is_none() && view.run.winner() == to;
    Ok(goes.then_some(view.run.id))
}

/// No agent knows that group.
pub(crate) fn unknown_group(name: &GroupName, known: &[String]) -> Fail {
    let known = if known.is_empty() {
        "no group was applied yet".into()
    } else {
        format!("known: {}", known.join(", "))
    };
    Fail::refused(Code::UNKNOWN_GROUP, format!("there is no group {name}"), known).next("dc-switch status")
}
