//! The agent's file, read once and checked as a whole before anything runs on it.
//!
//! With `app.rs` the only place that names drivers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::SiteId;
use dc_core::lease::Profile;
use dc_wire::tls::TlsFiles;
use serde::Deserialize;

/// One agent's file: everything that is local to its site. Secrets are paths, never values.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which site this is.
    pub site: SiteId,
    /// Where the agent keeps its own state; its alone.
    pub data_dir: PathBuf,
    /// Times of the lease: `metro`, `wan` or `far`; the same at every voter.
    #[serde(default = "wan")]
    pub profile: String,
    /// Where it listens.
    pub listen: Listen,
    /// Who it is.
    pub tls: TlsFiles,
    /// Every voter with its `host:port`, this site included.
    pub peers: BTreeMap<SiteId, String>,
    /// The site only votes: it has no planes and leads only when nobody else does.
    #[serde(default)]
    pub witness: bool,
    /// The site's PostgreSQL.
    pub postgres: Option<dc_plane_postgres::Config>,
    /// The site's Kafka.
    pub kafka: Option<dc_plane_kafka::Config>,
    /// The site's object store.
    pub s3: Option<dc_plane_s3::Config>,
    /// The site's Airflow.
    pub airflow: Option<dc_plane_airflow::Config>,
}

/// Where an agent listens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// For operators, other agents and Raft; mutual TLS only.
    pub grpc: SocketAddr,
    /// For probes and scrapes; plain, reads only.
    pub http: SocketAddr,
}

fn wan() -> String {
    "wan".into()
}

impl Config {
    /// Reads and checks a file.
    ///
    /// Errors: DC-0001 with the file, its line and what is wrong with it. Nothing is changed.
    pub fn load(path: &Path) -> Result<Self, Fail> {
        let text = std::fs::read_to_string(path).map_err(|cause| refuse(path, &cause.to_string()))?;
        let config: Self = toml::from_str(&text).map_err(|cause| refuse(path, cause.to_string().trim()))?;
        let faults = config.faults();
        if faults.is_empty() { Ok(config) } else { Err(refuse(path, &faults.join("; "))) }
    }

    /// The lease's times.
    ///
    /// Errors: DC-0001 when there is no profile of that name, or it breaks an inequality.
    pub fn times(&self) -> Result<Profile, String> {
        let profile = Profile::named(&self.profile)
            .ok_or_else(|| format!("profile: there is no {:?}; use metro, wan or far", self.profile))?;
        profile.check().map_err(|broken| format!("profile: {broken}"))?;
        Ok(profile)
    }

    /// Everything the file alone can get wrong, so that it is mended in one go.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        faults.extend(self.times().err());
        if !self.peers.contains_key(&self.site) {
            faults.push(format!("peers: {} itself is missing", self.site));
        }
        if self.peers.len() < 3 {
            faults
                .push(format!("peers: {} given, a quorum that survives one site needs 3", self.peers.len()));
        }
        let mut by_address: BTreeMap<&str, &SiteId> = BTreeMap::new();
        for (site, address) in &self.peers {
            if let Some(other) = by_address.insert(address, site) {
                faults.push(format!("peers: {other} and {site} have one address, {address}"));
            }
        }
        if !self.data_dir.is_absolute() {
            faults.push(format!("data_dir: {} is not absolute", self.data_dir.display()));
        }
        if self.listen.grpc == self.listen.http {
            faults.push(format!("listen: grpc and http are both {}", self.listen.grpc));
        }
        let planes =
            self.postgres.is_some() || self.kafka.is_some() || self.s3.is_some() || self.airflow.is_some();
        if self.witness && planes {
            faults
                .push("witness: a witness has no planes; take away its sections or `witness = true`".into());
        }
        faults
    }
}

fn refuse(path: &Path, why: &str) -> Fail {
    let what = format!("{} cannot be used; nothing was changed", path.display());
    Fail::new(Code::from_text("DC-0001"), Exit::Usage, what, why)
        .next(format!("dc-switch config check {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
site = "rome"
data_dir = "/var/lib/dc-switch"
witness = true
[listen]
grpc = "127.1.1.1:7400"
http = "127.1.1.1:7401"
[tls]
ca = "ca.pem"
cert = "agent.pem"
key = "agent.key"
[peers]
rome = "127.1.1.1:7400"
fra = "127.1.2.1:7400"
oslo = "127.1.3.1:7400"
"#;

    fn said(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().and_then(|f| std::fs::write(f.path(), text).map(|()| f));
        match file {
            Ok(file) => Config::load(file.path()).map_or_else(|fail| fail.why, |_| "good".into()),
            Err(cause) => cause.to_string(),
        }
    }

    #[test]
    fn accepts_a_witness_as_the_example_has_it() {
        assert_eq!(said(GOOD), "good");
    }

    #[test]
    fn the_example_is_an_agent_with_every_plane() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/lab/example/agent.toml");
        let read = Config::load(&file).map(|c| {
            (c.postgres.is_some(), c.kafka.is_some(), c.s3.is_some(), c.airflow.is_some(), c.peers.len())
        });
        assert_eq!(read.map_err(|fail| fail.why), Ok((true, true, true, true, 3)));
    }

    #[test]
    fn refuses_an_unknown_key_with_its_line() {
        let why = said(&GOOD.replace("witness = true", "witnes = true"));
        assert!(why.contains("line 4") && why.contains("witnes"), "{why}");
    }

    #[test]
    fn refuses_a_site_named_twice_and_two_sites_at_one_address() {
        let twice = GOOD.replace("fra = \"127.1.2.1:7400\"", "rome = \"127.1.2.1:7400\"");
        assert!(said(&twice).contains("duplicate key"), "{}", said(&twice));
        let shared = said(&GOOD.replace("127.1.2.1", "127.1.3.1"));
        assert!(shared.contains("fra and oslo have one address"), "{shared}");
    }

    #[test]
    fn refuses_an_unknown_profile_and_names_those_there_are() {
        let why = said(&GOOD.replace("witness = true", "profile = \"lan\""));
        assert!(why.contains("metro, wan or far"), "{why}");
    }

    #[test]
    fn tells_every_fault_at_once() {
        let why = said(&GOOD.replace("oslo = \"127.1.3.1:7400\"", "").replace("/var/lib", "var/lib"));
        assert!(why.contains("needs 3") && why.contains("not absolute"), "{why}");
    }
}
