//! What each act does to the fakes, piece by piece, and what takes it back.

use dc_core::act::{Act, ActName, AirflowAct, Evidence, Finding, KafkaAct, Outcome, PostgresAct, S3Act};
use dc_core::codes::Code;
use dc_core::ids::{PlaneKind, SiteId};
use dc_core::position::{Ends, Lsn, Position, ShutdownToken};

use super::Piece;
use super::state::{Group, Here, Sin};
use crate::PlaneError;

const SYSTEM: u64 = 7;

/// Whether an act lets writers in.
pub(super) fn opens(act: ActName) -> bool {
    use AirflowAct::{OpenApi, StartWriters};
    matches!(
        act,
        ActName::Postgres(PostgresAct::Open | PostgresAct::Serve)
            | ActName::Kafka(KafkaAct::GrantApps)
            | ActName::S3(S3Act::OpenWriters)
            | ActName::Airflow(StartWriters | OpenApi | AirflowAct::Serve)
    )
}

/// Whether taking an act back lets writers in.
pub(super) fn undo_opens(act: &Act) -> bool {
    act.site == act.source && (fences(act.name) || closes(act.name))
}

fn fences(act: ActName) -> bool {
    use AirflowAct::{CloseApi, ProveGone, Quiesce};
    matches!(
        act,
        ActName::Postgres(PostgresAct::FenceClients | PostgresAct::Stop)
            | ActName::Kafka(KafkaAct::FenceApps | KafkaAct::FenceMirror)
            | ActName::S3(S3Act::FenceWriters)
            | ActName::Airflow(Quiesce | ProveGone | CloseApi)
    )
}

fn closes(act: ActName) -> bool {
    matches!(
        act,
        ActName::Postgres(PostgresAct::SelfClose)
            | ActName::Kafka(KafkaAct::SelfClose)
            | ActName::S3(S3Act::SelfClose)
            | ActName::Airflow(AirflowAct::SelfClose)
    )
}

fn failed(act: &Act, why: impl Into<String>) -> PlaneError {
    PlaneError::Failed { what: act.name.to_string(), why: why.into() }
}

fn changed(act: &Act) -> Evidence {
    Evidence::changed(format!("{} done at {}", act.name, act.site))
}

impl Group {
    fn at(&mut self, act: &Act) -> &mut Here {
        let plane = act.name.plane().unwrap_or(PlaneKind::Postgres);
        self.here(&act.site, plane)
    }

    /// What proves that the work of an act stands; none where it has to be done, or only reads.
    pub(super) fn stands(&mut self, act: &Act) -> Option<Evidence> {
        let sinful = self.sins.contains(&Sin::FenceRecordsGrants);
        let here = self.at(act);
        let stands = match act.name {
            ActName::Kafka(KafkaAct::FenceApps) if sinful => false,
            name if fences(name) => here.shut.contains(&name),
            name if closes(name) => here.closed,
            ActName::Postgres(PostgresAct::Open) => here.door && here.primary && here.running,
            ActName::Postgres(PostgresAct::Promote) => here.primary && here.running,
            ActName::Kafka(KafkaAct::PrepareReverse) => here.reverse.is_some(),
            ActName::Kafka(KafkaAct::GrantApps) => here.door && !here.grants.is_empty(),
            ActName::Airflow(AirflowAct::RerunPolicy) => here.policy,
            ActName::Airflow(AirflowAct::StartWriters) => here.running,
            ActName::S3(S3Act::OpenWriters) | ActName::Airflow(AirflowAct::OpenApi) => here.door,
            _ => false,
        };
        if !stands {
            return None;
        }
        let seen = Evidence::already(format!("{} stands at {}", act.name, act.site));
        Some(self.brought(act, seen))
    }

    /// One piece of an act.
    pub(super) fn work(&mut self, act: &Act, piece: u32) -> Result<Piece, PlaneError> {
        match act.name {
            ActName::Postgres(name) => self.postgres(act, name, piece),
            ActName::Kafka(name) => self.kafka(act, name, piece),
            ActName::S3(name) => Ok(self.s3(act, name)),
            ActName::Airflow(name) => self.airflow(act, name),
            ActName::Quorum(_) => Err(failed(act, "is an entry of the log")),
        }
    }

    fn done(&mut self, act: &Act) -> Piece {
        Piece::Done(self.brought(act, changed(act)))
    }

    /// The evidence of an act with what later acts need of it.
    fn brought(&mut self, act: &Act, seen: Evidence) -> Evidence {
        let many = self.at(act).kept.len() as u64;
        let timeline = self.at(act).timeline;
        let ends = Ends::from([(act.group.to_string(), [(0, i64::try_from(many).unwrap_or(0))].into())]);
        match act.name {
            ActName::Postgres(PostgresAct::Stop) => {
                let token = ShutdownToken { system_id: SYSTEM, timeline, checkpoint: Lsn(many) };
                seen.with(Outcome::Shutdown(token))
            }
            ActName::Postgres(PostgresAct::Promote) => seen.with(Outcome::Timeline(timeline)),
            ActName::Kafka(KafkaAct::PrepareReverse) => {
                let name = self.at(act).reverse.clone().unwrap_or_default();
                seen.with(Outcome::Reverse(name))
            }
            ActName::Kafka(KafkaAct::FenceMirror) => seen.with(Outcome::TargetEnds(ends)),
            ActName::Airflow(AirflowAct::CloseApi) => {
                seen.with(Outcome::Position(Position::Airflow { open_tasks: 0 }))
            }
            _ => seen,
        }
    }

    fn read(&mut self, act: &Act, plane: PlaneKind) -> Piece {
        let mut seen = changed(act);
        if plane == PlaneKind::Postgres {
            seen = seen.with(Outcome::Timeline(self.at(act).timeline));
        }
        let broken = self.links.get(&plane).is_some_and(|l| !l.up || !l.on);
        if broken && act.site == act.target {
            let text = format!("{plane} at {} does not follow {}", act.target, act.source);
            let code = Code::LAG_ABOVE_LIMIT.as_str().to_owned();
            let found = Finding { code, plane: Some(plane), site: act.site.clone(), blocking: true, text };
            seen = seen.with(Outcome::Findings(vec![found]));
        }
        Piece::Done(seen)
    }

    /// Whether the follower has everything; its own claim is believed only by a sinner.
    fn caught_up(&self, plane: PlaneKind) -> bool {
        self.sins.contains(&Sin::DrainWithoutLooking) || self.lag(plane) == Some(0)
    }

    fn turn(&mut self, plane: PlaneKind, from: &SiteId, to: &SiteId) {
        if let Some(link) = self.links.get_mut(&plane) {
            (link.from, link.to, link.on) = (from.clone(), to.clone(), true);
        }
    }

    fn postgres(&mut self, act: &Act, name: PostgresAct, piece: u32) -> Result<Piece, PlaneError> {
        let plane = PlaneKind::Postgres;
        let up = self.links.get(&plane).is_some_and(|l| l.up && l.on);
        match name {
            PostgresAct::Preflight | PostgresAct::Recheck => return Ok(self.read(act, plane)),
            PostgresAct::PreSync if !up => return Err(failed(act, "the target does not stream")),
            PostgresAct::PreSync => self.at(act).sync = true,
            PostgresAct::FenceClients if piece == 0 => {
                self.at(act).door = false;
                return Ok(Piece::More);
            }
            PostgresAct::FenceClients => {
                self.at(act).shut.insert(act.name);
            }
            PostgresAct::Stop if up && !self.caught_up(plane) => return Ok(Piece::Again),
            PostgresAct::Stop => {
                let here = self.at(act);
                (here.running, here.sync) = (false, false);
                here.shut.insert(act.name);
            }
            PostgresAct::Replayed => return self.replayed(act),
            PostgresAct::Promote => return self.promote(act),
            PostgresAct::Open | PostgresAct::Serve => {
                let here = self.at(act);
                if !here.primary {
                    return Err(failed(act, "is no primary"));
                }
                (here.running, here.door) = (true, true);
                here.shut.clear();
            }
            PostgresAct::Follow => self.follow(act),
            PostgresAct::SelfClose => {
                let here = self.at(act);
                (here.running, here.closed) = (false, true);
            }
            PostgresAct::Checkpoint | PostgresAct::Verify | PostgresAct::Stand => {}
        }
        Ok(self.done(act))
    }

    fn replayed(&mut self, act: &Act) -> Result<Piece, PlaneError> {
        let Some(token) = act.shutdown().cloned() else { return Err(failed(act, "no token was given")) };
        let replayed = Lsn(self.at(act).kept.len() as u64);
        if replayed < token.checkpoint && !self.sins.contains(&Sin::DrainWithoutLooking) {
            return Ok(Piece::Again);
        }
        let position = Outcome::Position(Position::Postgres { token, replayed });
        Ok(Piece::Done(changed(act).with(position)))
    }

    fn promote(&mut self, act: &Act) -> Result<Piece, PlaneError> {
        let Some(set) = act.timelines().copied() else { return Err(failed(act, "no timelines were given")) };
        let back = act.new_holder() == &act.source;
        let here = self.at(act);
        (here.running, here.primary) = (true, true);
        here.timeline = if back { set.back } else { set.target };
        if let Some(link) = self.links.get_mut(&PlaneKind::Postgres) {
            link.on = false;
        }
        Ok(self.done(act))
    }

    fn follow(&mut self, act: &Act) {
        let new = act.new_holder().clone();
        let theirs = self.here(&new, PlaneKind::Postgres).clone();
        let here = self.at(act);
        here.kept.retain(|write| theirs.kept.contains(write));
        (here.running, here.primary, here.door, here.sync) = (true, false, false, false);
        here.timeline = theirs.timeline;
        self.turn(PlaneKind::Postgres, &new, &act.site);
    }

    fn kafka(&mut self, act: &Act, name: KafkaAct, piece: u32) -> Result<Piece, PlaneError> {
        let plane = PlaneKind::Kafka;
        match name {
            KafkaAct::Preflight | KafkaAct::Recheck => return Ok(self.read(act, plane)),
            KafkaAct::PrepareReverse => {
                let run = act.run.as_ref().map(ToString::to_string).unwrap_or_default();
                self.at(act).reverse = Some(format!("{}-{run}", act.group));
            }
            KafkaAct::RecordGrants => {
                let grants = self.at(act).grants.iter().cloned().collect();
                return Ok(Piece::Done(changed(act).with(Outcome::Grants(grants))));
            }
            KafkaAct::FenceApps if piece == 0 => {
                self.at(act).door = false;
                return Ok(Piece::More);
            }
            KafkaAct::FenceApps => return Ok(self.fence_apps(act)),
            KafkaAct::Drain => {
                if !self.caught_up(plane) {
                    return Ok(Piece::Again);
                }
                let many = self.here(&act.source, plane).kept.len();
                let ends = [(0, i64::try_from(many).unwrap_or(0))].into();
                let ends = Ends::from([(act.group.to_string(), ends)]);
                return Ok(Piece::Done(changed(act).with(Outcome::SourceEnds(ends))));
            }
            KafkaAct::FenceMirror => {
                let here = self.at(act);
                here.fed = false;
                here.shut.insert(act.name);
            }
            KafkaAct::SetOffsets => {
                let (Some(source), Some(target)) = (act.source_ends().cloned(), act.target_ends().cloned())
                else {
                    return Err(failed(act, "no ends were given"));
                };
                let position = Outcome::Position(Position::Kafka { source, target });
                return Ok(Piece::Done(changed(act).with(position)));
            }
            KafkaAct::GrantApps => {
                let Some(grants) = act.grants().cloned() else { return Err(failed(act, "no grants")) };
                let here = self.at(act);
                here.grants.extend(grants);
                (here.door, here.fed) = (true, false);
                here.shut.clear();
            }
            KafkaAct::StartReverse => return Ok(self.start_reverse(act)),
            KafkaAct::SelfClose => self.at(act).closed = true,
            KafkaAct::StopForward | KafkaAct::Verify | KafkaAct::Stand | KafkaAct::Serve => {}
        }
        Ok(self.done(act))
    }

    fn fence_apps(&mut self, act: &Act) -> Piece {
        let sinful = self.sins.contains(&Sin::FenceRecordsGrants);
        let here = self.at(act);
        let taken = std::mem::take(&mut here.grants);
        here.shut.insert(act.name);
        if sinful {
            let again = Outcome::Grants(taken.into_iter().collect());
            return Piece::Done(changed(act).with(again));
        }
        self.done(act)
    }

    fn start_reverse(&mut self, act: &Act) -> Piece {
        let new = act.new_holder().clone();
        let here = self.at(act);
        (here.fed, here.door) = (true, false);
        let own = here.reverse.take();
        self.turn(PlaneKind::Kafka, &new, &act.site);
        let mirror = own.or_else(|| act.mirror().cloned()).unwrap_or_default();
        Piece::Done(changed(act).with(Outcome::Mirror(mirror)))
    }

    fn s3(&mut self, act: &Act, name: S3Act) -> Piece {
        let plane = PlaneKind::S3;
        match name {
            S3Act::Preflight | S3Act::Recheck => return self.read(act, plane),
            S3Act::CatchUp if self.lag(plane).is_none_or(|lag| lag > 20) => return Piece::Again,
            S3Act::FenceWriters => {
                let here = self.at(act);
                here.door = false;
                here.shut.insert(act.name);
            }
            S3Act::LastPass => {
                if !self.caught_up(plane) {
                    return Piece::Again;
                }
                let position = Position::S3 { release: act.release().cloned(), logs: 0 };
                return Piece::Done(changed(act).with(Outcome::Position(position)));
            }
            S3Act::OpenWriters => {
                let here = self.at(act);
                here.door = true;
                here.shut.clear();
            }
            S3Act::PullReverse => {
                let new = if act.site == act.source { act.target.clone() } else { act.source.clone() };
                self.at(act).door = false;
                self.turn(plane, &new, &act.site);
            }
            S3Act::SelfClose => self.at(act).closed = true,
            S3Act::CatchUp | S3Act::LatePass | S3Act::Verify | S3Act::Stand | S3Act::Serve => {}
        }
        self.done(act)
    }

    fn airflow(&mut self, act: &Act, name: AirflowAct) -> Result<Piece, PlaneError> {
        let here = self.at(act);
        match name {
            AirflowAct::Preflight | AirflowAct::Recheck => return Ok(self.read(act, PlaneKind::Airflow)),
            AirflowAct::Quiesce | AirflowAct::ProveGone => {
                here.running = false;
                here.policy = false;
                here.shut.insert(act.name);
            }
            AirflowAct::CloseApi => {
                here.door = false;
                here.shut.insert(act.name);
            }
            AirflowAct::RerunPolicy => here.policy = true,
            AirflowAct::StartWriters if !here.policy => {
                return Err(failed(act, "open tasks were not treated by policy"));
            }
            AirflowAct::StartWriters | AirflowAct::Serve => {
                here.running = true;
                here.shut.clear();
            }
            AirflowAct::OpenApi => here.door = true,
            AirflowAct::SelfClose => here.closed = true,
            AirflowAct::WarmApi
            | AirflowAct::UploadTaskLogs
            | AirflowAct::WarmStandby
            | AirflowAct::Verify
            | AirflowAct::Stand => {}
        }
        Ok(self.done(act))
    }

    /// Takes an act back, however far it came.
    pub(super) fn take_back(&mut self, act: &Act) -> Result<Evidence, PlaneError> {
        let source = act.site == act.source;
        let here = self.at(act);
        match act.name {
            ActName::Postgres(PostgresAct::SelfClose) => (here.running, here.closed) = (true, false),
            name if closes(name) => here.closed = false,
            ActName::Postgres(PostgresAct::FenceClients) if source => {
                (here.running, here.door) = (true, true);
            }
            ActName::Postgres(PostgresAct::PreSync) => here.sync = false,
            ActName::Postgres(PostgresAct::Stop) => here.running = true,
            ActName::Kafka(KafkaAct::PrepareReverse) => here.reverse = None,
            ActName::Kafka(KafkaAct::FenceApps) => {
                let Some(grants) = act.grants() else { return Err(failed(act, "no grants were recorded")) };
                here.grants = grants.iter().cloned().collect();
                here.door = true;
            }
            ActName::Kafka(KafkaAct::FenceMirror) => here.fed = true,
            ActName::Postgres(PostgresAct::FenceClients)
            | ActName::S3(S3Act::FenceWriters)
            | ActName::Airflow(AirflowAct::CloseApi) => here.door = source,
            ActName::Airflow(AirflowAct::Quiesce | AirflowAct::ProveGone) => here.running = source,
            _ => {}
        }
        here.shut.remove(&act.name);
        Ok(Evidence::changed(format!("{} taken back at {}", act.name, act.site)))
    }
}
