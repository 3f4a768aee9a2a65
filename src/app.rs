//! The roof: builds an agent out of its rooms and runs it. With `config.rs` the only
//! place that names drivers; a new plane is one folder and one line here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dc_agent::control::Control;
use dc_agent::shelf::Drivers;
use dc_agent::{Agent, Parts};
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::registry::Registry;
use dc_core::spec::GroupSpec;
use dc_plane::Plane;
use dc_plane::releases::Releases;
use dc_quorum::{Engine, LogEngine, Options};
use dc_wire::pb::agent_server::AgentServer;
use dc_wire::tls::Tls;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;
use tracing::info;

use crate::config::Config;

/// Entries between two snapshots of the log.
const SNAPSHOT_EVERY: u64 = 5_000;
/// Of the whole stop; past it the process ends anyhow, which it may at any line.
const STOP: Duration = Duration::from_secs(10);

/// Runs the agent of a config file until SIGTERM or SIGINT.
///
/// Errors: what is wrong with config, files, addresses or the agent's own state.
pub async fn run(path: &Path) -> Result<(), Fail> {
    let config = Config::load(path)?;
    let times = config.times().map_err(|why| unexpected("profile", &why))?;
    let _mine = own(&config.data_dir)?;
    let tls = Arc::new(Tls::load(config.tls.clone())?);
    let grpc = bind(config.listen.grpc, "grpc").await?;
    let http = bind(config.listen.http, "http").await?;
    info!(site = %config.site, grpc = %config.listen.grpc, http = %config.listen.http, "listening");
    let engine = Engine::<Registry>::open(Options {
        site: config.site.clone(),
        peers: config.peers.clone(),
        data_dir: config.data_dir.clone(),
        profile: times,
        tls: tls.clone(),
        // Proposals are not relayed between sites yet: when rome and fra cannot see each other,
        // the witness is the one leader that both can reach.
        may_lead: true,
        snapshot_every: SNAPSHOT_EVERY,
        on_death: dc_quorum::abort(),
    })
    .await?;
    let quorum = engine.service();
    let engine: Arc<dyn LogEngine> = Arc::new(engine);
    let agent = Agent::new(Parts {
        site: config.site.clone(),
        data_dir: config.data_dir.clone(),
        voters: config.peers.clone(),
        profile: times,
        engine: engine.clone(),
        tls: tls.clone(),
        drivers: Arc::new(SiteDrivers(config)),
    })?;
    let control: Arc<dyn Control> = agent.clone();
    let routes = Routes::new(quorum)
        .add_service(AgentServer::new(agent.peer_service()))
        .add_service(dc_surface::grpc::control_service(control.clone()));
    serve(agent, engine, control, tls, routes, grpc, http).await
}

async fn serve(
    agent: Arc<Agent>,
    engine: Arc<dyn LogEngine>,
    control: Arc<dyn Control>,
    tls: Arc<Tls>,
    routes: Routes,
    grpc: TcpListener,
    http: TcpListener,
) -> Result<(), Fail> {
    let (stop, stopped) = watch::channel(false);
    let stopping = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone, which is a stop as well.
            let _gone = stopped.wait_for(|stop| *stop).await;
        }
    };
    let calls = tokio::spawn(dc_wire::link::serve(grpc, tls, routes, stopping()));
    let pages = axum::serve(http, dc_surface::http::router(control)).with_graceful_shutdown(stopping());
    let pages = tokio::spawn(async move { pages.await });
    let ended = agent.run(signal()).await;
    info!("stopping; the lease is left to its deadline");
    stop.send_replace(true);
    let closing = async {
        engine.shutdown().await;
        // Both were told to stop; what they answer now changes nothing.
        let _ended = tokio::join!(calls, pages);
    };
    if tokio::time::timeout(STOP, closing).await.is_err() {
        info!("not everything stopped in time; ending all the same");
    }
    ended.map_err(|which| unexpected("a loop of the agent ended", &which))
}

/// Waits for SIGTERM or SIGINT.
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut term) = signal(SignalKind::terminate()) else { return };
    let Ok(mut int) = signal(SignalKind::interrupt()) else { return };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

async fn bind(address: std::net::SocketAddr, what: &str) -> Result<TcpListener, Fail> {
    TcpListener::bind(address)
        .await
        .map_err(|cause| unexpected(&format!("listen for {what} on {address}"), &cause.to_string()))
}

/// Makes the data directory this process's alone, for as long as it lives.
fn own(data_dir: &Path) -> Result<std::fs::File, Fail> {
    use rustix::fs::{FlockOperation, flock};
    let what = format!("own {}", data_dir.display());
    std::fs::create_dir_all(data_dir).map_err(|cause| unexpected(&what, &cause.to_string()))?;
    let file = std::fs::File::create(data_dir.join("agent.lock"))
        .map_err(|cause| unexpected(&what, &cause.to_string()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| unexpected(&what, "another agent runs on it"))?;
    Ok(file)
}

fn unexpected(what: &str, why: &str) -> Fail {
    Fail::new(Code::from_text("DC-0002"), Exit::Unexpected, format!("agent not started: {what}"), why)
        .next("dc-switch config check FILE")
}

/// The drivers of one site, as its config names them.
struct SiteDrivers(Config);

impl Drivers for SiteDrivers {
    fn planes(&self, spec: &GroupSpec, data_dir: &Path) -> Result<Vec<Arc<dyn Plane>>, String> {
        let (config, site) = (&self.0, &self.0.site);
        let room = |plane: &str| -> PathBuf { data_dir.join(plane) };
        let mut planes = Vec::new();
        if let (Some(mine), true) = (&config.postgres, spec.postgres.is_some()) {
            let made = dc_plane_postgres::build(mine.clone(), spec, site.clone(), room("postgres"));
            planes.push(made.map_err(|e| e.to_string())?);
        }
        if let (Some(mine), true) = (&config.kafka, spec.kafka.is_some()) {
            let made = dc_plane_kafka::build(mine.clone(), spec, site.clone(), room("kafka"));
            planes.push(made.map_err(|e| e.to_string())?);
        }
        if let (Some(mine), true) = (&config.s3, spec.s3.is_some()) {
            let made = dc_plane_s3::build(mine.clone(), spec, site.clone(), room("s3"));
            planes.push(made.map_err(|e| e.to_string())?);
        }
        if let (Some(mine), true) = (&config.airflow, spec.airflow.is_some()) {
            let made = dc_plane_airflow::build(mine.clone(), spec, site.clone(), room("airflow"));
            planes.push(made.map_err(|e| e.to_string())?);
        }
        let lacking: Vec<_> = spec
            .planes()
            .into_iter()
            .filter(|kind| planes.iter().all(|p| p.kind() != *kind))
            .map(|k| format!("[{k}]"))
            .collect();
        if !lacking.is_empty() {
            return Err(format!("the config of {site} has no {}", lacking.join(", ")));
        }
        #[cfg(feature = "sabotage")]
        crate::sabotage::wrap(&mut planes, config)?;
        Ok(planes)
    }

    fn releases(&self, spec: &GroupSpec) -> Result<Option<Arc<dyn Releases>>, String> {
        match (&self.0.s3, &spec.s3) {
            (Some(mine), Some(_)) => dc_plane_s3::publisher(mine.clone(), spec, self.0.site.clone())
                .map(Some)
                .map_err(|e| e.to_string()),
            _ => Ok(None),
        }
    }
}
