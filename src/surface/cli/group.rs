//! `group`: registers failover groups, shows them, and says what a file would change.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, SiteId};
use dc_core::view::{ApplyChange, ApplyView, DiffView, GroupShow};
use dc_wire::pb;
use serde_json::json;

use super::fails::{bad_name, usage};
use super::out::{Out, clean, envelope};
use super::reach::Reach;
use super::table;
use crate::spec_file;

/// How long a spec may take to be confirmed.
const APPLY_LIMIT: Duration = Duration::from_secs(30);

/// Of `group`.
#[derive(Debug, Subcommand)]
pub(crate) enum Group {
    /// Registers a group, or changes its spec
    Apply {
        /// Group spec, TOML
        file: PathBuf,
        /// Only say what it would do
        #[arg(long)]
        dry_run: bool,
    },
    /// Shows a group as applied
    Show {
        /// Its name
        group: String,
    },
    /// Says what a file would change
    Diff {
        /// Group spec, TOML
        file: PathBuf,
    },
}

/// The command with its file read and found good.
pub(crate) enum Prepared {
    Apply(pb::GroupApplyRequest),
    Show(GroupName),
    Diff(pb::GroupDiffRequest),
}

impl Group {
    /// Reads and checks what is local, before anybody is contacted.
    pub(crate) fn prepare(self) -> Result<Prepared, Fail> {
        Ok(match self {
            Self::Apply { file, dry_run } => {
                let (file, spec_toml) = checked(&file)?;
                Prepared::Apply(pb::GroupApplyRequest { spec_toml, file, dry_run })
            }
            Self::Show { group } => Prepared::Show(GroupName::new(&group).map_err(|e| bad_name(&e))?),
            Self::Diff { file } => {
                let (file, spec_toml) = checked(&file)?;
                Prepared::Diff(pb::GroupDiffRequest { spec_toml, file })
            }
        })
    }
}

fn checked(path: &Path) -> Result<(String, String), Fail> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| {
        usage("DC-0016", format!("{shown} cannot be read; nothing was changed"), e.to_string())
            .next("dc-switch group apply --help")
    })?;
    spec_file::parse(&shown, &text)?;
    Ok((shown, text))
}

impl Prepared {
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let home = reach.meet().await?;
        match self {
            Self::Apply(order) => {
                home.quorum()?;
                let view: ApplyView = reach
                    .call(&home, "apply", APPLY_LIMIT, async |mut client| {
                        client.group_apply(order.clone()).await
                    })
                    .await?;
                applied(&view, &order.file, out);
                Ok(Exit::Done)
            }
            Self::Show(group) => {
                let asked = pb::GroupRequest { group: group.to_string() };
                let view: GroupShow = reach
                    .call(&home, "group", APPLY_LIMIT, async |mut client| {
                        client.group_show(asked.clone()).await
                    })
                    .await?;
                show(&view, out)
            }
            Self::Diff(asked) => {
                let view: DiffView = reach
                    .call(&home, "diff", APPLY_LIMIT, async |mut client| {
                        client.group_diff(asked.clone()).await
                    })
                    .await?;
                Ok(differs(&view, &asked.file, out))
            }
        }
    }
}

fn applied(view: &ApplyView, file: &str, out: &Out) {
    if !out.human() {
        return out.json(&envelope(json!(view)));
    }
    let word = match (view.change, view.dry_run) {
        (ApplyChange::New, true) => "would be registered",
        (ApplyChange::New, false) => "is registered",
        (ApplyChange::Changed, true) => "would be changed",
        (ApplyChange::Changed, false) => "is changed",
        (ApplyChange::Same, _) => "is as the file says already",
    };
    out.print(&format!("group {} {word}; it owns alone:", out.bold(view.group.as_str())));
    view.claims.iter().for_each(|claim| out.print(&format!("  {}", clean(claim))));
    let next = if view.dry_run && view.change != ApplyChange::Same {
        out.print("NOTHING HAS BEEN CHANGED");
        format!("dc-switch group apply {file}")
    } else {
        format!("dc-switch status {}", view.group)
    };
    out.print(&format!("Next: {next}"));
}

fn show(view: &GroupShow, out: &Out) -> Result<Exit, Fail> {
    if !out.human() {
        out.json(&envelope(json!(view)));
        return Ok(Exit::Done);
    }
    let sites: Vec<_> = view.spec.sites.iter().map(SiteId::as_str).collect();
    out.print(&format!("# {} at {}, ACTIVE at {}", view.spec.name, sites.join(" and "), view.holder));
    out.print(&format!("# epoch {}, version {} of the spec", view.epoch, view.spec_version));
    view.claims.iter().for_each(|claim| out.print(&format!("# owns alone: {}", clean(claim))));
    let text = toml::to_string(&view.spec)
        .map_err(|e| super::fails::unexpected("the spec cannot be written as TOML", &e.to_string()))?;
    out.print(&clean(text.trim_end()));
    Ok(Exit::Done)
}

fn differs(view: &DiffView, file: &str, out: &Out) -> Exit {
    let same = view.changes.is_empty();
    if !out.human() {
        out.json(&envelope(json!(view)));
    } else if same {
        out.print(&format!("group {} is as {file} says", view.group));
    } else {
        let known = if view.known { "differs from" } else { "is not known; all of it is new in" };
        out.print(&format!("group {} {known} {file}:", view.group));
        let mut rows = vec![table::row(&["KEY", "IS", "BECOMES"])];
        let word = |value: &Option<String>| value.as_deref().map_or_else(|| "-".to_owned(), clean);
        rows.extend(view.changes.iter().map(|c| vec![clean(&c.key), word(&c.is), word(&c.becomes)]));
        out.table("  ", &rows);
        out.print(&format!("Next: dc-switch group apply {file} --dry-run"));
    }
    if same { Exit::Done } else { Exit::Findings }
}
