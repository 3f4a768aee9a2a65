//! The proof that the oracle can fail: each sabotage of the agents must come out as `fail`, by the check it is about,
//! and the same lab without it must pass.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::oracle::Verdict;
use crate::run::{self, Order};
use crate::world::Plane;

/// One sabotage, the planes it needs, and the checks of which one must fail on the plane it attacks.
struct Case {
    name: &'static str,
    attacks: Plane,
    needs: &'static [Plane],
    checks: &'static [&'static str],
}

const LOST: &[&str] = &["lost"];
const BOTH: &[&str] = &["overlap", "lost"];

const CASES: [Case; 9] = [
    Case { name: "postgres:skip-drain", attacks: Plane::Postgres, needs: &[Plane::Postgres], checks: LOST },
    Case { name: "postgres:skip-fence", attacks: Plane::Postgres, needs: &[Plane::Postgres], checks: BOTH },
    Case { name: "kafka:skip-drain", attacks: Plane::Kafka, needs: &[Plane::Kafka], checks: LOST },
    Case { name: "kafka:skip-fence", attacks: Plane::Kafka, needs: &[Plane::Kafka], checks: BOTH },
    Case {
        name: "kafka:early-offsets",
        attacks: Plane::Kafka,
        needs: &[Plane::Kafka],
        checks: &["group_reread", "group_skipped"],
    },
    Case {
        name: "kafka:drop-grant-save",
        attacks: Plane::Kafka,
        needs: &[Plane::Kafka],
        checks: &["not_open"],
    },
    Case { name: "s3:skip-drain", attacks: Plane::S3, needs: &[Plane::S3], checks: LOST },
    Case { name: "s3:skip-fence", attacks: Plane::S3, needs: &[Plane::S3], checks: BOTH },
    Case {
        name: "airflow:double-scheduler",
        attacks: Plane::Airflow,
        needs: &[Plane::Postgres, Plane::S3, Plane::Airflow],
        checks: &["overlap", "started_after_fence", "duplicated", "two_copies"],
    },
];

/// Runs every case whose name contains `only`, and the control of each set of planes first.
///
/// Errors: a lab could not be carried out.
pub async fn run(name: &str, agent: &Path, only: &str) -> Result<Verdict> {
    let cases: Vec<&Case> = CASES.iter().filter(|c| c.name.contains(only)).collect();
    let controls: BTreeSet<&[Plane]> = cases.iter().map(|c| c.needs).collect();
    let mut wrong = Vec::new();
    let mut told = Vec::new();
    for planes in controls {
        let names: Vec<&str> = planes.iter().map(|p| p.name()).collect();
        let label = format!("control {}", names.join(","));
        let report = run::perform(&order(name, agent, planes, None)).await?;
        told.push(format!("{label}: {}", report.verdict.name()));
        if report.verdict != Verdict::Pass {
            wrong.push(format!("{label} came out {}", report.verdict.name()));
        }
    }
    for case in cases {
        let report = run::perform(&order(name, agent, case.needs, Some(case.name))).await?;
        let by: BTreeSet<&str> = report
            .reasons
            .iter()
            .filter(|r| r.verdict == Verdict::Fail && r.plane == Some(case.attacks))
            .map(|r| r.check)
            .collect();
        told.push(format!("{}: {} by {by:?}", case.name, report.verdict.name()));
        if report.verdict != Verdict::Fail || !case.checks.iter().any(|c| by.contains(c)) {
            wrong.push(format!(
                "{} came out {} by {by:?}, not by one of {:?}",
                case.name,
                report.verdict.name(),
                case.checks
            ));
        }
    }
    for line in &told {
        println!("{line}");
    }
    for line in &wrong {
        println!("WRONG: {line}");
    }
    Ok(if wrong.is_empty() { Verdict::Pass } else { Verdict::Fail })
}

fn order(name: &str, agent: &Path, planes: &[Plane], sabotage: Option<&str>) -> Order {
    Order {
        name: name.to_string(),
        planes: planes.iter().copied().collect(),
        moves: 1,
        delay: Duration::from_millis(20),
        report: None,
        keep: false,
        sabotage: sabotage.map(String::from),
        agent: Some(agent.to_path_buf()),
        build_s: None,
    }
}
