//! The `[s3]` section of agent.toml, and everything about it that can be checked without a network.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use dc_core::ids::SiteId;
use dc_core::spec::{GroupSpec, S3Spec};
use serde::Deserialize;

/// The `[s3]` section of an agent's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Key of this site's agent: owns its own bucket.
    pub access_key: String,
    /// File with the secret of `access_key`, readable by its owner only.
    pub secret_key_file: PathBuf,
    /// Key of one of the group's writers: a refused PUT with it proves the fence.
    pub canary_access_key: String,
    /// File with the secret of `canary_access_key`, readable by its owner only.
    pub canary_secret_key_file: PathBuf,
    /// Region name that requests are signed for; free text outside AWS.
    pub region: String,
    /// Folder in which DAG releases are materialised, absolute.
    pub releases_dir: PathBuf,
    /// Certificates (PEM) that sign the servers' own; the system's when absent.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// The object store of each site.
    pub sites: BTreeMap<SiteId, SiteConfig>,
}

/// The object store of one site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// As in `http://127.1.1.1:17070`; buckets are addressed by path.
    pub endpoint: String,
    /// Key to use at that site instead of `access_key`: at the other site it needs to read only.
    #[serde(default)]
    pub access_key: Option<String>,
    /// File with its secret.
    #[serde(default)]
    pub secret_key_file: Option<PathBuf>,
}

/// A configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct BuildError {
    /// Which key of which file.
    pub key: String,
    /// What is wrong with it, with what was found.
    pub why: String,
}

/// An access key and its secret. Never printed.
#[derive(Clone)]
pub(crate) struct Keys {
    pub(crate) access: String,
    pub(crate) secret: String,
}

/// Everything the rest of the room needs, checked.
#[derive(Clone)]
pub(crate) struct Checked {
    pub(crate) spec: S3Spec,
    pub(crate) lag_objects_max: u64,
    pub(crate) site: SiteId,
    pub(crate) peer: SiteId,
    pub(crate) own_endpoint: String,
    pub(crate) peer_endpoint: String,
    pub(crate) own_keys: Keys,
    pub(crate) peer_keys: Keys,
    pub(crate) canary_keys: Keys,
    pub(crate) region: String,
    pub(crate) releases_dir: PathBuf,
    pub(crate) ca_pem: Option<Vec<u8>>,
}

fn fault(key: &str, why: impl Into<String>) -> BuildError {
    BuildError { key: key.to_owned(), why: why.into() }
}

/// Reads a secret of at least one character from a file that only its owner may read.
fn secret(key: &str, path: &Path) -> Result<String, BuildError> {
    let shown = path.display();
    let meta = std::fs::metadata(path).map_err(|e| fault(key, format!("{shown} cannot be read: {e}")))?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(fault(key, format!("{shown} has mode {mode:04o}, others may read it; chmod 0600")));
    }
    let text =
        std::fs::read_to_string(path).map_err(|e| fault(key, format!("{shown} cannot be read: {e}")))?;
    let text = text.trim();
    if text.is_empty() {
        return Err(fault(key, format!("{shown} is empty")));
    }
    Ok(text.to_owned())
}

fn endpoint(key: &str, given: &str) -> Result<String, BuildError> {
    let rest = given.strip_prefix("http://").or_else(|| given.strip_prefix("https://"));
    match rest {
        Some(host) if !host.is_empty() && !host.starts_with('/') && !host.contains(['@', '?', '#', ' ']) => {
            Ok(given.trim_end_matches('/').to_owned())
        }
        _ => Err(fault(key, format!("{given:?} is no endpoint; write it as in \"https://s3.rome:443\""))),
    }
}

impl Config {
    fn at(&self, site: &SiteId) -> Result<(String, Keys), BuildError> {
        let key = format!("s3.sites.{site}");
        let found = self.sites.get(site).ok_or_else(|| fault(&key, "is missing"))?;
        let address = endpoint(&format!("{key}.endpoint"), &found.endpoint)?;
        let keys = match (&found.access_key, &found.secret_key_file) {
            (Some(access), Some(path)) => {
                Keys { access: access.clone(), secret: secret(&format!("{key}.secret_key_file"), path)? }
            }
            (None, None) => Keys {
                access: self.access_key.clone(),
                secret: secret("s3.secret_key_file", &self.secret_key_file)?,
            },
            _ => return Err(fault(&key, "access_key and secret_key_file go together")),
        };
        Ok((address, keys))
    }

    /// Checks the section against the group's spec.
    ///
    /// Errors: the first fault, naming its key. Reads files, asks no network.
    pub(crate) fn check(self, spec: &GroupSpec, site: SiteId) -> Result<Checked, BuildError> {
        let s3 = spec.s3.as_ref().ok_or_else(|| fault("group s3", "the group has no [s3]"))?;
        if !spec.sites.contains(&site) {
            return Err(fault("group sites", format!("{site} is not among them")));
        }
        let peer = spec.other(&site).ok_or_else(|| fault("group sites", "there is no other site"))?.clone();
        if !s3.writers.contains(&self.canary_access_key) {
            return Err(fault(
                "s3.canary_access_key",
                format!("{:?} is none of the group's writers {:?}", self.canary_access_key, s3.writers),
            ));
        }
        if s3.writers.contains(&self.access_key) {
            return Err(fault(
                "s3.access_key",
                "is one of the group's writers: a fence would stop the agent",
            ));
        }
        if !self.releases_dir.is_absolute() {
            return Err(fault("s3.releases_dir", format!("{} is not absolute", self.releases_dir.display())));
        }
        let (own_endpoint, own_keys) = self.at(&site)?;
        let (peer_endpoint, peer_keys) = self.at(&peer)?;
        if own_endpoint == peer_endpoint {
            return Err(fault(
                &format!("s3.sites.{peer}.endpoint"),
                format!("{own_endpoint} is also the endpoint of {site}"),
            ));
        }
        let ca_pem = match &self.ca_file {
            None => None,
            Some(path) => Some(
                std::fs::read(path)
                    .map_err(|e| fault("s3.ca_file", format!("{} cannot be read: {e}", path.display())))?,
            ),
        };
        Ok(Checked {
            spec: s3.clone(),
            lag_objects_max: spec.policy.lag_objects_max,
            site,
            peer,
            own_endpoint,
            peer_endpoint,
            own_keys,
            peer_keys,
            canary_keys: Keys {
                access: self.canary_access_key,
                secret: secret("s3.canary_secret_key_file", &self.canary_secret_key_file)?,
            },
            region: self.region,
            releases_dir: self.releases_dir,
            ca_pem,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(mode: u32) -> Result<(tempfile::TempDir, Config, GroupSpec), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("key");
        std::fs::write(&path, "secret\n")?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
        let shown = path.display();
        let config: Config = toml::from_str(&format!(
            "access_key = \"dcagent\"\nsecret_key_file = \"{shown}\"\ncanary_access_key = \"app\"\n\
             canary_secret_key_file = \"{shown}\"\nregion = \"us-east-1\"\nreleases_dir = \"/srv/releases\"\n\
             [sites.rome]\nendpoint = \"http://127.1.1.1:1\"\n[sites.fra]\nendpoint = \"http://127.1.2.1:1\"\n"
        ))?;
        let spec: GroupSpec = toml::from_str(
            "name = \"orders\"\nsites = [\"rome\", \"fra\"]\n[s3]\nbucket = \"b\"\ndag_prefix = \"dags\"\n\
             log_prefix = \"logs\"\nwriters = [\"app\"]\n",
        )?;
        Ok((dir, config, spec))
    }

    #[test]
    fn refuses_a_secret_that_others_may_read() -> Result<(), Box<dyn std::error::Error>> {
        let (_dir, config, spec) = parts(0o644)?;
        let refused = config.clone().check(&spec, SiteId::new("rome")?).err();
        assert!(refused.is_some_and(|e| e.why.contains("0644")));
        Ok(())
    }

    #[test]
    fn refuses_a_canary_that_no_fence_would_stop() -> Result<(), Box<dyn std::error::Error>> {
        let (_dir, mut config, spec) = parts(0o600)?;
        assert!(config.clone().check(&spec, SiteId::new("rome")?).is_ok());
        config.canary_access_key = "other".into();
        let refused = config.clone().check(&spec, SiteId::new("rome")?).err();
        assert_eq!(refused.map(|e| e.key).as_deref(), Some("s3.canary_access_key"));
        Ok(())
    }

    #[test]
    fn refuses_two_sites_with_one_endpoint_and_unknown_keys() -> Result<(), Box<dyn std::error::Error>> {
        let (_dir, mut config, spec) = parts(0o600)?;
        if let Some(fra) = config.sites.get_mut(&SiteId::new("fra")?) {
            fra.endpoint = "http://127.1.1.1:1/".into();
        }
        assert!(config.clone().check(&spec, SiteId::new("rome")?).is_err());
        assert!(toml::from_str::<SiteConfig>("endpoint = \"http://a\"\nwho = 1\n").is_err());
        Ok(())
    }
}
