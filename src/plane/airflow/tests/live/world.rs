//! The world under test: both sites' planes, their databases moved by hand, and a client that asks for runs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dc_core::act::{Act, ActName, AirflowAct, Direction, Evidence, Finding, Outcome};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, RunId, SiteId, Token};
use dc_core::plan::Effect;
use dc_core::spec::{GroupSpec, Span};
use dc_plane::{Deadline, Plane, PlaneError, suite};
use dc_plane_airflow::Config;
use serde::Deserialize;
use serde_json::{Value, json};

const LOAD: &str = include_str!("../../../../../deploy/lab/parts-data/airflow/dags/lab_load.py");
const CANARY: &str = include_str!("../../../../../deploy/airflow/dags/dc_switch_canary.py");

/// Set in the copy of the test that runs as the user of the parts.
const AS_OWNER: &str = "DC_LIVE_AS_OWNER";

#[derive(Deserialize)]
struct AgentFile {
    data_dir: PathBuf,
    airflow: Config,
    postgres: PostgresSection,
}

#[derive(Deserialize, Clone)]
struct PostgresSection {
    bin_dir: PathBuf,
    data_dir: PathBuf,
    replication_user: String,
    replication_password_file: PathBuf,
    sites: BTreeMap<String, Address>,
}

#[derive(Deserialize, Clone)]
struct Address {
    host: String,
    port: u16,
}

pub struct World {
    pub root: PathBuf,
    pub spec: GroupSpec,
    pub http: reqwest::Client,
    token: std::sync::atomic::AtomicU64,
}

fn root() -> Result<PathBuf> {
    std::env::var_os("DC_LAB_WORLD").map(PathBuf::from).context(
        "DC_LAB_WORLD is not set; make a world with \
         `dc-lab parts up --planes postgres,s3,airflow --name NAME --delay 0`",
    )
}

/// Runs a test again as the user of the world's parts, when this one is root. True: it was done there.
pub fn done_as_owner(test: &str) -> Result<bool> {
    let root = root()?;
    let meta = std::fs::metadata(&root)?;
    if !rustix::process::geteuid().is_root() || meta.uid() == 0 || std::env::var_os(AS_OWNER).is_some() {
        return Ok(false);
    }
    // where it was built that user may not be able to read
    let copy = root.join("bin/airflow-live-test");
    std::fs::copy(std::env::current_exe()?, &copy)?;
    let status = Command::new(copy)
        .args(["--exact", test, "--nocapture"])
        .env(AS_OWNER, "1")
        .current_dir("/")
        .gid(meta.gid())
        .uid(meta.uid())
        .status()?;
    ensure!(status.success(), "as the parts' user the test ended with {status}");
    Ok(true)
}

impl World {
    pub fn open() -> Result<Self> {
        let root = root()?;
        let spec = toml::from_str(&std::fs::read_to_string(root.join("group.toml"))?)?;
        // the gates remember the highest token of the tests before
        let tokens = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build()?;
        Ok(Self { root, spec, http, token: std::sync::atomic::AtomicU64::new(tokens) })
    }

    /// The holder and the standby, as their databases are.
    pub fn pair(&self) -> Result<(SiteId, SiteId)> {
        let (one, other) = (self.spec.sites[0].clone(), self.spec.sites[1].clone());
        let follows = self.file(&one)?.postgres.data_dir.join("standby.signal").exists();
        Ok(if follows { (other, one) } else { (one, other) })
    }

    fn file(&self, site: &SiteId) -> Result<AgentFile> {
        let path = self.root.join(site.as_str()).join("agent.toml");
        toml::from_str(&std::fs::read_to_string(&path)?).with_context(|| format!("read {}", path.display()))
    }

    pub fn config(&self, site: &SiteId) -> Result<Config> {
        Ok(self.file(site)?.airflow)
    }

    pub fn plane(&self, site: &SiteId) -> Result<Arc<dyn Plane>> {
        self.plane_with(site, self.config(site)?, None)
    }

    pub fn plane_with(
        &self,
        site: &SiteId,
        config: Config,
        drain: Option<Duration>,
    ) -> Result<Arc<dyn Plane>> {
        let mut spec = self.spec.clone();
        if let (Some(airflow), Some(drain)) = (&mut spec.airflow, drain) {
            airflow.drain_limit = Span(drain);
        }
        Ok(dc_plane_airflow::build(config, &spec, site.clone(), self.file(site)?.data_dir)?)
    }

    /// DAGs as an agent would have materialised them.
    pub fn publish(&self) -> Result<()> {
        for site in &self.spec.sites {
            let releases = self.root.join(site.as_str()).join("releases");
            let tree = releases.join("r000001-000000000000");
            std::fs::create_dir_all(&tree)?;
            std::fs::write(tree.join("lab_load.py"), LOAD)?;
            std::fs::write(tree.join("dc_switch_canary.py"), CANARY)?;
            if !releases.join("current").exists() {
                std::os::unix::fs::symlink(&tree, releases.join("current"))?;
            }
        }
        Ok(())
    }

    /// Lets Airflow write its logs at both sites: the fence of the bucket is another plane's.
    pub fn open_buckets(&self) -> Result<()> {
        const OPEN: &str = "import boto3,json,sys\n\
            s=boto3.client('s3',endpoint_url=sys.argv[1],aws_access_key_id='root',aws_secret_access_key=open(sys.argv[2]).read().strip(),region_name='us-east-1')\n\
            p=json.loads(s.get_bucket_policy(Bucket='orders')['Policy'])\n\
            p['Statement']=[x for x in p['Statement'] if x['Effect']!='Deny']\n\
            s.put_bucket_policy(Bucket='orders',Policy=json.dumps(p))";
        for site in &self.spec.sites {
            let config = self.config(site)?;
            let api = &config.sites[site].api;
            let status = Command::new(config.bin_dir.join("python"))
                .env("NO_PROXY", "*")
                .args(["-c", OPEN])
                .arg(api.replace(":18080", ":17070"))
                .arg(self.root.join("secrets/s3-root"))
                .status()?;
            ensure!(status.success(), "open the bucket of {site}");
        }
        Ok(())
    }

    fn tool(&self, site: &SiteId, name: &str, args: &[&str]) -> Result<()> {
        let pg = self.file(site)?.postgres;
        let log = pg.data_dir.with_file_name("live.log");
        let mut command = Command::new(pg.bin_dir.join(name));
        command.arg("-D").arg(&pg.data_dir);
        if name == "pg_ctl" {
            command.arg("-l").arg(log).arg("-w");
        }
        let out = command.args(args).stdin(std::process::Stdio::null()).output()?;
        ensure!(out.status.success(), "{name} {args:?} at {site}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// Moves the database: everything of `from` is at `to`, and `from` follows it.
    pub fn move_database(&self, from: &SiteId, to: &SiteId) -> Result<()> {
        self.tool(from, "pg_ctl", &["-m", "fast", "stop"])?;
        self.tool(to, "pg_ctl", &["promote"])
    }

    pub fn follow(&self, site: &SiteId, holder: &SiteId) -> Result<()> {
        let pg = self.file(site)?.postgres;
        let at = pg.sites.get(holder.as_str()).context("address of the holder")?;
        let pass = pg.data_dir.with_file_name("pgpass-live");
        let secret = std::fs::read_to_string(&pg.replication_password_file)?;
        write_private(&pass, &format!("*:*:*:{}:{}\n", pg.replication_user, secret.trim()))?;
        let conninfo = format!(
            "primary_conninfo = 'host={} port={} user={} passfile={}'\n",
            at.host,
            at.port,
            pg.replication_user,
            pass.display()
        );
        std::fs::write(pg.data_dir.join("postgresql.auto.conf"), conninfo)?;
        std::fs::write(pg.data_dir.join("standby.signal"), "")?;
        self.tool(site, "pg_ctl", &["start"])
    }

    pub fn act(&self, name: AirflowAct, at: &SiteId, from: &SiteId, to: &SiteId, run: Option<&str>) -> Act {
        Act {
            name: ActName::Airflow(name),
            site: at.clone(),
            group: self.spec.name.clone(),
            run: run.map(|run| RunId(run.to_owned())),
            source: from.clone(),
            target: to.clone(),
            epoch: Epoch { incarnation: 0, counter: 2 },
            direction: Direction::Forward,
            given: Vec::new(),
        }
    }

    pub fn step(&self, run: &str) -> Authority {
        let token = self.token.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Authority::step(RunId(run.to_owned()), Epoch { incarnation: 0, counter: 2 }, Token(token))
    }

    /// Performs an act with all that it promises, twice, and says how long that took.
    pub async fn twice(&self, plane: &Arc<dyn Plane>, act: &Act) -> Result<Evidence> {
        let run = act.run.as_ref().map_or("none", |run| run.0.as_str());
        let effect = match act.name {
            // quiesce and prove_gone prove anew each time: their probe never says done
            ActName::Airflow(AirflowAct::CloseApi) => Effect::Fences,
            ActName::Airflow(AirflowAct::OpenApi) => Effect::Opens,
            _ => Effect::Neither,
        };
        let began = Instant::now();
        let seen = suite::keeps(plane.as_ref(), act, &self.step(run), effect, Duration::from_mins(2)).await?;
        println!(
            "{:>26} {:<5} {:>6.2} s  {}",
            act.name.to_string(),
            act.site,
            began.elapsed().as_secs_f64(),
            seen.seen
        );
        Ok(seen)
    }

    pub async fn undo_twice(&self, plane: &Arc<dyn Plane>, act: &Act) -> Result<Evidence> {
        let mut first = None;
        for time in ["first", "again"] {
            let began = Instant::now();
            let seen = plane
                .undo(act, &self.step("u"), Deadline::within(Duration::from_mins(2)))
                .await
                .context("undo")?;
            println!(
                "{:>21} undo {:<5} {time} {:>6.2} s  {}",
                act.name.to_string(),
                act.site,
                began.elapsed().as_secs_f64(),
                seen.seen
            );
            first.get_or_insert(seen);
        }
        first.context("undone")
    }

    async fn rest(
        &self,
        site: &SiteId,
        method: reqwest::Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value> {
        let base = self.config(site)?.sites[site].api.clone();
        let password = std::fs::read_to_string(self.root.join("secrets/airflow-admin"))?;
        let words = json!({"username": "admin", "password": password.trim()});
        let given: Value =
            self.http.post(format!("{base}/auth/token")).json(&words).send().await?.json().await?;
        let token = given["access_token"].as_str().context("a token")?;
        let mut request = self.http.request(method, format!("{base}{path}")).bearer_auth(token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let got = request.send().await?;
        let status = got.status();
        let body: Value = got.json().await.unwrap_or_default();
        if !status.is_success() {
            bail!("{path}: {status} {body}");
        }
        Ok(body)
    }

    pub async fn trigger(&self, site: &SiteId, dag: &str, run: &str, seconds: f64) -> Result<()> {
        let body = json!({"dag_run_id": run, "logical_date": null, "conf": {"seconds": seconds}});
        self.rest(site, reqwest::Method::POST, &format!("/api/v2/dags/{dag}/dagRuns"), Some(body))
            .await
            .map(|_| ())
    }

    pub async fn task(&self, site: &SiteId, dag: &str, run: &str) -> Result<(String, i64)> {
        let path = format!("/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/work");
        let found = self.rest(site, reqwest::Method::GET, &path, None).await?;
        Ok((found["state"].as_str().unwrap_or("none").to_owned(), found["try_number"].as_i64().unwrap_or(-1)))
    }

    pub async fn paused(&self, site: &SiteId, dag: &str) -> Result<bool> {
        let found = self.rest(site, reqwest::Method::GET, &format!("/api/v2/dags/{dag}"), None).await?;
        Ok(found["is_paused"].as_bool() == Some(true))
    }

    pub async fn unpause(&self, site: &SiteId, dag: &str) -> Result<()> {
        let path = format!("/api/v2/dags/{dag}?update_mask=is_paused");
        self.rest(site, reqwest::Method::PATCH, &path, Some(json!({"is_paused": false}))).await.map(|_| ())
    }

    /// A person decides about a held task.
    pub async fn give_up(&self, site: &SiteId, dag: &str, run: &str) -> Result<()> {
        let path = format!("/api/v2/dags/{dag}/dagRuns/{run}");
        self.rest(site, reqwest::Method::PATCH, &path, Some(json!({"state": "failed"}))).await.map(|_| ())
    }

    /// Marks of runs whose name begins so: DAG, run, phase, site.
    pub fn marks(&self, prefix: &str) -> Vec<(String, String, String, String)> {
        let text = std::fs::read_to_string(self.root.join("marks/marks.tsv")).unwrap_or_default();
        text.lines()
            .map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>())
            .filter(|words| words.len() == 10 && words[3].starts_with(prefix))
            .map(|words| (words[2].clone(), words[3].clone(), words[8].clone(), words[1].clone()))
            .collect()
    }

    pub fn runs_with(&self, prefix: &str, phase: &str) -> BTreeSet<String> {
        self.marks(prefix).into_iter().filter(|m| m.2 == phase).map(|m| m.1).collect()
    }
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut file =
        std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

pub fn blocking(evidence: &Evidence) -> Vec<Finding> {
    evidence.blocking().cloned().collect()
}

pub fn fingerprints(evidence: &Evidence) -> BTreeMap<String, String> {
    evidence
        .outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Fingerprint { of, digest, .. } => Some((of.clone(), digest.clone())),
            _ => None,
        })
        .collect()
}

/// Asks until it holds, a minute and a half at most.
pub async fn until<F, Fut>(what: &str, mut holds: F) -> Result<()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    dc_plane::wait_until(Deadline::within(Duration::from_secs(90)), Duration::from_millis(200), what, || {
        let asked = holds();
        async move { Ok::<_, PlaneError>(asked.await.then_some(())) }
    })
    .await
    .map_err(Into::into)
}
