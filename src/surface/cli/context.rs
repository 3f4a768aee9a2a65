//! Contexts: which environment is meant, whom to ask, and who asks.
//!
//! ```toml
//! current = "prod"
//! [contexts.prod]
//! environment = "PROD payments"
//! ca = "ca.pem"                 # relative to this file
//! cert = "operator-olga.pem"
//! key = "operator-olga.key"     # mode 0600 or it is not used
//! [contexts.prod.agents]
//! rome = "10.1.0.1:7400"
//! fra = "10.2.0.1:7400"
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dc_core::fail::Fail;
use dc_core::ids::SiteId;
use dc_wire::tls::TlsFiles;
use serde::Deserialize;

use super::fails::usage;
use crate::spec_file::at;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    current: Option<String>,
    contexts: BTreeMap<String, Written>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    environment: String,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    agents: BTreeMap<SiteId, String>,
}

/// One context, ready to use.
#[derive(Debug)]
pub(crate) struct Context {
    /// Shown before every order.
    pub environment: String,
    /// Who asks.
    pub tls: TlsFiles,
    /// Whom to ask.
    pub agents: BTreeMap<SiteId, String>,
}

/// Reads the context to use.
///
/// Errors: DC-0004 without a readable file, and with the line for one that is not valid;
/// DC-0003 when the context meant is not in it.
pub(crate) fn load(file: Option<&Path>, name: Option<&str>) -> Result<Context, Fail> {
    let path = match file {
        Some(path) => path.to_owned(),
        None => default_file()?,
    };
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(&path).map_err(|e| {
        usage("DC-0004", format!("no contexts: {shown} cannot be read"), e.to_string())
            .next("dc-switch explain DC-0004")
    })?;
    parse(&text, &shown, path.parent().unwrap_or(Path::new(".")), name)
}

fn default_file() -> Result<PathBuf, Fail> {
    let folder = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let folder = folder.or_else(|| std::env::home_dir().map(|home| home.join(".config")));
    folder.map(|folder| folder.join("dc-switch/config.toml")).ok_or_else(|| {
        let why = "neither --config nor DC_SWITCH_CONFIG is given, and there is no home directory";
        usage("DC-0004", "no contexts", why).next("dc-switch explain DC-0004")
    })
}

fn parse(text: &str, shown: &str, folder: &Path, name: Option<&str>) -> Result<Context, Fail> {
    let invalid = |why: String| {
        usage("DC-0004", format!("{shown} is no usable file of contexts"), why)
            .next("dc-switch explain DC-0004")
    };
    let mut file: File = toml::from_str(text).map_err(|e| invalid(at(shown, text, e.span(), e.message())))?;
    let known = file.contexts.keys().cloned().collect::<Vec<_>>().join(", ");
    let missing = |why: String| {
        let why = format!("{why}; known: {}", if known.is_empty() { "none" } else { &known });
        usage("DC-0003", format!("no context chosen from {shown}"), why)
            .next("dc-switch status --context NAME")
    };
    let Some(name) = name.map(str::to_owned).or(file.current) else {
        return Err(missing("there is no key `current` and no --context".into()));
    };
    let Some(found) = file.contexts.remove(&name) else {
        return Err(missing(format!("there is no context {name:?}")));
    };
    if found.environment.trim().is_empty() {
        return Err(invalid(format!("contexts.{name}.environment is empty; it is shown before every order")));
    }
    if found.agents.is_empty() {
        return Err(invalid(format!("contexts.{name}.agents names no agent")));
    }
    let tls =
        TlsFiles { ca: folder.join(found.ca), cert: folder.join(found.cert), key: folder.join(found.key) };
    Ok(Context { environment: found.environment, tls, agents: found.agents })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "current = \"a\"\n[contexts.a]\nenvironment = \"LAB\"\nca = \"ca.pem\"\n\
                        cert = \"/x/c.pem\"\nkey = \"c.key\"\n[contexts.a.agents]\nrome = \"127.0.0.1:1\"\n";

    fn code(text: &str, name: Option<&str>) -> String {
        match parse(text, "f", Path::new("/etc/x"), name) {
            Ok(_) => String::new(),
            Err(fail) => format!("{} {}", fail.code, fail.why),
        }
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let read = parse(GOOD, "f", Path::new("/etc/x"), None);
        let paths = read.map(|c| (c.tls.ca, c.tls.cert)).ok();
        assert_eq!(paths, Some(("/etc/x/ca.pem".into(), "/x/c.pem".into())));
    }

    #[test]
    fn what_is_missing_or_unknown_is_named_with_its_line() {
        assert_eq!(code(GOOD, None), "");
        assert!(code(&GOOD.replace("environment", "enviroment"), None).starts_with("DC-0004 f:3: "));
        assert!(code(&GOOD.replace("environment = \"LAB\"\n", ""), None).contains("environment"));
        assert!(code(&GOOD.replace("rome", "Rome"), None).starts_with("DC-0004 f:8: "));
        assert!(code(GOOD, Some("b")).starts_with("DC-0003") && code(GOOD, Some("b")).contains("known: a"));
        assert!(code(&GOOD.replace("current = \"a\"\n", ""), None).starts_with("DC-0003"));
        assert!(code(&GOOD.replace("\"LAB\"", "\" \""), None).starts_with("DC-0004"));
    }
}
