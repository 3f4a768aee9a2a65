//! The `[kafka]` section of an agent's file, checked as far as it can be without a network.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dc_core::ids::SiteId;
use dc_core::spec::{GroupSpec, KafkaSpec};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

/// The `[kafka]` section.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The agent's principal: Cluster ALTER, Topic and Group READ, no WRITE, no super user. With ALTER it could grant
    /// itself anything, so its password is to be guarded like a super user's.
    pub user: String,
    /// File with its password, readable by its owner alone.
    pub password_file: PathBuf,
    /// Principal of the canary; its WRITE moves with that of the applications.
    pub canary_user: String,
    /// File with its password, readable by its owner alone.
    pub canary_password_file: PathBuf,
    /// Principal by which the mirror writes; it has WRITE at the standby only.
    pub mirror_user: String,
    /// First part of the canary topic's name; `-` and the group's name follow. The topic must exist at both sites
    /// and have a leader on every broker.
    pub canary_topic: String,
    /// Where Connect keeps the positions of its source connectors.
    #[serde(default = "offsets_topic")]
    pub offsets_topic: String,
    /// Certificates that brokers are checked against. With it connections use TLS (`SASL_SSL`), else plaintext.
    pub ca_file: Option<PathBuf>,
    /// Addresses of both sites.
    pub sites: BTreeMap<SiteId, SiteConfig>,
}

/// Addresses of one site.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// Brokers that clients and agents ask first: `host:port`, several divided by commas.
    pub bootstrap: String,
    /// REST of the Connect workers that write to this site, as in `http://host:8083`.
    pub connect: String,
    /// Brokers as workers of the other site reach them.
    pub mirror_bootstrap: String,
}

fn offsets_topic() -> String {
    "connect-offsets".to_owned()
}

/// Why the plane cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kafka.{key}: {why}")]
pub struct BuildError {
    /// Which key of the file.
    pub key: String,
    /// What is wrong, with what was found.
    pub why: String,
}

fn bad(key: &str, why: impl Into<String>) -> BuildError {
    BuildError { key: key.to_owned(), why: why.into() }
}

/// A user with its password, which is never shown.
#[derive(Clone)]
pub struct Login {
    /// Name of the principal, without `User:`.
    pub user: String,
    /// Kept from logs and errors.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({})", self.user)
    }
}

/// What was read from a checked section.
pub struct Checked {
    /// The agent.
    pub agent: Login,
    /// The canary.
    pub canary: Login,
    /// TLS settings, where brokers are reached by TLS.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// The group's Kafka.
    pub spec: KafkaSpec,
    /// The group's canary topic.
    pub canary_topic: String,
}

/// Checks a section against the group and reads the secrets it names.
///
/// Errors: the first fault, with its key.
pub fn check(config: &Config, group: &GroupSpec, site: &SiteId) -> Result<Checked, BuildError> {
    let Some(spec) = group.kafka.clone() else {
        return Err(bad("sites", format!("group {} has no Kafka", group.name)));
    };
    for wanted in group.sites.iter().chain([site]) {
        let Some(found) = config.sites.get(wanted) else {
            return Err(bad("sites", format!("site {wanted} of group {} is missing", group.name)));
        };
        let key = |part: &str| format!("sites.{wanted}.{part}");
        addresses(&key("bootstrap"), &found.bootstrap)?;
        addresses(&key("mirror_bootstrap"), &found.mirror_bootstrap)?;
        let rest = found.connect.strip_prefix("http://").unwrap_or_default();
        if rest.is_empty() || rest.trim_end_matches('/').contains('/') {
            return Err(bad(
                &key("connect"),
                format!("{:?} is not of the form http://host:port", found.connect),
            ));
        }
    }
    let canary_topic = format!("{}-{}", config.canary_topic, group.name);
    if spec.topics.contains(&canary_topic) {
        return Err(bad("canary_topic", format!("{canary_topic} is a topic of applications")));
    }
    let apps: Vec<&String> = spec.producers.iter().chain(&spec.consumers).collect();
    for (key, name) in
        [("user", &config.user), ("canary_user", &config.canary_user), ("mirror_user", &config.mirror_user)]
    {
        if apps.contains(&name) {
            return Err(bad(
                key,
                format!("{name} is an application's principal too; it must be one of its own"),
            ));
        }
    }
    if config.user == config.canary_user
        || config.mirror_user == config.canary_user
        || config.user == config.mirror_user
    {
        return Err(bad("canary_user", "agent, canary and mirror must be three principals"));
    }
    Ok(Checked {
        agent: Login { user: config.user.clone(), password: secret("password_file", &config.password_file)? },
        canary: Login {
            user: config.canary_user.clone(),
            password: secret("canary_password_file", &config.canary_password_file)?,
        },
        tls: config.ca_file.as_deref().map(tls).transpose()?,
        spec,
        canary_topic,
    })
}

fn addresses(key: &str, list: &str) -> Result<(), BuildError> {
    let fits = |one: &str| {
        one.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    match list.split(',').map(str::trim).find(|one| !fits(one)) {
        Some(wrong) => Err(bad(key, format!("{wrong:?} is not of the form host:port"))),
        None => Ok(()),
    }
}

fn secret(key: &str, path: &Path) -> Result<String, BuildError> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|e| bad(key, format!("read {shown}: {e}")))?;
    if meta.mode() & 0o077 != 0 {
        return Err(bad(
            key,
            format!("{shown} may be read by others (mode {:o}); chmod 600 it", meta.mode() & 0o777),
        ));
    }
    let text = fs::read_to_string(path).map_err(|e| bad(key, format!("read {shown}: {e}")))?;
    let text = text.trim_end_matches(['\r', '\n']).to_owned();
    if text.is_empty() || text.contains(['\0', '\n']) {
        return Err(bad(key, format!("{shown} does not hold one line with a password")));
    }
    Ok(text)
}

fn tls(path: &Path) -> Result<Arc<rustls::ClientConfig>, BuildError> {
    let wrong = |why: String| bad("ca_file", format!("{}: {why}", path.display()));
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|e| wrong(e.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|e| wrong(e.to_string()))?;
        roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("no certificate in it".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| wrong(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn section(dir: &Path, mode: u32) -> Config {
        let path = dir.join("secret");
        let written = fs::write(&path, "word\n")
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)));
        assert!(written.is_ok());
        let text = format!(
            "user='a'\npassword_file='{0}'\ncanary_user='c'\ncanary_password_file='{0}'\nmirror_user='m'\n\
             canary_topic='can'\n[sites.rome]\nbootstrap='h:1'\nconnect='http://h:2'\nmirror_bootstrap='h:3'\n\
             [sites.fra]\nbootstrap='h:1, i:1'\nconnect='http://h:2/'\nmirror_bootstrap='h:3'\n",
            path.display()
        );
        match toml::from_str(&text) {
            Ok(config) => config,
            Err(e) => panic!("{e}"),
        }
    }

    fn group() -> GroupSpec {
        let text = "name='orders'\nsites=['rome','fra']\n[kafka]\ntopics=['t']\nproducers=['app']\n\
                    consumers=['app']\ngroups=['g']\nmirror='m0'\n";
        match toml::from_str(text) {
            Ok(spec) => spec,
            Err(e) => panic!("{e}"),
        }
    }

    fn fault(change: impl FnOnce(&mut Config)) -> String {
        let Ok(dir) = tempfile::tempdir() else { panic!("no folder") };
        let mut config = section(dir.path(), 0o600);
        change(&mut config);
        let Ok(site) = SiteId::new("rome") else { panic!("a good name") };
        check(&config, &group(), &site).err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn accepts_a_good_section_and_names_the_topic_after_the_group() {
        let Ok(dir) = tempfile::tempdir() else { panic!("no folder") };
        let Ok(site) = SiteId::new("fra") else { panic!("a good name") };
        let checked = check(&section(dir.path(), 0o600), &group(), &site);
        assert!(checked.is_ok_and(|c| c.canary_topic == "can-orders" && c.agent.password == "word"));
    }

    #[test]
    fn refuses_a_password_that_others_may_read() {
        let Ok(dir) = tempfile::tempdir() else { panic!("no folder") };
        let Ok(site) = SiteId::new("fra") else { panic!("a good name") };
        let refused = check(&section(dir.path(), 0o640), &group(), &site);
        assert!(refused.err().is_some_and(|e| e.to_string().contains("mode 640")));
    }

    #[test]
    fn refuses_what_could_not_work_with_the_key_and_the_value_found() {
        assert_eq!(fault(|_| {}), "");
        assert!(fault(|c| c.mirror_user = "app".into()).contains("mirror_user"));
        assert!(fault(|c| c.canary_user = "a".into()).contains("three principals"));
        assert!(fault(|c| c.sites.clear()).contains("rome"));
        for text in ["h", "h:", ":1", "h:1,", "h:99999"] {
            let told = fault(|c| c.sites.values_mut().for_each(|s| s.bootstrap = text.into()));
            assert!(told.contains("host:port"), "{text:?}: {told}");
        }
        assert!(
            fault(|c| c.sites.values_mut().for_each(|s| s.connect = "h:8083".into())).contains("http://")
        );
    }
}
