//! The plane against the real servers of a lab: `DC_LAB_WORLD` names its folder, else every test fails.

mod support;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::primitives::ByteStream;
use dc_core::act::{Change, Direction, Outcome, Progress, S3Act};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, RunId};
use dc_core::position::Position;
use dc_plane::{Deadline, Depth, PlaneError, Role};
use parking_lot::Mutex;
use support::{Lab, Move, Res, Side, findings, soon, spec, step};

/// Writers that never stop trying, and what they were told.
struct Writers {
    over: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// Key, last acknowledged content, and when that came.
    acked: Arc<Mutex<BTreeMap<String, (String, Instant)>>>,
    refused: Arc<Mutex<u64>>,
}

impl Writers {
    fn start(side: &Side, count: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let acked = Arc::new(Mutex::new(BTreeMap::new()));
        let refused = Arc::new(Mutex::new(0));
        let tasks = (0..count)
            .map(|n| {
                let (over, acked, refused) = (over.clone(), acked.clone(), refused.clone());
                let (app, name) = (side.app.clone(), side.site.clone());
                tokio::spawn(async move {
                    let mut seq = 0_u64;
                    while !over.load(Ordering::SeqCst) {
                        // every fourth write grows an object that stands, as Airflow's log handler does
                        let key = if seq % 4 == 3 {
                            format!("logs/dag_id=d/{name}-{n}-grows.log")
                        } else {
                            format!("logs/dag_id=d/{name}-{n}-{seq:06}.log")
                        };
                        let text =
                            format!("{key} {seq} {}", "line ".repeat(usize::try_from(seq % 7).unwrap_or(0)));
                        let body = ByteStream::from(text.clone().into_bytes());
                        match app.put_object().bucket("orders").key(&key).body(body).send().await {
                            Ok(_) => {
                                acked.lock().insert(key, (text, Instant::now()));
                                seq += 1;
                            }
                            Err(_) => *refused.lock() += 1,
                        }
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                })
            })
            .collect();
        Self { over, tasks, acked, refused }
    }

    async fn enough(&self, acked: usize) {
        while self.acked.lock().len() < acked {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) -> (BTreeMap<String, (String, Instant)>, u64) {
        self.over.store(true, Ordering::SeqCst);
        for task in self.tasks {
            let _ = task.await;
        }
        let acked = std::mem::take(&mut *self.acked.lock());
        let refused = *self.refused.lock();
        (acked, refused)
    }
}

fn forward<'a>(from: &'a Side, to: &'a Side, counter: u64) -> Move<'a> {
    Move { from, to, epoch: Epoch { incarnation: 1, counter }, direction: Direction::Forward }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_put_is_accepted_after_the_fence_is_proved_and_undo_lets_writers_in() -> Res<()> {
    let lab = Lab::fresh().await?;
    let way = forward(&lab.rome, &lab.fra, 2);
    let writers = Writers::start(&lab.rome, 4);
    writers.enough(60).await;
    let act = lab.make(S3Act::FenceWriters, &lab.rome, way);
    assert_eq!(lab.rome.plane.probe(&act, soon()).await?, Progress::NotYet);
    let began = Instant::now();
    let fenced = lab.rome.plane.perform(&act, &step(way.epoch), soon()).await?;
    let proved = Instant::now();
    assert_eq!(fenced.change, Change::Changed);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (acked, refused) = writers.end().await;
    let last = acked.values().map(|(_, at)| *at).max().ok_or("nothing acked")?;
    assert!(last < proved, "a PUT was accepted {:?} after the proof", last - proved);
    assert!(refused > 20, "{refused} refusals");
    println!(
        "fence: proved {:?}, last accepted PUT {:?} after its start",
        proved - began,
        last.saturating_duration_since(began)
    );

    assert!(matches!(lab.rome.plane.probe(&act, soon()).await?, Progress::Done(_)));
    assert_eq!(lab.rome.plane.perform(&act, &step(way.epoch), soon()).await?.change, Change::Already);
    let facts = lab.rome.plane.observe(Depth::Deep, soon()).await?;
    assert_eq!(facts.role, Some(Role::Closed));
    let passed = lab.act(S3Act::LastPass, &lab.fra, way).await?;
    let there = lab.fra.logs().await?;
    assert!(acked.keys().all(|key| there.contains_key(key)), "{}", passed.seen);

    assert!(!lab.rome.may_write("logs/probe").await);
    for _ in 0..2 {
        lab.rome.plane.undo(&act, &step(way.epoch), soon()).await?;
        assert!(lab.rome.may_write("logs/probe").await);
    }
    assert_eq!(lab.rome.plane.observe(Depth::Shallow, soon()).await?.role, Some(Role::Writable));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backlog_is_exact_and_above_its_limit_it_blocks() -> Res<()> {
    let lab = Lab::fresh().await?;
    let way = forward(&lab.rome, &lab.fra, 2);
    let count = 2_000_u64;
    let mut work = tokio::task::JoinSet::new();
    for n in 0..count {
        let root = lab.rome.root.clone();
        work.spawn(async move {
            let body = ByteStream::from(format!("log {n}\n").repeat(40).into_bytes());
            root.put_object()
                .bucket("orders")
                .key(format!("logs/r/{n:05}.log"))
                .body(body)
                .send()
                .await
                .is_ok()
        });
        if work.len() >= 32 {
            assert!(work.join_next().await.ok_or("no task")??);
        }
    }
    assert!(work.join_all().await.into_iter().all(|ok| ok));
    let read = lab.act(S3Act::Preflight, &lab.fra, way).await?;
    let codes: Vec<_> = read.blocking().map(|f| f.code.as_str()).collect();
    assert_eq!(codes, vec!["DC-0508"], "{read:?}");
    assert!(
        read.seen.contains("backlog 2001 of 2001") || read.seen.contains("backlog 2000 of 2000"),
        "{}",
        read.seen
    );
    let source = lab.act(S3Act::Preflight, &lab.rome, way).await?;
    assert_eq!(source.blocking().count(), 0, "{source:?}");

    let began = Instant::now();
    lab.act(S3Act::CatchUp, &lab.fra, way).await?;
    println!("first pass of {count}: {:?}", began.elapsed());
    let began = Instant::now();
    lab.stand(&lab.fra, &lab.rome).await?;
    println!("pass with nothing to do over {count}: {:?}", began.elapsed());
    lab.twice(S3Act::Recheck, &lab.rome, way).await?;
    lab.twice(S3Act::FenceWriters, &lab.rome, way).await?;
    lab.rome.put("logs/r/00007.log", "rewritten").await?;
    let began = Instant::now();
    let passed = lab.act(S3Act::LastPass, &lab.fra, way).await?;
    println!("last pass over {count}, 1 behind: {:?}; {}", began.elapsed(), passed.seen);
    assert!(passed.seen.contains("1 were behind"), "{}", passed.seen);
    let position = passed.outcomes.iter().find_map(|o| match o {
        Outcome::Position(Position::S3 { logs, .. }) => Some(*logs),
        _ => None,
    });
    assert_eq!(position, Some(count));
    assert_eq!(lab.fra.get("logs/r/00007.log").await?, b"rewritten");
    let facts = lab.fra.plane.observe(Depth::Shallow, soon()).await?;
    assert_eq!((facts.role, facts.lag.map(|l| l.amount)), (Some(Role::Following), Some(0)));
    assert!(facts.lag.and_then(|l| l.age_ms).is_some());
    Ok(())
}

/// One whole move, every act twice; the time between fence and opening.
async fn go(lab: &mut Lab, back: bool) -> Res<Duration> {
    let (from, to) = if back { (&lab.fra, &lab.rome) } else { (&lab.rome, &lab.fra) };
    let way = forward(from, to, lab.epoch.counter + 1);
    for (act, at) in [
        (S3Act::Preflight, from),
        (S3Act::Preflight, to),
        (S3Act::CatchUp, to),
        (S3Act::Recheck, from),
        (S3Act::Recheck, to),
    ] {
        let done = lab.twice(act, at, way).await?;
        assert_eq!(done.blocking().count(), 0, "{act:?} at {}: {done:?}", at.site);
    }
    let began = Instant::now();
    lab.twice(S3Act::FenceWriters, from, way).await?;
    lab.twice(S3Act::LastPass, to, way).await?;
    lab.twice(S3Act::OpenWriters, to, way).await?;
    let outage = began.elapsed();
    lab.twice(S3Act::LatePass, to, way).await?;
    lab.twice(S3Act::PullReverse, from, way).await?;
    let verified = lab.act(S3Act::Verify, to, way).await?;
    assert!(findings(&verified).is_empty(), "{verified:?}");
    println!("{}", verified.seen);
    lab.twice(S3Act::Verify, from, way).await?;
    lab.epoch = way.epoch;
    Ok(outage)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_under_writers_and_releases_loses_and_overwrites_nothing() -> Res<()> {
    let mut lab = Lab::fresh().await?;
    let first = lab.publish(&[("a.py", "one"), ("sub/b.py", "two")]).await?;
    for (side, holder) in [(&lab.rome, true), (&lab.fra, false)] {
        let way = Move { epoch: lab.epoch, ..forward(&lab.rome, &lab.fra, 1) };
        lab.twice(if holder { S3Act::Serve } else { S3Act::Stand }, side, way).await?;
        assert_eq!(side.current(), Some(first.version()));
    }
    let (at_rome, at_fra) = (Writers::start(&lab.rome, 2), Writers::start(&lab.fra, 2));
    at_rome.enough(100).await;
    let out = go(&mut lab, false).await?;
    at_fra.enough(100).await;
    let second = lab.publish(&[("a.py", "one and more"), ("c.py", "three")]).await?;
    lab.stand(&lab.rome, &lab.fra).await?;
    let serve = forward(&lab.fra, &lab.rome, lab.epoch.counter);
    lab.act(S3Act::Serve, &lab.fra, serve).await?;
    assert_eq!((lab.rome.current(), lab.fra.current()), (Some(second.version()), Some(second.version())));
    let back = go(&mut lab, true).await?;
    let some_more = at_rome.acked.lock().len() + 100;
    at_rome.enough(some_more).await;
    println!("fence to open: {out:?} there, {back:?} back (every act twice)");

    let (rome, _) = at_rome.end().await;
    let (fra, refused) = at_fra.end().await;
    assert!(refused > 20, "{refused} refusals at fra");
    lab.stand(&lab.fra, &lab.rome).await?;
    let here = lab.rome.logs().await?;
    for (key, (text, _)) in rome.iter().chain(&fra) {
        assert_eq!(String::from_utf8_lossy(&lab.rome.get(key).await?), text.as_str(), "{key}");
    }
    assert_eq!(here, lab.fra.logs().await?);
    assert!(here.keys().all(|key| !key.contains(".dc-")), "something diverged");
    assert_eq!(here.len(), rome.len() + fra.len());
    assert!(lab.rome.config.releases_dir.join(first.version()).join("sub/b.py").exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_returned_before_opened_serves_at_the_source_again() -> Res<()> {
    let lab = Lab::fresh().await?;
    lab.rome.put("logs/a", "a").await?;
    let way = forward(&lab.rome, &lab.fra, 2);
    lab.act(S3Act::Recheck, &lab.rome, way).await?;
    lab.act(S3Act::FenceWriters, &lab.rome, way).await?;
    lab.act(S3Act::LastPass, &lab.fra, way).await?;
    let back = Move { direction: Direction::Return, ..way };
    lab.twice(S3Act::OpenWriters, &lab.rome, back).await?;
    lab.twice(S3Act::LatePass, &lab.rome, back).await?;
    lab.twice(S3Act::PullReverse, &lab.fra, back).await?;
    lab.act(S3Act::Verify, &lab.rome, back).await?;
    assert!(lab.rome.may_write("logs/b").await && !lab.fra.may_write("logs/b").await);
    // the next run may fence again
    let next = forward(&lab.rome, &lab.fra, 3);
    lab.act(S3Act::FenceWriters, &lab.rome, next).await?;
    assert!(!lab.rome.may_write("logs/b").await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_closed_itself_is_reopened_by_a_renewal_and_never_past_a_run() -> Res<()> {
    let lab = Lab::fresh().await?;
    let way = forward(&lab.rome, &lab.fra, 1);
    let close = lab.make(S3Act::SelfClose, &lab.rome, way);
    let renewal = Authority::reopen(lab.epoch);
    for _ in 0..2 {
        lab.rome.plane.perform(&close, &Authority::self_fence(), soon()).await?;
        assert!(!lab.rome.may_write("logs/x").await);
    }
    assert!(lab.rome.plane.undo(&close, &Authority::self_fence(), soon()).await.is_err());
    // a run fences the closed site, is undone, and the site is still closed by itself
    let run = forward(&lab.rome, &lab.fra, 2);
    let fence = lab.make(S3Act::FenceWriters, &lab.rome, run);
    lab.rome.plane.perform(&fence, &step(run.epoch), soon()).await?;
    assert!(matches!(lab.rome.plane.undo(&close, &renewal, soon()).await, Err(PlaneError::Refused { .. })));
    let mut foreign = fence.clone();
    foreign.run = Some(RunId("01OTHER".into()));
    assert!(matches!(
        lab.rome.plane.undo(&foreign, &step(run.epoch), soon()).await,
        Err(PlaneError::Refused { .. })
    ));
    lab.rome.plane.undo(&fence, &step(run.epoch), soon()).await?;
    assert!(!lab.rome.may_write("logs/x").await);
    lab.rome.plane.undo(&close, &renewal, soon()).await?;
    assert!(lab.rome.may_write("logs/x").await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_puller_writes_nothing_at_a_site_that_was_opened() -> Res<()> {
    let lab = Lab::fresh().await?;
    let way = forward(&lab.rome, &lab.fra, 2);
    lab.act(S3Act::FenceWriters, &lab.rome, way).await?;
    lab.act(S3Act::LastPass, &lab.fra, way).await?;
    lab.act(S3Act::OpenWriters, &lab.fra, way).await?;
    lab.rome.put("logs/stale", "old").await?;
    for counter in [1, 2] {
        let old = forward(&lab.rome, &lab.fra, counter);
        for act in [S3Act::Stand, S3Act::CatchUp, S3Act::LastPass] {
            let refused = lab.act(act, &lab.fra, old).await;
            assert!(matches!(refused, Err(PlaneError::Refused { .. })), "{act:?} {refused:?}");
        }
    }
    assert!(lab.fra.may_write("logs/new").await && !lab.fra.logs().await?.contains_key("logs/stale"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_source_deletes_nothing() -> Res<()> {
    let mut lab = Lab::fresh().await?;
    let release = lab.publish(&[("a.py", "one")]).await?;
    for n in 0..30 {
        lab.rome.put(&format!("logs/{n}"), "x").await?;
    }
    lab.stand(&lab.fra, &lab.rome).await?;
    let before = lab.fra.list().await?;
    lab.rome.empty().await?;
    lab.stand(&lab.fra, &lab.rome).await?;
    assert_eq!(lab.fra.list().await?, before);
    assert_eq!(lab.fra.current(), Some(release.version()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_standby_does_not_know_is_kept_beside_and_known_things_are_not() -> Res<()> {
    let lab = Lab::fresh().await?;
    lab.rome.put("logs/known", "v1").await?;
    lab.fra.put("logs/unknown", "of fra").await?;
    lab.fra.put("logs/equal", "the same").await?;
    lab.rome.put("logs/unknown", "of rome").await?;
    lab.rome.put("logs/equal", "the same").await?;
    let stood = lab.stand(&lab.fra, &lab.rome).await?;
    assert_eq!(findings(&stood).iter().map(|f| f.code.as_str()).collect::<Vec<_>>(), vec!["DC-0515"]);
    lab.rome.put("logs/known", "v1 and v2").await?;
    lab.stand(&lab.fra, &lab.rome).await?;
    let kept = "logs/unknown.dc-fra-e1.1";
    let keys: Vec<_> = lab.fra.logs().await?.into_keys().collect();
    assert_eq!(keys, vec!["logs/equal", "logs/known", "logs/unknown", kept]);
    assert_eq!(lab.fra.get(kept).await?, b"of fra");
    assert_eq!(lab.fra.get("logs/unknown").await?, b"of rome");
    assert_eq!(lab.fra.get("logs/known").await?, b"v1 and v2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_came_after_the_cut_is_saved_and_stated() -> Res<()> {
    let lab = Lab::fresh().await?;
    for key in ["logs/a", "logs/grown"] {
        lab.rome.put(key, "before").await?;
    }
    let way = forward(&lab.rome, &lab.fra, 2);
    lab.act(S3Act::CatchUp, &lab.fra, way).await?;
    lab.act(S3Act::Recheck, &lab.rome, way).await?;
    lab.act(S3Act::FenceWriters, &lab.rome, way).await?;
    lab.act(S3Act::LastPass, &lab.fra, way).await?;
    // what no policy stops: written by the root user, as a request under way would be
    lab.rome.put("logs/late", "late").await?;
    lab.rome.put("logs/grown", "before, and late").await?;
    lab.act(S3Act::OpenWriters, &lab.fra, way).await?;
    lab.fra.put("logs/grown", "before, and new").await?;
    let late = lab.act(S3Act::LatePass, &lab.fra, way).await?;
    assert_eq!(findings(&late).iter().map(|f| f.code.as_str()).collect::<Vec<_>>(), vec!["DC-0515"]);
    let reversed = lab.act(S3Act::PullReverse, &lab.rome, way).await?;
    assert_eq!(findings(&reversed).len(), 1, "{reversed:?}");
    let verified = lab.act(S3Act::Verify, &lab.fra, way).await?;
    // the copy that was kept beside is new there, and is brought too
    assert_eq!(findings(&verified).iter().map(|f| f.code.as_str()).collect::<Vec<_>>(), vec!["DC-0515"]);
    assert_eq!(lab.fra.get("logs/grown.dc-rome-e1.2").await?, b"before, and late");
    assert_eq!(lab.fra.get("logs/late").await?, b"late");
    assert_eq!(lab.rome.get("logs/grown.dc-rome-e1.2").await?, b"before, and late");
    assert_eq!(lab.rome.get("logs/grown").await?, b"before, and new");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_objects_and_odd_keys_arrive_whole() -> Res<()> {
    let lab = Lab::fresh().await?;
    let big: Vec<u8> =
        (0..20_u32 << 20).map(|n| u8::try_from(n.wrapping_mul(2_654_435_761) >> 24).unwrap_or(0)).collect();
    lab.rome.put("logs/big.bin", big.clone()).await?;
    let odd = [
        "logs/run_id=manual__2026-01-01T00:00:00+00:00/a b%20c.log",
        "logs/é/ü.log",
        "logs/a",
        "logs/a-b/c",
        "logs/a.b",
    ];
    for key in odd {
        lab.rome.put(key, key).await?;
        lab.fra.put(key, "of fra").await?;
    }
    lab.stand(&lab.fra, &lab.rome).await?;
    assert!(lab.fra.get("logs/big.bin").await? == big);
    for key in odd {
        assert_eq!(lab.fra.get(key).await?, key.as_bytes());
        assert_eq!(lab.fra.get(&format!("{key}.dc-fra-e1.1")).await?, b"of fra");
    }
    let again = lab.stand(&lab.fra, &lab.rome).await?;
    assert_eq!(again.change, Change::Already, "{}", again.seen);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_that_dies_leaves_only_what_nobody_refers_to() -> Res<()> {
    let mut lab = Lab::fresh().await?;
    let first = lab.publish(&[("a.py", "one")]).await?;
    let tree = tempfile::tempdir()?;
    for n in 0..200 {
        std::fs::write(tree.path().join(format!("{n}.py")), format!("dag {n}"))?;
    }
    for cut in [20, 60, 120] {
        let dead = lab.rome.releases.stage(tree.path(), Deadline::within(Duration::from_millis(cut))).await;
        let keys = lab.rome.list().await?;
        let manifests = keys.keys().filter(|k| k.contains("/tree/") || k.contains("/release/")).count();
        assert!(dead.is_ok() || manifests == 2, "{dead:?} left {manifests} manifests");
        lab.stand(&lab.fra, &lab.rome).await?;
        assert_eq!(lab.fra.current(), Some(first.version()));
    }
    let staged = lab.rome.releases.stage(tree.path(), soon()).await?;
    let again = lab.rome.releases.stage(tree.path(), soon()).await?;
    assert_eq!((staged.files, &staged.root, again.uploaded), (200, &again.root, 0));
    // committed, and the publisher dies before it seals: the holder's upkeep publishes, the standby needs no seal
    lab.release = Some(dc_core::position::DagRelease { serial: 2, root: staged.root });
    let began = Instant::now();
    lab.stand(&lab.fra, &lab.rome).await?;
    println!("200 files materialised at the standby in {:?}", began.elapsed());
    lab.twice(S3Act::Serve, &lab.rome, forward(&lab.rome, &lab.fra, 1)).await?;
    let version = lab.release.as_ref().map(dc_core::position::DagRelease::version);
    assert_eq!((lab.rome.current(), lab.fra.current()), (version.clone(), version));
    assert!(lab.rome.list().await?.keys().any(|k| k.starts_with("dags/dc/v1/release/000002-")));
    Ok(())
}

/// The child of the next test: brings the release it is told of, and may be killed at any moment.
#[tokio::test]
async fn child_that_is_killed() -> Res<()> {
    let (Ok(dir), Ok(root)) = (std::env::var("DC_TEST_CHILD_DIR"), std::env::var("DC_TEST_CHILD_ROOT"))
    else {
        return Ok(());
    };
    let spec = spec()?;
    let fra = support::side("fra", &spec, std::path::Path::new(&dir))?;
    let act = dc_core::act::Act {
        name: dc_core::act::ActName::S3(S3Act::Stand),
        site: fra.site.clone(),
        group: spec.name.clone(),
        run: None,
        source: dc_core::ids::SiteId::new("rome")?,
        target: fra.site.clone(),
        epoch: Epoch { incarnation: 1, counter: 1 },
        direction: Direction::Forward,
        given: vec![Outcome::Release(dc_core::position::DagRelease { serial: 2, root })],
    };
    fra.plane.perform(&act, &Authority::self_fence(), soon()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_while_materialising_never_shows_half_a_release() -> Res<()> {
    let mut lab = Lab::fresh().await?;
    let first = lab.publish(&[("a.py", "one")]).await?;
    lab.stand(&lab.fra, &lab.rome).await?;
    let files: Vec<(String, String)> =
        (0..150).map(|n| (format!("d{}/{n}.py", n % 9), format!("dag {n}"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    let second = lab.publish(&files).await?;
    let base = lab.fra.dir.parent().ok_or("no folder")?.to_path_buf();
    let mut killed = 0;
    for ms in [80_u64, 130, 180, 240, 320, 450, 650, 900] {
        let mut child = tokio::process::Command::new(std::env::current_exe()?)
            .args(["--exact", "child_that_is_killed"])
            .env("DC_TEST_CHILD_DIR", &base)
            .env("DC_TEST_CHILD_ROOT", &second.root)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        if let Err(_late) = tokio::time::timeout(Duration::from_millis(ms), child.wait()).await {
            child.kill().await?;
            killed += 1;
        }
        let current = lab.fra.current().ok_or("no current release")?;
        assert!(current == first.version() || current == second.version(), "{current}");
        let shown: &[(&str, &str)] = if current == first.version() { &[("a.py", "one")] } else { &files };
        for (path, text) in shown {
            let at = lab.fra.config.releases_dir.join("current").join(path);
            assert_eq!(std::fs::read_to_string(&at)?, *text, "{}", at.display());
        }
        let _ = std::fs::remove_dir_all(lab.fra.config.releases_dir.join(second.version()));
        if current == second.version() {
            // begin again from the first release, as far as a reader can tell
            let fresh = lab.fra.config.releases_dir.join(".back");
            std::os::unix::fs::symlink(first.version(), &fresh)?;
            std::fs::rename(fresh, lab.fra.config.releases_dir.join("current"))?;
        }
    }
    println!("killed {killed} of 8 in the middle");
    assert!(killed >= 2, "only {killed} were killed in the middle");
    lab.stand(&lab.fra, &lab.rome).await?;
    assert_eq!(lab.fra.current(), Some(second.version()));
    for (path, text) in &files {
        assert_eq!(std::fs::read_to_string(lab.fra.config.releases_dir.join("current").join(path))?, *text);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_names_every_fault_at_once_and_changes_nothing() -> Res<()> {
    let mut lab = Lab::fresh().await?;
    let way = forward(&lab.rome, &lab.fra, 2);
    lab.release = Some(dc_core::position::DagRelease { serial: 9, root: "ab".repeat(32) });
    // writers of the source shut out by hand, a stranger let in, the other site gone, a release nowhere
    let fence = lab.make(S3Act::FenceWriters, &lab.rome, way);
    lab.rome.plane.perform(&fence, &step(way.epoch), soon()).await?;
    let text = lab
        .rome
        .root
        .get_bucket_policy()
        .bucket("orders")
        .send()
        .await?
        .policy()
        .unwrap_or_default()
        .to_owned();
    let stranger = r#"{"Sid":"S","Effect":"Allow","Principal":{"AWS":["dcpull"]},"Action":["s3:PutObject"],"Resource":["arn:aws:s3:::orders/logs/*"]},"#;
    let more = text.replacen("\"Statement\":[", &format!("\"Statement\":[{stranger}"), 1);
    assert_ne!(more, text);
    lab.rome.root.put_bucket_policy().bucket("orders").policy(&more).send().await?;
    let mut config = lab.rome.config.clone();
    if let Some(fra) = config.sites.get_mut(&lab.fra.site) {
        fra.endpoint = "http://127.0.0.1:9".into();
    }
    let lame = dc_plane_s3::build(config, &lab.spec, lab.rome.site.clone(), lab.rome.dir.join("lame"))?;
    let act = lab.make(S3Act::Preflight, &lab.rome, way);
    let read = lame.perform(&act, &step(way.epoch), soon()).await?;
    let mut codes: Vec<_> = findings(&read).iter().filter(|f| f.blocking).map(|f| f.code.as_str()).collect();
    codes.sort_unstable();
    assert_eq!(codes, vec!["DC-0501", "DC-0504", "DC-0506", "DC-0507"], "{read:?}");
    let after = lab.rome.root.get_bucket_policy().bucket("orders").send().await?;
    assert_eq!(after.policy(), Some(more.as_str()));
    lab.rome.root.put_bucket_policy().bucket("orders").policy(&text).send().await?;
    lab.rome.plane.undo(&fence, &step(way.epoch), soon()).await?;
    Ok(())
}
