//! Real parts of the airflow plane: one Airflow per site, its metadata in the site's own Postgres, its DAGs from the
//! site's own releases, its logs in the site's own bucket.
//!
//! Each site has two units under a keeper of their own: the API, and the writers. Both are warm and shut when they
//! start. Only when the lab is founded are rome's opened here; from then on whoever holds the group is the agents'
//! matter, and a start brings up what is down and leaves it shut.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::process;
use crate::world::{DATA_SITES, ROME, Site, World, port};

/// Version of Apache Airflow; the pins say the rest.
const AIRFLOW: &str = "3.3.2";
const PINS: &str = include_str!("../../parts-data/airflow/requirements.txt");
const INSTALLER: &str = include_str!("../../parts-data/airflow/uv.txt");
const SETTINGS: &str = include_str!("../../parts-data/airflow/settings.env");
/// Where the interpreter that the pins were made for may lie.
const PYTHONS: [&str; 3] = ["/usr/bin/python3.11", "/usr/bin/python3", "/usr/local/bin/python3.11"];
const UNITS: [&str; 2] = ["api", "writers"];
/// How long an interpreter may take to import Airflow, with everything else starting beside it.
const WARM_LIMIT: Duration = Duration::from_mins(3);
/// How long writers may take to end their tasks when the lab goes down.
const STOP_GRACE_MS: u64 = 5_000;

/// The folder of the installed Airflow; its name says what it was made from.
fn home(world: &World) -> PathBuf {
    let print = hex::encode(Sha256::digest(PINS.as_bytes()));
    world.parts_dir.join(format!("airflow-{AIRFLOW}-{}", &print[..12]))
}

fn python(world: &World) -> PathBuf {
    home(world).join("venv/bin/python")
}

fn dir(world: &World, site: &Site) -> PathBuf {
    world.dir(site).join("airflow")
}

fn run_dir(world: &World, site: &Site) -> PathBuf {
    dir(world, site).join("run")
}

/// Installs Python where it is missing, and the pinned Airflow. Repeat: safe; labs side by side wait for each other.
pub async fn install(world: &World) -> Result<()> {
    let home = home(world);
    if home.join("installed").exists() {
        return Ok(());
    }
    let system = system_python().await?;
    let lock = fs::File::create(world.parts_dir.join("airflow.lock"))?;
    tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await??;
    if home.join("installed").exists() {
        return Ok(());
    }
    if home.exists() {
        fs::remove_dir_all(&home).context("remove an unfinished installation")?;
    }
    world.mkdir(&home)?;
    world.write(&home.join("requirements.txt"), PINS, 0o644)?;
    world.write(&home.join("uv.txt"), INSTALLER, 0o644)?;
    let pins = PINS.lines().filter(|line| line.contains("==")).count();
    eprintln!("  airflow {AIRFLOW}: installing {pins} pinned packages");
    for name in ["tools", "venv"] {
        run(world, Command::new(&system).args(["-m", "venv"]).arg(home.join(name))).await?;
    }
    let mut pip = Command::new(home.join("tools/bin/python"));
    pip.args(["-m", "pip", "install", "-q", "--no-cache-dir", "--require-hashes", "-r"])
        .arg(home.join("uv.txt"));
    run(world, &mut pip).await.context("install uv")?;
    let mut uv = Command::new(home.join("tools/bin/uv"));
    uv.args(["pip", "install", "-q", "--require-hashes", "--python"]).arg(python(world));
    uv.arg("-r").arg(home.join("requirements.txt")).env("UV_CACHE_DIR", home.join("cache"));
    run(world, &mut uv).await.context("install Airflow")?;
    eprintln!("  airflow {AIRFLOW}: compiling");
    let mut compile = Command::new(python(world));
    compile.args(["-m", "compileall", "-q", "-j", "2"]).arg(home.join("venv/lib"));
    compile.env_remove("PYTHONDONTWRITEBYTECODE");
    // some packages ship templates that are no Python; they are never imported
    let _ = run(world, &mut compile).await;
    fs::remove_dir_all(home.join("cache")).context("remove the download cache")?;
    world.write(&home.join("installed"), "", 0o644)
}

async fn run(world: &World, command: &mut Command) -> Result<String> {
    let out = world.run(command.env("PATH", "/usr/local/bin:/usr/bin:/bin")).await?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// A Python 3.11 that can make environments; as root, by the system's packages where it is missing.
async fn system_python() -> Result<PathBuf> {
    if let Some(found) = fitting_python().await {
        return Ok(found);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "Python 3.11 with venv is missing; install the packages python3.11 and python3.11-venv and repeat"
    );
    eprintln!("  installing Python 3.11");
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "--no-install-recommends", "python3.11", "python3.11-venv"])
        .env("DEBIAN_FRONTEND", "noninteractive");
    process::run(&mut apt, Duration::from_mins(10)).await.context("install python3.11")?;
    fitting_python().await.context("the packages python3.11 and python3.11-venv brought no Python 3.11")
}

async fn fitting_python() -> Option<PathBuf> {
    let fits = "import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))";
    for path in PYTHONS.iter().filter(|path| Path::new(path).is_file()) {
        if process::run(Command::new(path).args(["-c", fits]), Duration::from_secs(20)).await.is_ok() {
            return Some(PathBuf::from(path));
        }
    }
    None
}

/// Starts both units of both sites; founds the database's schema and opens rome's once. Repeat: safe.
pub async fn start(world: &World) -> Result<()> {
    for site in DATA_SITES {
        write_files(world, &site)?;
    }
    let founded = world.root.join("airflow-founded");
    if !founded.exists() {
        migrate(world).await?;
    }
    let (rome, fra) = tokio::join!(warm(world, &DATA_SITES[0]), warm(world, &DATA_SITES[1]));
    rome.and(fra)?;
    if !founded.exists() {
        let by = json!({"origin": "reopen", "epoch": "founding"});
        for unit in UNITS {
            gate(world, &ROME, unit, &json!({"do": "open", "by": by})).await?;
        }
        let by = json!({"origin": "standby", "epoch": "founding"});
        gate(world, &ROME.other(), "api", &json!({"do": "open", "by": by})).await?;
        world.write(&founded, "", 0o644)?;
    }
    Ok(())
}

/// Makes the schema at rome, once. The migration itself may be repeated.
async fn migrate(world: &World) -> Result<()> {
    let begun = Instant::now();
    let mut migrate = Command::new(python(world));
    migrate.args(["-m", "airflow", "db", "migrate"]).env_clear().envs(settings(world, &ROME)?);
    run(world, &mut migrate).await.context("make the schema of the metadata database")?;
    eprintln!("  airflow: schema made ({:.1} s)", begun.elapsed().as_secs_f64());
    Ok(())
}

fn fernet_key(world: &World) -> Result<String> {
    // 32 bytes in URL-safe base64, of which hex digits are a part: 42 of them, one that ends on whole bits, padding
    let text = format!("{}{}", world.secret("airflow-fernet-a")?, world.secret("airflow-fernet-b")?);
    let digits = text.get(..42).context("secrets are too short")?;
    Ok(format!("{digits}0="))
}

/// The settings of a site's Airflow processes. Keys are equal at both sites, addresses are the site's own.
fn settings(world: &World, site: &Site) -> Result<BTreeMap<String, String>> {
    let (ip, home) = (world.ip(site), dir(world, site));
    let mut all: BTreeMap<String, String> = SETTINGS
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let database = world.secret("postgres-airflow")?;
    let api = format!("http://{ip}:{}", port::AIRFLOW_API);
    let logs = json!({"conn_type": "aws", "login": "airflow", "password": world.secret("s3-airflow")?, "extra": {
        "endpoint_url": format!("http://{ip}:{}", port::S3), "region_name": "us-east-1",
        "config_kwargs": {"s3": {"addressing_style": "path"}}}});
    for (key, value) in [
        ("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", self::home(world).join("venv/bin").display())),
        ("HOME", home.display().to_string()),
        ("PYTHONPATH", world.root.join("airflow-lib").display().to_string()),
        ("NO_PROXY", "*".to_owned()),
        (process::MARK, world.root.display().to_string()),
        ("DC_SITE", site.name.to_owned()),
        ("DC_SITE_HOST", ip.clone()),
        ("DC_MARKS_FILE", world.root.join("marks/marks.tsv").display().to_string()),
        ("AIRFLOW_HOME", home.display().to_string()),
        ("AIRFLOW_CONN_DC_LOGS", logs.to_string()),
        ("AIRFLOW__CORE__FERNET_KEY", fernet_key(world)?),
        ("AIRFLOW__CORE__DAGS_FOLDER", home.join("no-dags").display().to_string()),
        (
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE",
            home.join("passwords.json").display().to_string(),
        ),
        ("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", format!("{api}/execution/")),
        ("AIRFLOW__API_AUTH__JWT_SECRET", world.secret("airflow-jwt-a")? + &world.secret("airflow-jwt-b")?),
        ("AIRFLOW__API__SECRET_KEY", world.secret("airflow-api")?),
        ("AIRFLOW__API__BASE_URL", api),
        ("AIRFLOW__API__HOST", ip.clone()),
        ("AIRFLOW__API__PORT", port::AIRFLOW_API.to_string()),
        ("AIRFLOW__API__INSTANCE_NAME", format!("{} at {site}", world.name)),
        ("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", bundles(world, site)),
        (
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
            format!("postgresql+psycopg2://airflow:{database}@{ip}:{}/airflow", port::POSTGRES),
        ),
        ("AIRFLOW__LOGGING__BASE_LOG_FOLDER", home.join("logs").display().to_string()),
        ("AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER", "s3://orders/logs".to_owned()),
        ("AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT", port::AIRFLOW_LOGS.to_string()),
    ] {
        all.insert(key.to_owned(), value);
    }
    Ok(all)
}

/// Where Airflow finds its DAGs: the release that the site's agent materialised last.
fn bundles(world: &World, site: &Site) -> String {
    let releases = world.dir(site).join("releases");
    json!([{"name": "dags", "classpath": "dcswitch_airflow.bundle.ReleaseBundle",
            "kwargs": {"releases_dir": releases, "refresh_interval": 5}}])
    .to_string()
}

fn write_files(world: &World, site: &Site) -> Result<()> {
    let home = dir(world, site);
    for sub in ["", "run", "logs"] {
        world.mkdir(&home.join(sub))?;
    }
    world.mkdir(&world.root.join("marks"))?;
    let lines: Vec<String> =
        settings(world, site)?.into_iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    world.write(&home.join("airflow.env"), &lines.concat(), 0o600)?;
    let passwords = json!({"admin": world.secret("airflow-admin")?});
    world.write(&home.join("passwords.json"), &passwords.to_string(), 0o600)?;
    copy_package(world)
}

/// Our own Python package as this checkout has it: a checkout below /root is closed to the parts' user.
fn copy_package(world: &World) -> Result<()> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../airflow/dcswitch_airflow");
    for entry in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if path.extension().is_some_and(|ending| ending == "py") {
            let to = world.root.join("airflow-lib/dcswitch_airflow").join(name);
            world.write(&to, &fs::read_to_string(&path)?, 0o644)?;
        }
    }
    Ok(())
}

/// Keeps both units of a site and waits until their interpreters are warm.
async fn warm(world: &World, site: &Site) -> Result<()> {
    let guardian = world.bin("dc-guardian")?;
    let (home, run_dir) = (dir(world, site), run_dir(world, site));
    let begun = Instant::now();
    for unit in UNITS {
        if ask(&run_dir.join(format!("{unit}.sock")), &json!({"do": "status"})).await.is_ok() {
            continue;
        }
        run(world, Command::new(&guardian).args(["reap", unit, "--dir"]).arg(&run_dir)).await?;
        let gate = run_dir.join(format!("{unit}.gate"));
        let _ = fs::remove_file(&gate);
        let mut keep = Command::new(&guardian);
        keep.args(["keep", unit, "--dir"]).arg(&run_dir).arg("--env-file").arg(home.join("airflow.env"));
        keep.arg("--cwd").arg(&home).arg("--").arg(python(world));
        keep.args(["-m", "dcswitch_airflow.boot", unit, "--socket"]).arg(&gate);
        run(world, &mut keep).await.with_context(|| format!("keep {unit} of {site}"))?;
    }
    for unit in UNITS {
        while ask(&run_dir.join(format!("{unit}.gate")), &json!({"do": "status"})).await.is_err() {
            let log = run_dir.join(format!("{unit}.log"));
            ensure!(begun.elapsed() < WARM_LIMIT, "{unit} of {site} is not warm; see {}", log.display());
            if ask(&run_dir.join(format!("{unit}.sock")), &json!({"do": "status"})).await.is_err() {
                let text = fs::read_to_string(&log).unwrap_or_default();
                bail!("{unit} of {site} ended while warming:\n{}", process::last_lines(&text, 8));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    eprintln!("  airflow of {site} is warm ({:.1} s)", begun.elapsed().as_secs_f64());
    Ok(())
}

async fn gate(world: &World, site: &Site, unit: &str, request: &Value) -> Result<Value> {
    ask(&run_dir(world, site).join(format!("{unit}.gate")), request)
        .await
        .with_context(|| format!("ask the gate of {unit} of {site}"))
}

/// One line of JSON each way over a unix socket.
async fn ask(path: &Path, request: &Value) -> Result<Value> {
    let talk = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(format!("{request}\n").as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line).await?;
        let answer: Value = serde_json::from_str(&line)?;
        ensure!(answer.get("error").is_none(), "{}", answer["error"]);
        Ok(answer)
    };
    tokio::time::timeout(Duration::from_secs(15), talk).await?
}

/// Ends the units of both sites and proves them gone. Repeat: safe.
pub async fn stop(world: &World) -> Result<()> {
    let (rome, fra) = tokio::join!(end(world, &DATA_SITES[0]), end(world, &DATA_SITES[1]));
    rome.and(fra)
}

async fn end(world: &World, site: &Site) -> Result<()> {
    let run_dir = run_dir(world, site);
    if !run_dir.is_dir() {
        return Ok(());
    }
    let guardian = world.bin("dc-guardian")?;
    for unit in ["writers", "api"] {
        let socket = run_dir.join(format!("{unit}.sock"));
        // what no keeper answers for is ended by the reaping below
        let _ = ask(&socket, &json!({"do": "stop", "signal": "TERM", "grace_ms": STOP_GRACE_MS})).await;
        let _ = ask(&socket, &json!({"do": "kill", "grace_ms": 5_000})).await;
        let begun = Instant::now();
        loop {
            let reaped =
                run(world, Command::new(&guardian).args(["reap", unit, "--dir"]).arg(&run_dir)).await;
            match reaped {
                Ok(_) => break,
                Err(cause) if begun.elapsed() > Duration::from_secs(10) => {
                    return Err(cause.context(format!("prove {unit} of {site} gone")));
                }
                // its keeper is leaving
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    }
    Ok(())
}

/// The section of agent.toml.
pub fn agent_toml(world: &World, site: &Site) -> String {
    let home = dir(world, site);
    let mut text = format!(
        "[airflow]\ndriver = \"exec\"\nhome = \"{}\"\nbin_dir = \"{}\"\nenv_file = \"{}\"\nrun_dir = \"{}\"\n\
         guardian_bin = \"{}\"\nuser = \"admin\"\npassword_file = \"{}\"\n",
        home.display(),
        self::home(world).join("venv/bin").display(),
        home.join("airflow.env").display(),
        run_dir(world, site).display(),
        world.root.join("bin/dc-guardian").display(),
        world.secret_path("airflow-admin").display(),
    );
    for at in DATA_SITES {
        let (host, port) = world.link(site, &at, port::AIRFLOW_API);
        let _ = writeln!(text, "[airflow.sites.{at}]\napi = \"http://{host}:{port}\"");
    }
    text
}

/// The section of group.toml.
pub fn group_toml(_world: &World) -> String {
    "[airflow]\ndrain_limit = \"60s\"\ndefault_policy = \"rerun\"\n".to_owned()
}

/// Versions of the parts.
pub fn versions(_world: &World) -> BTreeMap<String, String> {
    BTreeMap::from([("airflow".to_owned(), AIRFLOW.to_owned())])
}
