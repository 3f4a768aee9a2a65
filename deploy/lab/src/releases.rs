//! DAG releases of the lab: the same DAGs, published again and again under load, each time with another number beside
//! them, so that every release differs from the one before.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::agents;
use crate::history::now_ns;
use crate::load::Shared;
use crate::world::World;

/// The files of a release.
const FILES: [(&str, &str); 2] = [
    ("lab_load.py", include_str!("../parts-data/airflow/dags/lab_load.py")),
    ("dc_switch_canary.py", include_str!("../parts-data/airflow/dags/dc_switch_canary.py")),
];
/// Between two releases.
const EVERY: Duration = Duration::from_secs(15);

/// What was published and when.
#[derive(Debug, Default)]
pub struct Releases(Mutex<Vec<(u64, u64)>>);

impl Releases {
    /// The serial of the newest release that stood at a time; 0 if none.
    pub fn newest(&self, at: u64) -> u64 {
        let Ok(all) = self.0.lock() else { return 0 };
        all.iter().filter(|(done, _)| *done <= at).map(|(_, serial)| *serial).max().unwrap_or(0)
    }

    /// Publishes one release.
    ///
    /// Errors: the product refused it, as it does while a run holds the group.
    pub async fn publish(&self, world: &World) -> Result<()> {
        let dir = world.root.join("dags");
        for (name, text) in FILES {
            world.write(&dir.join(name), text, 0o644)?;
        }
        world.write(&dir.join("release.txt"), &format!("{}\n", now_ns()), 0o644)?;
        let said = agents::publish(world, &dir).await?;
        let body: Value = serde_json::from_str(&said).context("read the release's serial")?;
        let serial = serial(&body).context("the answer names no serial")?;
        if let Ok(mut all) = self.0.lock() {
            all.push((now_ns(), serial));
        }
        Ok(())
    }
}

fn serial(body: &Value) -> Option<u64> {
    body["serial"].as_u64().or_else(|| body["release"]["serial"].as_u64())
}

/// Publishes until the load ends. A refusal is an answer: the next one comes later.
pub async fn keep(shared: Arc<Shared>, releases: Arc<Releases>) {
    while !shared.over() {
        shared.sleep(EVERY).await;
        if !shared.over() && !shared.moving.load(std::sync::atomic::Ordering::Relaxed) {
            let _ = releases.publish(&shared.world).await; // a run may hold the group
        }
    }
}
