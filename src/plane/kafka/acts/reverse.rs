//! The mirror's turn: prepared stopped before the fence, started at exact offsets after the first write.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dc_core::act::{Act, Evidence, Outcome};
use dc_core::authority::Authority;
use dc_core::position::Grant;
use dc_plane::{Deadline, PlaneError, wait_until};

use crate::cluster::{Cluster, Tp, failed};
use crate::connect::Status;
use crate::log::{self, Print};
use crate::{Half, KafkaPlane, acl, canary, mirror, opening};

/// Records per partition that `verify` compares between the two sites behind the cut.
const COMPARED_MAX: i64 = 2_000;

const RESTART_EVERY: Duration = Duration::from_millis(500);

/// What to do with the positions of a connector that is to start behind `ends`.
#[derive(Debug, PartialEq, Eq)]
enum Start {
    /// They are right, or it has run on from there: nothing may be set back.
    Stands,
    /// It never ran: set them.
    Set,
    /// It ran from elsewhere.
    Wrong(String),
}

/// A connector with positions below the cut would carry records twice; one that has gone on must not be set back.
fn start(found: &BTreeMap<Tp, i64>, ends: &BTreeMap<Tp, i64>) -> Start {
    let wanted = |end: i64| (end > 0).then(|| end - 1);
    if let Some((tp, at)) = found.iter().find(|(tp, _)| !ends.contains_key(*tp)) {
        return Start::Wrong(format!("{}/{} at {at}, of which no end is known", tp.0, tp.1));
    }
    let low = ends.iter().find(|(tp, end)| found.get(*tp).is_some_and(|at| Some(*at) < wanted(**end)));
    if let Some((tp, end)) = low {
        return Start::Wrong(format!("{}/{} at {:?}, the cut is at {end}", tp.0, tp.1, found.get(tp)));
    }
    let absent = ends.iter().any(|(tp, end)| wanted(*end).is_some() && !found.contains_key(tp));
    let ran = found.iter().any(|(tp, at)| ends.get(tp).is_some_and(|end| wanted(*end) != Some(*at)));
    match (absent, ran) {
        (false, _) => Start::Stands,
        (true, false) => Start::Set,
        (true, true) => Start::Wrong("some partitions have gone on, others have no position".to_owned()),
    }
}

impl KafkaPlane {
    /// Name of the connector of this run's way back: group, direction and run, so that it was never used.
    fn reverse_name(&self, act: &Act) -> Result<String, PlaneError> {
        let Some(run) = &act.run else {
            return Err(failed("name the reverse mirror", "the act belongs to no run"));
        };
        Ok(format!("{}-{}-{}-{run}", self.group, act.target, act.source))
    }

    pub(super) async fn reverse_is_prepared(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let name = self.reverse_name(act)?;
        let status = self.source(act)?.workers.status(&name, until).await?;
        Ok(status.filter(Status::is_stopped).map(|status| {
            Evidence::already(format!("{name} stands at {}: {}", act.source, status.show()))
                .with(Outcome::Reverse(name))
        }))
    }

    pub(super) async fn prepare_reverse(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if let Some(stands) = self.reverse_is_prepared(act, until).await? {
            return Ok(stands);
        }
        let name = self.reverse_name(act)?;
        let (source, target) = (self.source(act)?, self.target(act)?);
        let forward = act.mirror().unwrap_or(&self.spec.mirror);
        let Some(settings) = target.workers.settings(forward, until).await? else {
            return Err(PlaneError::refused(
                "DC-0408",
                format!("there is no connector {forward} at {}", act.target),
            ));
        };
        let back = mirror::reversed(
            &settings,
            &self.carried(),
            &target.config.mirror_bootstrap,
            &source.config.bootstrap,
        );
        source.workers.create_stopped(&name, &back, until).await?;
        let status = source.workers.wait(&name, Status::is_stopped, "STOPPED without tasks", until).await?;
        let seen = format!("{name} created at {}: {}", act.source, status.show());
        Ok(Evidence::changed(seen).with(Outcome::Reverse(name)))
    }

    pub(super) async fn delete_reverse(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let name = self.reverse_name(act)?;
        let there = self.source(act)?.workers.delete(&name, until).await?;
        let seen = format!("there is no connector {name} at {}", act.source);
        Ok(if there { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    /// The forward mirror's end; none when the group's mirror is the reverse one by now.
    fn forward<'a>(&'a self, act: &'a Act) -> Option<&'a String> {
        let forward = act.mirror().unwrap_or(&self.spec.mirror);
        (act.reverse() != Some(forward)).then_some(forward)
    }

    pub(super) async fn forward_is_stopped(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let Some(forward) = self.forward(act) else {
            return Ok(Some(Evidence::already("the group's mirror is the reverse one")));
        };
        let status = self.target(act)?.workers.status(forward, until).await?;
        let gone = || Evidence::already(format!("{forward} is gone at {}", act.target));
        Ok(status.is_none().then(gone))
    }

    /// Stops the forward connector and removes it: its name is not used again.
    pub(super) async fn stop_forward(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if let Some(done) = self.forward_is_stopped(act, until).await? {
            return Ok(done);
        }
        let Some(forward) = self.forward(act) else { return Ok(Evidence::already("there is none")) };
        let workers = &self.target(act)?.workers;
        workers.stop(forward, until).await?;
        let status = workers.wait(forward, Status::is_stopped, "STOPPED without tasks", until).await?;
        workers.delete(forward, until).await?;
        Ok(Evidence::changed(format!("{forward} at {}: {}, then deleted", act.target, status.show())))
    }

    pub(super) async fn reverse_is_started(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let (half, name) = match act.direction {
            dc_core::act::Direction::Forward => (self.source(act)?, act.reverse()),
            dc_core::act::Direction::Return => (self.target(act)?, Some(self.first_mirror(act))),
        };
        let Some(name) = name else { return Ok(None) };
        let Some(status) = half.workers.status(name, until).await?.filter(Status::runs) else {
            return Ok(None);
        };
        let map = half.cluster.full_map(&self.carried(), until).await?;
        let everywhere = acl::read_everywhere(&half.cluster, &map, until).await?;
        let wanted = self.mirror_grants();
        let granted = everywhere.values().all(|bindings| {
            let known: Vec<&Grant> = acl::allowed(bindings).collect();
            wanted.iter().all(|grant| known.contains(&grant))
        });
        // On a return the connector runs all the time, so what it made of its connector's other half counts too.
        if !granted
            || (act.direction == dc_core::act::Direction::Return && self.reverse_is_there(act, until).await?)
        {
            return Ok(None);
        }
        let seen = format!("{name} at {}: {}, granted at every broker", half.cluster.site, status.show());
        Ok(Some(Evidence::already(seen).with(Outcome::Mirror(name.clone()))))
    }

    async fn reverse_is_there(&self, act: &Act, until: Deadline) -> Result<bool, PlaneError> {
        Ok(self.source(act)?.workers.status(&self.reverse_name(act)?, until).await?.is_some())
    }

    /// The mirror that carried the group when the run began.
    fn first_mirror<'a>(&'a self, act: &'a Act) -> &'a String {
        act.mirror().unwrap_or(&self.spec.mirror)
    }

    /// Starts the reverse connector behind the cut: positions set and read back, its WRITE given at the source, the
    /// consumers' READ on groups taken there, resumed, seen running.
    pub(super) async fn start_reverse(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        if let Some(done) = self.reverse_is_started(act, until).await? {
            return Ok(done);
        }
        let (Some(name), Some(ends)) = (act.reverse(), act.target_ends()) else {
            return Err(PlaneError::refused(
                "DC-0422",
                "no reverse mirror was prepared, or the cut is not known",
            ));
        };
        let ends = log::from_ends(ends);
        let half = self.source(act)?;
        let started = self.set_start(half, name, &ends, until).await?;
        if started == Start::Set {
            self.unmoved(act, half, until).await?;
        }
        let map = half.cluster.full_map(&self.carried(), until).await?;
        let (reads, grants) = (self.group_reads(act)?, self.mirror_grants());
        acl::take(&half.cluster, &reads, until).await?;
        acl::give(&half.cluster, &grants, until).await?;
        self.wait_given(&half.cluster, &map, &grants, until).await?;
        half.workers.resume(name, until).await?;
        let status = self.wait_running(half, name, until).await?;
        let (offset, _) = self.progress(self.target(act)?, half, name, until).await?;
        let seen = format!(
            "{name} at {}: {}, started behind the cut in {} partitions, canary record {offset} carried; {} group grants taken",
            act.source,
            status.show(),
            ends.len(),
            reads.len()
        );
        Ok(Evidence::changed(seen).with(Outcome::Mirror(name.clone())))
    }

    /// Recorded READ on groups: at a standby nobody may join one, or its positions could not be set.
    fn group_reads(&self, act: &Act) -> Result<Vec<Grant>, PlaneError> {
        Ok(self.recorded(act)?.iter().filter(|grant| grant.resource == "group").cloned().collect())
    }

    /// Sets the start of a connector that never ran. Repeat: safe, never set back.
    async fn set_start(
        &self,
        half: &Half,
        name: &str,
        ends: &BTreeMap<Tp, i64>,
        until: Deadline,
    ) -> Result<Start, PlaneError> {
        let found = half.workers.positions(name, until).await?;
        match start(&found, ends) {
            Start::Wrong(why) => {
                Err(PlaneError::refused("DC-0422", format!("{name} must not be started: {why}")))
            }
            Start::Stands if !found.is_empty() => Ok(Start::Stands),
            _ => {
                half.workers.wait(name, Status::is_stopped, "STOPPED without tasks", until).await?;
                let settings = half.workers.settings(name, until).await?.unwrap_or_default();
                let wanted = ends.iter().map(|(tp, end)| (tp.clone(), (*end > 0).then(|| end - 1))).collect();
                half.workers.set_positions(name, mirror::source_alias(&settings), &wanted, until).await?;
                Ok(Start::Set)
            }
        }
    }

    /// Ends of the old holder, last read before the mirror may write there: nobody wrote behind the fence.
    async fn unmoved(&self, act: &Act, half: &Half, until: Deadline) -> Result<(), PlaneError> {
        let carried = self.carried();
        let map = half.cluster.full_map(&carried, until).await?;
        let bindings = acl::read(&half.cluster, until).await?;
        if acl::allowed(&bindings).any(|grant| self.lets_mirror(grant)) {
            return Ok(()); // an earlier attempt came further: records may be the mirror's own
        }
        let now = log::to_ends(&log::settled(&half.cluster, &map, &carried, until).await?);
        match act.source_ends() {
            Some(before) if *before != now => {
                let what = super::drain::moved(before, &now);
                let why = format!("somebody wrote at {} behind the fence: {what}", act.source);
                Err(PlaneError::refused("DC-0418", why))
            }
            _ => Ok(()),
        }
    }

    /// Waits until a connector runs, starting again what has failed.
    async fn wait_running(&self, half: &Half, name: &str, until: Deadline) -> Result<Status, PlaneError> {
        let what = format!("{name} at {} to run", half.cluster.site);
        let status = wait_until(until, Duration::from_millis(100), &what, || async {
            let Some(status) = half.workers.status(name, until).await? else {
                return Err(failed("start the mirror", format!("{name} is gone")));
            };
            if status.has_failed() {
                half.workers.restart_failed(name, until).await?;
            }
            Ok(status.runs().then_some(status))
        })
        .await?;
        Ok(status)
    }

    /// The return's own: nothing was written at the target, so the forward mirror goes on where it is.
    pub(super) async fn go_on_forward(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        if let Some(done) = self.reverse_is_started(act, until).await? {
            return Ok(done);
        }
        let deleted = self.delete_reverse(act, until).await?;
        let given = self.unfence_mirror(act, by, until).await?;
        let name = self.first_mirror(act);
        let half = self.target(act)?;
        let status = self.wait_running(half, name, until).await?;
        let (offset, _) = self.progress(self.source(act)?, half, name, until).await?;
        let seen = format!(
            "{}; {}; {name}: {}, canary record {offset} carried",
            deleted.seen,
            given.seen,
            status.show()
        );
        Ok(Evidence::changed(seen).with(Outcome::Mirror(name.clone())))
    }

    /// A canary record written at the holder is readable at the standby, and what stands behind the cut at the old
    /// holder is nothing but what the mirror brought.
    pub(super) async fn verify(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let holder = self.half(act.new_holder())?;
        let other = if *act.new_holder() == act.target { &act.source } else { &act.target };
        let standby = self.half(other)?;
        let (offset, took) = self.progress(holder, standby, self.first_mirror(act), until).await?;
        let mut seen = format!(
            "canary record {offset} of {} is readable at {other} after {} ms",
            act.new_holder(),
            took.as_millis()
        );
        if act.direction == dc_core::act::Direction::Forward {
            seen.push_str(&self.compare_tails(act, until).await?);
        }
        Ok(Evidence::changed(seen))
    }

    /// Sees a canary record carried, starting the mirror's tasks again when they have failed.
    ///
    /// A task that wrote in the moment between two changes of grants dies of it, and its state says RUNNING for a
    /// while: only what is carried counts.
    async fn progress(
        &self,
        holder: &Half,
        standby: &Half,
        mirror: &str,
        until: Deadline,
    ) -> Result<(i64, Duration), PlaneError> {
        let restart = async {
            loop {
                tokio::time::sleep(RESTART_EVERY).await;
                let status = standby.workers.status(mirror, until).await;
                if status.is_ok_and(|s| s.is_some_and(|s| s.has_failed()))
                    && let Err(cause) = standby.workers.restart_failed(mirror, until).await
                {
                    tracing::warn!(%mirror, %cause, "a failed task was not started again");
                }
            }
        };
        tokio::select! {
            carried = self.carry_canary(&holder.cluster, &standby.cluster, until) => carried,
            () = restart => Err(failed("see the mirror's progress", "no record was carried")),
        }
    }

    /// Writes a canary record at the holder and waits until it is readable at the standby.
    pub(super) async fn carry_canary(
        &self,
        holder: &Cluster,
        standby: &Cluster,
        until: Deadline,
    ) -> Result<(i64, Duration), PlaneError> {
        let topics = [self.canary_topic.as_str()].into();
        let (map, there) =
            futures::try_join!(holder.full_map(&topics, until), standby.full_map(&topics, until))?;
        let from = log::ends(standby, &there, &topics, log::End::Stable, until).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let tp = (self.canary_topic.clone(), 0);
        let began = tokio::time::Instant::now();
        let told = format!("{} {} {now}", self.group, holder.site);
        let offset = canary::tell(holder, &map, &self.canary_topic, &told, until).await?;
        let written = BTreeMap::from([(tp.clone(), (offset, offset + 1))]);
        let print = log::prints(holder, &map, &written, 1, until).await?;
        let Some(print) = print.get(&tp).and_then(|all| all.first()) else {
            return Err(failed(
                "read the canary record",
                format!("{offset} is not readable at {}", holder.site),
            ));
        };
        let start = from.get(&tp).copied().unwrap_or(0);
        log::wait_readable(standby, &there, &tp, print.of, start, until).await?;
        Ok((offset, began.elapsed()))
    }

    /// Compares what follows the cut at both sites: the old holder's must be the beginning of the new one's.
    async fn compare_tails(&self, act: &Act, until: Deadline) -> Result<String, PlaneError> {
        let (Some(source_ends), Some(target_ends)) = (act.source_ends(), act.target_ends()) else {
            return Ok(String::new());
        };
        let carried = self.carried();
        let (source, target) = (&self.source(act)?.cluster, &self.target(act)?.cluster);
        let (source_map, target_map) =
            futures::try_join!(source.full_map(&carried, until), target.full_map(&carried, until))?;
        let (now_s, now_t) = futures::try_join!(
            log::ends(source, &source_map, &carried, log::End::Stable, until),
            log::ends(target, &target_map, &carried, log::End::Stable, until)
        )?;
        let ranges = |cut: BTreeMap<Tp, i64>, now: BTreeMap<Tp, i64>| -> BTreeMap<Tp, (i64, i64)> {
            let bound = |from: i64, to: i64| (from, to.min(from + COMPARED_MAX));
            cut.into_iter().filter_map(|(tp, from)| Some((tp.clone(), bound(from, *now.get(&tp)?)))).collect()
        };
        let (here, there) =
            (ranges(log::from_ends(source_ends), now_s), ranges(log::from_ends(target_ends), now_t));
        let (at_source, at_target) = futures::try_join!(
            log::prints(source, &source_map, &here, usize::MAX, until),
            log::prints(target, &target_map, &there, usize::MAX, until)
        )?;
        let mut compared = 0;
        for (tp, here) in &at_source {
            let there: &[Print] = at_target.get(tp).map_or(&[], Vec::as_slice);
            let same = here.iter().zip(there).take_while(|(a, b)| a.of == b.of).count();
            if same < here.len().min(there.len()) {
                let why = format!(
                    "{}/{}: record {} behind the cut at {} is not what {} holds there",
                    tp.0, tp.1, here[same].offset, act.source, act.target
                );
                return Err(PlaneError::refused("DC-0418", why));
            }
            compared += same;
        }
        Ok(format!("; {compared} records behind the cut at {} are those of {}", act.source, act.target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rows: &[(i32, i64)]) -> BTreeMap<Tp, i64> {
        rows.iter().map(|(p, o)| (("t".to_owned(), *p), *o)).collect()
    }

    #[test]
    fn a_connector_that_never_ran_is_set_and_one_that_went_on_never_set_back() {
        let ends = at(&[(0, 10), (1, 0), (2, 5)]);
        assert_eq!(start(&at(&[]), &ends), Start::Set);
        assert_eq!(start(&at(&[(0, 9)]), &ends), Start::Set);
        assert_eq!(start(&at(&[(0, 9), (2, 4)]), &ends), Start::Stands);
        assert_eq!(start(&at(&[(0, 12), (1, 3), (2, 4)]), &ends), Start::Stands);
        assert_eq!(start(&at(&[]), &at(&[(1, 0)])), Start::Stands);
    }

    #[test]
    fn refuses_a_start_below_the_cut_or_of_unknown_partitions() {
        let ends = at(&[(0, 10), (2, 5)]);
        assert!(matches!(start(&at(&[(0, 8), (2, 4)]), &ends), Start::Wrong(_)));
        assert!(matches!(start(&at(&[(7, 8)]), &ends), Start::Wrong(_)));
        assert!(matches!(start(&at(&[(0, 11)]), &ends), Start::Wrong(_)), "half of it ran from elsewhere");
    }
}
