//! The driver against two real instances, under clients that never stop trying to commit.
//!
//! Needs a world: `dc-lab parts up --planes postgres --name NAME --delay 0`, then
//! `DC_LAB_WORLD=... cargo test -p dc-plane-postgres --features live`. Started as root, each test runs itself again as
//! the world's own user, as an agent would.

mod pair;

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dc_core::act::PostgresAct as P;
use dc_core::authority::Authority;
use dc_core::ids::SiteId;
use dc_plane::{Deadline, Depth, PlaneError, Role, suite};
use tokio::time::Instant;

use pair::{Load, Pair, Run, ms};

/// One world, one test at a time.
static ONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// Runs a test's body on this thread, or the whole test again as the world's user.
fn as_owner<F: Future<Output = Result<()>>>(name: &str, body: impl FnOnce() -> F) -> Result<()> {
    let _one = ONE.lock();
    let root = pair::root()?;
    if let Some((uid, gid)) = pair::owner(&root)? {
        let copy = root.join("bin/postgres-live-test");
        std::fs::copy(std::env::current_exe()?, &copy)?;
        let mut again = Command::new(&copy);
        again.args([name, "--exact", "--nocapture"]).uid(uid).gid(gid).current_dir(&root);
        let ended = again.status().context("run the test as the world's user")?;
        ensure!(ended.success(), "{name} failed as user {uid}");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        Pair::open()?.heal().await?;
        body().await
    })
}

/// Runs and moves once; returns the outage that clients saw.
async fn moved(twice: bool) -> Result<Duration> {
    let mut run = Run::new(Pair::open()?).await?;
    run.twice = twice;
    let (source, target) = (run.source.clone(), run.target.clone());
    println!("{source} -> {target}, each act twice: {twice}");
    let load = Load::start(&source, 4).await?;
    run.prepare().await?;
    let since = Instant::now();
    run.fence().await?;
    run.finish().await?;
    load.more_acks(&target, 50).await?;
    let outage = load.outage(&source, &target, since)?;
    let rows = load.end(&target).await?;
    println!("  outage {:.0} ms, {rows} rows acknowledged, 0 lost", ms(outage));
    Ok(outage)
}

#[test]
fn moves_there_and_back_and_loses_nothing_with_every_act_twice() -> Result<()> {
    as_owner("moves_there_and_back_and_loses_nothing_with_every_act_twice", || async {
        moved(true).await?;
        moved(true).await?;
        Ok(())
    })
}

#[test]
fn the_outage_is_measured_over_moves() -> Result<()> {
    as_owner("the_outage_is_measured_over_moves", || async {
        let mut seen = Vec::new();
        for _ in 0..6 {
            seen.push(ms(moved(false).await?));
        }
        seen.sort_by(f64::total_cmp);
        println!("outage of {} moves, ms: median {:.0}, all {seen:.0?}", seen.len(), seen[seen.len() / 2]);
        Ok(())
    })
}

#[test]
fn undo_at_every_fencing_act_lets_the_old_site_serve_again() -> Result<()> {
    as_owner("undo_at_every_fencing_act_lets_the_old_site_serve_again", || async {
        for upto in 1..=4 {
            let mut run = Run::new(Pair::open()?).await?;
            let source = run.source.clone();
            let load = Load::start(&source, 4).await?;
            run.prepare().await?;
            let acts: Vec<(P, SiteId)> = run.fencing().into_iter().take(upto).collect();
            println!("undo after {:?}", acts.last());
            for (name, at) in &acts {
                run.perform(*name, at).await?;
            }
            run.forget_drivers();
            for (name, at) in acts.iter().rev() {
                run.undo(*name, at).await?;
                let (act, driver) = (run.act(*name, at), run.driver(at)?);
                suite::undoes(driver.as_ref(), &act, &run.authority(), Duration::from_secs(30)).await?;
            }
            run.undo(P::Checkpoint, &run.target.clone()).await?;
            load.more_acks(&source, 50).await?;
            ensure!(run.pair.direction().await?.0 == source, "the holder changed");
            let admin = run.pair.superuser(&source).await?;
            let names: String = admin.query_one("show synchronous_standby_names", &[]).await?.get(0);
            ensure!(names.is_empty(), "synchronous names are left: {names}");
            load.end(&source).await?;
        }
        moved(false).await.map(|_| ())
    })
}

/// Points the standby at a port where nobody listens, or back again.
async fn cut(run: &Run, broken: bool) -> Result<()> {
    let target = run.pair.superuser(&run.target).await?;
    let source = run.pair.superuser(&run.source).await?;
    let now: String = target.query_one("show primary_conninfo", &[]).await?.get(0);
    let real = run.pair.config(&run.target)?.sites[&run.source].port;
    let (real, dead) = (format!("port='{real}'"), "port='1'".to_owned());
    let next = if broken { now.replace(&real, &dead) } else { now.replace(&dead, &real) };
    target
        .batch_execute(&format!("alter system set primary_conninfo = '{}'", next.replace('\'', "''")))
        .await?;
    target.batch_execute("select pg_reload_conf()").await?;
    source.batch_execute("select pg_terminate_backend(pid) from pg_stat_replication").await?;
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let streams: i64 = source
            .query_one("select count(*) from pg_stat_replication where state = 'streaming'", &[])
            .await?
            .get(0);
        if (streams == 0) == broken {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the link did not become {}", if broken { "broken" } else { "whole" });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn refuses_over_a_broken_link_and_the_source_never_stops() -> Result<()> {
    as_owner("refuses_over_a_broken_link_and_the_source_never_stops", || async {
        let mut run = Run::new(Pair::open()?).await?;
        let (source, target) = (run.source.clone(), run.target.clone());
        let load = Load::start(&source, 2).await?;
        cut(&run, true).await?;
        for (site, act) in
            [(&source, P::Preflight), (&target, P::Preflight), (&source, P::Recheck), (&target, P::Recheck)]
        {
            let evidence = run.perform(act, site).await?;
            let codes: Vec<_> = evidence.blocking().map(|f| f.code.clone()).collect();
            ensure!(codes.iter().any(|c| c == "DC-0305"), "{site} found {codes:?}");
        }
        for act in [P::PreSync, P::Stop] {
            let refused = run.perform(act, &source).await;
            ensure!(
                matches!(&refused, Err(PlaneError::Refused { code, .. }) if code == "DC-0305"),
                "{act:?}: {refused:?}"
            );
            load.more_acks(&source, 20).await?;
        }
        cut(&run, false).await?;
        load.end(&source).await?;
        moved(false).await.map(|_| ())
    })
}

#[test]
fn a_frozen_target_costs_a_refusal_and_no_row() -> Result<()> {
    as_owner("a_frozen_target_costs_a_refusal_and_no_row", || async {
        let mut run = Run::new(Pair::open()?).await?;
        let (source, target) = (run.source.clone(), run.target.clone());
        let load = Load::start(&source, 2).await?;
        run.prepare().await?;
        let admin = run.pair.superuser(&target).await?;
        let receiver: i32 = admin.query_one("select pid from pg_stat_wal_receiver", &[]).await?.get(0);
        let receiver = rustix::process::Pid::from_raw(receiver).context("no receiver")?;
        rustix::process::kill_process(receiver, rustix::process::Signal::STOP)?;
        let begun = Instant::now();
        // the server still calls it sync: its last word was good. The stop then meets its own deadline.
        let synced = run.perform(P::PreSync, &source).await;
        let stopped = run.perform(P::Stop, &source).await;
        println!("  {synced:?}, {stopped:?} after {:.0} ms", ms(begun.elapsed()));
        let late = matches!(&stopped, Err(PlaneError::Refused { code, .. }) if code == "DC-0324");
        rustix::process::kill_process(receiver, rustix::process::Signal::CONT)?;
        ensure!(late, "the stop did not meet its deadline: {stopped:?}");
        for act in [P::Stop, P::PreSync, P::FenceClients] {
            run.undo(act, &source).await?;
        }
        load.more_acks(&source, 20).await?;
        load.end(&source).await?;
        run.undo(P::Checkpoint, &target).await?;
        wait_stream(&run.pair, &source).await?;
        moved(false).await.map(|_| ())
    })
}

async fn wait_stream(pair: &Pair, primary: &SiteId) -> Result<()> {
    let admin = pair.superuser(primary).await?;
    let end = Instant::now() + Duration::from_secs(30);
    let sql = "select count(*) from pg_stat_replication where state = 'streaming'";
    while admin.query_one(sql, &[]).await?.get::<_, i64>(0) == 0 {
        ensure!(Instant::now() < end, "the standby does not stream again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[test]
fn a_driver_that_dies_within_an_act_is_replaced_by_one_that_ends_it() -> Result<()> {
    as_owner("a_driver_that_dies_within_an_act_is_replaced_by_one_that_ends_it", || async {
        for after in [1, 6, 25, 90] {
            let mut run = Run::new(Pair::open()?).await?;
            run.forget_drivers();
            let (source, target) = (run.source.clone(), run.target.clone());
            println!("drivers die after {after} ms, {source} -> {target}");
            let load = Load::start(&source, 4).await?;
            run.prepare().await?;
            let mut acts = run.fencing();
            acts.extend([
                (P::Replayed, target.clone()),
                (P::Promote, target.clone()),
                (P::Open, target.clone()),
                (P::Follow, source.clone()),
                (P::Verify, target.clone()),
            ]);
            for (name, at) in acts {
                for _ in 0..3 {
                    let act = run.act(name, &at);
                    let (driver, by) = (run.driver(&at)?, run.authority());
                    let work = driver.perform(&act, &by, Deadline::within(Duration::from_mins(1)));
                    // dropped in the middle: nothing of this driver goes on
                    let _ = tokio::time::timeout(Duration::from_millis(after), work).await;
                }
                run.perform(name, &at).await?;
            }
            load.more_acks(&target, 50).await?;
            load.end(&target).await?;
        }
        Ok(())
    })
}

#[test]
fn a_run_returns_before_it_opened_and_loses_nothing() -> Result<()> {
    as_owner("a_run_returns_before_it_opened_and_loses_nothing", || async {
        for promoted in [true, false] {
            let mut run = Run::new(Pair::open()?).await?;
            let (source, target) = (run.source.clone(), run.target.clone());
            println!("return to {source}, {target} promoted: {promoted}");
            let load = Load::start(&source, 4).await?;
            run.prepare().await?;
            run.fence().await?;
            if promoted {
                run.perform(P::Promote, &target).await?;
            }
            run.turn_back();
            run.twice = true;
            run.finish().await?;
            load.more_acks(&source, 50).await?;
            ensure!(run.pair.direction().await?.0 == source, "the source does not hold it again");
            load.end(&source).await?;
        }
        moved(false).await.map(|_| ())
    })
}

#[test]
fn where_a_rewind_fails_a_new_base_backup_follows() -> Result<()> {
    as_owner("where_a_rewind_fails_a_new_base_backup_follows", || async {
        let mut run = Run::new(Pair::open()?).await?;
        let (source, target) = (run.source.clone(), run.target.clone());
        run.prepare().await?;
        run.fence().await?;
        run.perform(P::Promote, &target).await?;
        run.turn_back();
        run.perform(P::Promote, &source).await?;
        run.perform(P::Open, &source).await?;
        let mut config = run.pair.config(&target)?;
        let bin = std::env::temp_dir().join(format!("dcswitch-live-{}", std::process::id()));
        std::fs::create_dir_all(&bin)?;
        for tool in ["postgres", "pg_ctl", "pg_basebackup", "pg_controldata"] {
            std::os::unix::fs::symlink(config.bin_dir.join(tool), bin.join(tool))?;
        }
        std::os::unix::fs::symlink("/bin/false", bin.join("pg_rewind"))?;
        config.bin_dir.clone_from(&bin);
        let driver = run.pair.driver_with(&target, config)?;
        let act = run.act(P::Follow, &target);
        let evidence =
            driver.perform(&act, &run.authority(), Deadline::within(Duration::from_secs(90))).await;
        std::fs::remove_dir_all(&bin)?;
        let evidence = evidence?;
        println!("  {}", evidence.seen);
        ensure!(evidence.seen.starts_with("copied anew"), "{}", evidence.seen);
        run.perform(P::Verify, &source).await?;
        moved(false).await.map(|_| ())
    })
}

#[test]
fn upkeep_reopens_what_the_lease_closed_and_never_what_a_run_closed() -> Result<()> {
    as_owner("upkeep_reopens_what_the_lease_closed_and_never_what_a_run_closed", || async {
        let mut run = Run::new(Pair::open()?).await?;
        let (source, target) = (run.source.clone(), run.target.clone());
        let limit = || Deadline::within(Duration::from_secs(30));
        let load = Load::start(&source, 2).await?;
        let (holder, standby) = (run.pair.driver(&source)?, run.pair.driver(&target)?);
        let close = run.upkeep(P::SelfClose, &source, &source);
        let serve = run.upkeep(P::Serve, &source, &source);
        let stand = run.upkeep(P::Stand, &target, &source);
        let reopen = Authority::reopen(run.epoch());

        println!("  {}", holder.perform(&close, &Authority::self_fence(), limit()).await?.seen);
        ensure!(holder.observe(Depth::Shallow, limit()).await?.role == Some(Role::Down), "not down");
        let refused = holder.perform(&serve, &Authority::self_fence(), limit()).await;
        ensure!(refused.is_err(), "a self-fence opened: {refused:?}");
        println!("  {}", holder.undo(&close, &reopen, limit()).await?.seen);
        load.more_acks(&source, 20).await?;
        println!("  {}", holder.perform(&serve, &reopen, limit()).await?.seen);

        println!(
            "  {}",
            standby
                .perform(&run.upkeep(P::SelfClose, &target, &source), &Authority::self_fence(), limit())
                .await?
                .seen
        );
        println!("  {}", standby.perform(&stand, &Authority::self_fence(), limit()).await?.seen);
        let begun = Instant::now();
        println!(
            "  {}, {:.1} ms",
            standby.perform(&stand, &Authority::self_fence(), limit()).await?.seen,
            ms(begun.elapsed())
        );
        wait_stream(&run.pair, &source).await?;

        run.perform(P::PreSync, &source).await?;
        let left = holder.perform(&serve, &reopen, limit()).await?;
        let admin = run.pair.superuser(&source).await?;
        let names: String = admin.query_one("show synchronous_standby_names", &[]).await?.get(0);
        ensure!(!names.is_empty(), "serve took back what a run set: {}", left.seen);
        run.perform(P::FenceClients, &source).await?;
        let left = holder.perform(&serve, &reopen, limit()).await?;
        println!("  {}", left.seen);
        ensure!(
            holder.observe(Depth::Shallow, limit()).await?.role == Some(Role::Closed),
            "serve opened a run's fence"
        );
        let fresh = run.pair.driver(&source)?;
        fresh.perform(&serve, &reopen, limit()).await?;
        ensure!(
            fresh.observe(Depth::Shallow, limit()).await?.role == Some(Role::Closed),
            "a fresh driver opened it"
        );
        run.undo(P::FenceClients, &source).await?;
        run.undo(P::PreSync, &source).await?;
        load.more_acks(&source, 20).await?;
        load.end(&source).await?;
        Ok(())
    })
}

#[test]
fn an_observation_takes_milliseconds_and_knows_its_age() -> Result<()> {
    as_owner("an_observation_takes_milliseconds_and_knows_its_age", || async {
        let pair = Pair::open()?;
        let (holder, standby) = pair.direction().await?;
        let load = Load::start(&holder, 2).await?;
        for site in [&holder, &standby] {
            let driver = pair.driver(site)?;
            suite::observes(driver.as_ref(), Duration::from_secs(5)).await?;
            let mut seen = Vec::new();
            for _ in 0..20 {
                let begun = Instant::now();
                let facts = driver.observe(Depth::Shallow, Deadline::within(Duration::from_secs(2))).await?;
                seen.push(ms(begun.elapsed()));
                ensure!(facts.lag.is_none_or(|l| l.age_ms.is_some()), "a lag without age");
            }
            seen.sort_by(f64::total_cmp);
            let facts = driver.observe(Depth::Deep, Deadline::within(Duration::from_secs(2))).await?;
            println!("  {site}: {} ({:?}), median {:.1} ms", facts.summary, facts.lag, seen[10]);
        }
        load.end(&holder).await.map(|_| ())
    })
}
