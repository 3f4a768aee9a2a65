//! The proof that the oracle can fail: each sabotage of the agents must come out as `fail`, by the check it is about,
//! and the same lab without it must pass.
//!
//! A write that is let in behind the fence and a record that is not carried are told by one check each. Two schedulers
//! may be caught in four ways, whichever comes first: a task of either site runs while the other's do, starts behind
//! the fence, runs twice at once, or has run twice in the end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::oracle::Verdict;
use crate::report::Report;
use crate::run::{self, Order};
use crate::world::{Plane, World};

/// One sabotage, the planes it needs, and the checks that it names: one of them must fail on the plane it attacks.
struct Case {
    name: &'static str,
    attacks: Plane,
    needs: &'static [Plane],
    checks: &'static [&'static str],
}

const LOST: &[&str] = &["lost"];
const OVERLAP: &[&str] = &["overlap"];
const GROUPS: &[&str] = &["group_reread", "group_skipped"];
const TWICE: &[&str] = &["overlap", "started_after_fence", "two_copies", "duplicated"];

const CASES: [Case; 9] = [
    Case { name: "postgres:skip-drain", attacks: Plane::Postgres, needs: &[Plane::Postgres], checks: LOST },
    Case {
        name: "postgres:skip-fence",
        attacks: Plane::Postgres,
        needs: &[Plane::Postgres],
        checks: OVERLAP,
    },
    Case { name: "kafka:skip-drain", attacks: Plane::Kafka, needs: &[Plane::Kafka], checks: LOST },
    Case { name: "kafka:skip-fence", attacks: Plane::Kafka, needs: &[Plane::Kafka], checks: OVERLAP },
    Case { name: "kafka:early-offsets", attacks: Plane::Kafka, needs: &[Plane::Kafka], checks: GROUPS },
    Case {
        name: "kafka:drop-grant-save",
        attacks: Plane::Kafka,
        needs: &[Plane::Kafka],
        checks: &["not_open"],
    },
    Case { name: "s3:skip-drain", attacks: Plane::S3, needs: &[Plane::S3], checks: LOST },
    Case { name: "s3:skip-fence", attacks: Plane::S3, needs: &[Plane::S3], checks: OVERLAP },
    Case {
        name: "airflow:double-scheduler",
        attacks: Plane::Airflow,
        needs: &[Plane::Postgres, Plane::S3, Plane::Airflow],
        checks: TWICE,
    },
];

/// The agents' binary that can be told to do wrong, where builds put it.
pub fn agent() -> PathBuf {
    const NAME: &str = "dc-agent-sabotage";
    match (std::env::var_os("DC_LAB_BIN"), std::env::current_exe()) {
        (Some(dir), _) => PathBuf::from(dir).join(NAME),
        (None, Ok(lab)) => lab.with_file_name(NAME),
        (None, Err(_)) => PathBuf::from(NAME),
    }
}

/// Runs every case whose name contains `only`, and before them one control: the same agents told nothing, over all
/// planes that the cases need.
///
/// Errors: a lab could not be carried out.
pub async fn run(name: &str, agent: Option<PathBuf>, only: &str) -> Result<Verdict> {
    let agent = agent.unwrap_or_else(self::agent);
    let begun = Instant::now();
    let cases: Vec<&Case> = CASES.iter().filter(|c| c.name.contains(only)).collect();
    let all: BTreeSet<Plane> = cases.iter().flat_map(|c| c.needs).copied().collect();
    let (mut wrong, mut told) = (0, Vec::new());
    for (n, case) in std::iter::once(None).chain(cases.into_iter().map(Some)).enumerate() {
        let planes = case.map_or_else(|| all.clone(), |c| c.needs.iter().copied().collect());
        let order = order(&format!("{name}-{n}"), &agent, planes, case);
        let label = case.map_or("control", |c| c.name);
        eprintln!("== {label}");
        let began = Instant::now();
        let report = run::perform(&order).await?;
        let right = as_wanted(case, &report);
        wrong += usize::from(!right);
        let line = line(label, case, &report, began.elapsed());
        if right {
            World::load(&order.name).map(|world| std::fs::remove_dir_all(world.root)).ok();
            told.push(line);
        } else {
            told.push(format!("WRONG: {line}; its files are those of lab {}", order.name));
        }
    }
    for line in &told {
        println!("{line}");
    }
    println!("{} labs, {wrong} not as wanted, {:.0} s", told.len(), begun.elapsed().as_secs_f64());
    Ok(if wrong == 0 { Verdict::Pass } else { Verdict::Fail })
}

/// A control passes; a case fails on the plane that it attacks, by a check that it is about.
fn as_wanted(case: Option<&Case>, report: &Report) -> bool {
    let Some(case) = case else { return report.verdict == Verdict::Pass };
    report.verdict == Verdict::Fail && failed(case, report).iter().any(|check| case.checks.contains(check))
}

/// The checks that failed on the plane that a case attacks.
fn failed(case: &Case, report: &Report) -> BTreeSet<&'static str> {
    let here = report.reasons.iter().filter(|r| r.plane == Some(case.attacks));
    here.filter(|r| r.verdict == Verdict::Fail).map(|r| r.check).collect()
}

fn line(label: &str, case: Option<&Case>, report: &Report, took: Duration) -> String {
    let words = |checks: &mut dyn Iterator<Item = &'static str>| checks.collect::<Vec<_>>().join(" ");
    let by = case.map_or_else(String::new, |c| {
        let (found, wanted) = (failed(c, report), c.checks.iter().copied());
        format!(" by {} (wanted: {})", words(&mut found.into_iter()), words(&mut wanted.into_iter()))
    });
    format!("{label}: {}{by}, {:.0} s", report.verdict.name(), took.as_secs_f64())
}

fn order(name: &str, agent: &Path, planes: BTreeSet<Plane>, case: Option<&Case>) -> Order {
    Order {
        name: name.to_string(),
        planes,
        moves: 1,
        delay: Duration::from_millis(20),
        report: None,
        keep: false,
        sabotage: case.map(|c| c.name.to_string()),
        agent: Some(agent.to_path_buf()),
        build_s: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{Reason, verdict};

    fn report(reasons: &[(Plane, &'static str, Verdict)]) -> Report {
        let reason = |(plane, check, verdict): &(Plane, &'static str, Verdict)| Reason {
            verdict: *verdict,
            check,
            plane: Some(*plane),
            number: 1,
            text: String::new(),
        };
        let reasons: Vec<Reason> = reasons.iter().map(reason).collect();
        Report { verdict: verdict(&reasons), reasons, ..Report::empty() }
    }

    fn case(name: &str) -> &'static Case {
        const ALL: &[Case] = &CASES;
        ALL.iter().find(|c| c.name == name).unwrap_or(&ALL[0])
    }

    #[test]
    fn wants_the_very_check_that_a_sabotage_names() {
        let fence = case("kafka:skip-fence");
        let told = |check| as_wanted(Some(fence), &report(&[(Plane::Kafka, check, Verdict::Fail)]));
        assert!(told("overlap"));
        assert!(!told("lost"), "another check of the plane");
        let both = [(Plane::Kafka, "lost", Verdict::Fail), (Plane::Kafka, "overlap", Verdict::Fail)];
        assert!(as_wanted(Some(fence), &report(&both)));
    }

    #[test]
    fn wants_it_on_the_plane_that_is_attacked() {
        let fence = case("kafka:skip-fence");
        assert!(!as_wanted(Some(fence), &report(&[(Plane::S3, "overlap", Verdict::Fail)])));
    }

    #[test]
    fn takes_no_invalid_run_for_a_failed_one() {
        let fence = case("kafka:skip-fence");
        assert!(!as_wanted(Some(fence), &report(&[(Plane::Kafka, "overlap", Verdict::Invalid)])));
        assert!(!as_wanted(None, &report(&[(Plane::Kafka, "backlog", Verdict::Invalid)])));
        assert!(!as_wanted(Some(fence), &report(&[])));
        assert!(as_wanted(None, &report(&[])));
    }

    #[test]
    fn names_for_every_case_what_is_told_of_it() {
        let checks = |name: &str| CASES.iter().find(|c| c.name == name).map(|c| c.checks);
        for plane in ["postgres", "kafka", "s3"] {
            assert_eq!(checks(&format!("{plane}:skip-fence")), Some(OVERLAP));
            assert_eq!(checks(&format!("{plane}:skip-drain")), Some(LOST));
        }
        assert_eq!(checks("kafka:early-offsets"), Some(GROUPS));
        assert_eq!(checks("kafka:drop-grant-save"), Some(&["not_open"][..]));
        assert_eq!(checks("airflow:double-scheduler"), Some(TWICE));
    }
}
