//! Who someone is: one URI in a certificate, read strictly.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What a certificate's bearer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The agent of a site; its name is the site's.
    Agent,
    /// A person or script that may order runs.
    Operator,
    /// A person or script that may only look.
    Viewer,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 3] = [Self::Agent, Self::Operator, Self::Viewer];

    /// The word in the URI.
    pub fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl FromStr for Role {
    type Err = BadIdentity;
    fn from_str(given: &str) -> Result<Self, BadIdentity> {
        Self::ALL
            .into_iter()
            .find(|role| role.word() == given)
            .ok_or_else(|| BadIdentity::Role(given.to_owned()))
    }
}

/// `spiffe://<trust domain>/dc-switch/<role>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    trust_domain: String,
    role: Role,
    name: String,
}

/// A certificate or URI that names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadIdentity {
    /// Not of the one form.
    #[error("{0:?} is not of the form spiffe://<trust domain>/dc-switch/<role>/<name>")]
    Form(String),
    /// Not a role.
    #[error("role {0:?} is none of agent, operator, viewer")]
    Role(String),
    /// A part with letters that do not belong.
    #[error(
        "{what} {given:?} is not valid: 1 to {longest} of a-z, 0-9, {marks}, starting with a letter or digit"
    )]
    Part {
        /// Which part.
        what: &'static str,
        /// As found.
        given: String,
        /// Longest allowed.
        longest: usize,
        /// Other characters allowed.
        marks: &'static str,
    },
    /// Not exactly one URI in the certificate.
    #[error("the certificate has {0} URI names, exactly 1 is needed")]
    Count(usize),
    /// Not a certificate.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
}

impl Identity {
    /// Checks the parts of an identity.
    ///
    /// Errors: a part that is empty, too long or has other characters.
    pub fn new(trust_domain: &str, role: Role, name: &str) -> Result<Self, BadIdentity> {
        plain("trust domain", trust_domain, 100, "'-' and '.'", |b| matches!(b, b'-' | b'.'))?;
        plain("name", name, 40, "'-'", |b| b == b'-')?;
        Ok(Self { trust_domain: trust_domain.to_owned(), role, name: name.to_owned() })
    }

    /// Whose authority says so, as in `example.org`.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }
    /// What its bearer may be.
    pub fn role(&self) -> Role {
        self.role
    }
    /// The site of an agent; the person or script otherwise.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads the identity of a certificate.
    ///
    /// Errors: none or several URI names, or one of another form. Other names do not count.
    /// Source: SPIFFE X509-SVID, "URI SAN": exactly one, anything else must be rejected.
    pub fn of_certificate(der: &[u8]) -> Result<Self, BadIdentity> {
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| BadIdentity::Unreadable(e.to_string()))?;
        let names = cert.subject_alternative_name().map_err(|e| BadIdentity::Unreadable(e.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        match uris.as_slice() {
            [uri] => uri.parse(),
            several => Err(BadIdentity::Count(several.len())),
        }
    }
}

fn plain(
    what: &'static str,
    given: &str,
    longest: usize,
    marks: &'static str,
    mark: impl Fn(u8) -> bool,
) -> Result<(), BadIdentity> {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let starts = given.bytes().next().is_some_and(word);
    if starts && given.len() <= longest && given.bytes().all(|b| word(b) || mark(b)) && !given.contains("..")
    {
        Ok(())
    } else {
        Err(BadIdentity::Part { what, given: given.to_owned(), longest, marks })
    }
}

impl FromStr for Identity {
    type Err = BadIdentity;
    fn from_str(uri: &str) -> Result<Self, BadIdentity> {
        let form = || BadIdentity::Form(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        match rest.split('/').collect::<Vec<_>>().as_slice() {
            [domain, "dc-switch", role, name] => Self::new(domain, role.parse()?, name),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/dc-switch/{}/{}", self.trust_domain, self.role, self.name)
    }
}

impl TryFrom<String> for Identity {
    type Error = BadIdentity;
    fn try_from(uri: String) -> Result<Self, BadIdentity> {
        uri.parse()
    }
}
impl From<Identity> for String {
    fn from(identity: Identity) -> String {
        identity.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_every_uri_that_is_not_written_the_one_way() {
        for bad in [
            "",
            "spiffe://lab/dc-switch/agent",
            "spiffe://lab/dc-switch/agent/rome/x",
            "spiffe://lab/dc-switch/root/rome",
            "spiffe://lab/other/agent/rome",
            "spiffe://LAB/dc-switch/agent/rome",
            "spiffe://lab/dc-switch/agent/Rome",
            "spiffe://lab/dc-switch/agent/../agent/rome",
            "spiffe://lab/dc-switch/agent/ro%6de",
            "spiffe://la..b/dc-switch/agent/rome",
            "spiffe://lab/dc-switch/agent/",
            "https://lab/dc-switch/agent/rome",
            "spiffe://lab/dc-switch/agent/rome?x",
            "spiffe://lab:1/dc-switch/agent/rome",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn an_identity_reads_what_it_prints() {
        let uri = "spiffe://example.org/dc-switch/operator/ann";
        let read = uri.parse::<Identity>();
        assert_eq!(read.as_ref().map(ToString::to_string).as_deref(), Ok(uri));
        assert_eq!(read.map(|i| i.role()), Ok(Role::Operator));
    }
}
