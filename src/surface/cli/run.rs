//! `run`: lists, shows, follows and steers runs. Each is named by its id or a beginning of it.

use clap::{Args, Subcommand};
use dc_core::fail::{Exit, Fail};
use dc_core::ids::GroupName;
use dc_core::view::RunView;
use dc_wire::pb;

use super::fails::bad_name;
use super::follow::{Goal, screen};
use super::out::{Out, clean, envelope, span};
use super::progress::line;
use super::reach::{Home, Reach};
use super::switchover::{ORDER_LIMIT, Wait};
use super::{local, shape, table};

/// Of `run`.
#[derive(Debug, Subcommand)]
pub(crate) enum Run {
    /// Lists runs, newest first
    List {
        /// Only of this group
        #[arg(long)]
        group: Option<String>,
        /// At most this many
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Shows every step of a run with what it saw
    Show {
        /// Its id, or a beginning of it
        run: String,
    },
    /// Follows a run to its end; Ctrl-C leaves it, it goes on
    Attach {
        /// Its id, or a beginning of it
        run: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Undoes a run; until its takeover
    Abort {
        /// Its id, or a beginning of it
        run: String,
        /// Why, for the audit
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Tries failed steps once more
    Retry(Order),
    /// Goes back to the source; between the takeover and the opening
    Return(Order),
}

/// An order about one run.
#[derive(Debug, Args)]
pub(crate) struct Order {
    /// Its id, or a beginning of it
    run: String,
    #[command(flatten)]
    wait: Wait,
}

impl Run {
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let home = reach.meet().await?;
        match self {
            Self::List { group, limit } => list(reach, &home, group.as_deref(), limit, out).await,
            Self::Show { run } => show(reach, &home, &run, out).await,
            Self::Attach { run, wait } => {
                let run = find(reach, &home, &run).await?.run.id;
                wait.follow(reach, &home, &run, out, (Goal::Moved, false)).await
            }
            Self::Abort { run, reason, wait } => {
                home.quorum()?;
                let order = pb::RunOrder { run, reason };
                let asked = async |mut client: super::reach::Client| client.run_abort(order.clone()).await;
                let view: RunView = reach.call(&home, "run", ORDER_LIMIT, asked).await?;
                wait.follow(reach, &home, &view.run.id, out, (Goal::RolledBack, true)).await
            }
            Self::Retry(Order { run, wait }) => {
                home.quorum()?;
                let order = pb::RunOrder { run, reason: String::new() };
                let asked = async |mut client: super::reach::Client| client.run_retry(order.clone()).await;
                let view: RunView = reach.call(&home, "run", ORDER_LIMIT, asked).await?;
                wait.follow(reach, &home, &view.run.id, out, (Goal::Moved, true)).await
            }
            Self::Return(Order { run, wait }) => {
                home.quorum()?;
                let order = pb::RunOrder { run, reason: String::new() };
                let asked = async |mut client: super::reach::Client| client.run_return(order.clone()).await;
                let view: RunView = reach.call(&home, "run", ORDER_LIMIT, asked).await?;
                wait.follow(reach, &home, &view.run.id, out, (Goal::Returned, true)).await
            }
        }
    }
}

async fn find(reach: &Reach, home: &Home, run: &str) -> Result<RunView, Fail> {
    let asked = pb::RunRequest { run: run.to_owned() };
    reach.call(home, "run", ORDER_LIMIT, async |mut client| client.run_show(asked.clone()).await).await
}

fn local_view(home: &Home, out: &Out) {
    if home.local() {
        out.say(&format!("LOCAL VIEW - NO QUORUM: this is only what the agent of {} knows", home.site));
    }
}

async fn list(reach: &Reach, home: &Home, group: Option<&str>, limit: u32, out: &Out) -> Result<Exit, Fail> {
    let group = group.map(GroupName::new).transpose().map_err(|e| bad_name(&e))?;
    let asked = pb::RunListRequest { group: group.map(|g| g.to_string()).unwrap_or_default(), limit };
    let views: Vec<RunView> = reach
        .call(home, "runs", ORDER_LIMIT, async |mut client| client.run_list(asked.clone()).await)
        .await?;
    local_view(home, out);
    if out.stream() {
        for view in &views {
            out.json(&shape::run(&view.run, Exit::Done));
        }
    } else if out.human() {
        let mut rows =
            vec![table::row(&["RUN", "GROUP", "MOVE", "STARTED", "RESULT", "TOOK", "BY", "REASON"])];
        rows.extend(views.iter().map(row));
        out.table("", &rows);
    } else {
        let runs = views.iter().map(|view| shape::run(&view.run, Exit::Done)).collect();
        out.json(&envelope(serde_json::Value::Array(runs)));
    }
    Ok(Exit::Done)
}

fn row(view: &RunView) -> Vec<String> {
    let run = &view.run;
    let end = run.ended.as_ref().map_or(view.wall, |ended| ended.at);
    vec![
        run.id.to_string(),
        run.group.to_string(),
        format!("{} -> {}", run.source, run.target),
        local::moment(run.started),
        shape::result(run).into(),
        span(end.0.saturating_sub(run.started.0)),
        clean(&run.by),
        clean(&run.reason),
    ]
}

async fn show(reach: &Reach, home: &Home, run: &str, out: &Out) -> Result<Exit, Fail> {
    let RunView { run, .. } = find(reach, home, run).await?;
    local_view(home, out);
    let exit = shape::exit(&run);
    if !out.human() {
        out.json(&shape::run(&run, exit));
        return Ok(Exit::Done);
    }
    let title = format!("Run {}  {} {} -> {}", run.id, run.group, run.source, run.target);
    out.print(&format!("{}    {}", out.bold(&title), shape::result(&run)));
    out.print(&format!(
        "  by {} at {}    plan {}",
        clean(&run.by),
        local::moment(run.started),
        run.plan_hash
    ));
    if !run.reason.is_empty() {
        out.print(&format!("  reason: {}", clean(&run.reason)));
    }
    for (title, steps) in [("  before it was turned round:", &run.past), ("", &run.steps)] {
        if !title.is_empty() && !steps.is_empty() {
            out.print(title);
        }
        for step in steps {
            out.print(&format!("  {}", line(step, out)));
        }
    }
    if run.ended.is_some() || run.attention.is_some() {
        screen(&run, Exit::Done, out);
    } else {
        out.print(&format!("\nNext: dc-switch run attach {}", run.id));
    }
    Ok(Exit::Done)
}
