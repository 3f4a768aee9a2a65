//! A small authority of one's own: `cert init`, `cert issue`, `cert show`.
//!
//! The authority's key belongs offline; nothing here talks to a network, and nothing is
//! ever overwritten unless it is asked for by name.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::SiteId;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{Identity, Role};
use crate::tls::read_secret;

/// Clocks of two hosts may differ by this much at the start of a certificate's life.
const SKEW: Duration = Duration::minutes(5);
/// Longest life of a certificate, in days; the authority's too.
const DAYS_MAX: u32 = 3650;

/// Where an authority keeps its two files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaFiles {
    /// Given to every agent and operator.
    pub cert: PathBuf,
    /// Given to nobody; mode 0600.
    pub key: PathBuf,
}

impl CaFiles {
    /// The files of the authority in `folder`.
    pub fn within(folder: &Path) -> Self {
        Self { cert: folder.join("ca.pem"), key: folder.join("ca.key") }
    }
}

/// What `issue` is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// What the bearer may be.
    pub role: Role,
    /// The site of an agent; the person or script otherwise.
    pub name: String,
    /// Host names, for tools that check them.
    pub dns: Vec<String>,
    /// Addresses, for tools that check them.
    pub ips: Vec<IpAddr>,
    /// How long it is good, in days.
    pub days: u32,
    /// Whether a pair of that name may be replaced.
    pub replace: bool,
}

/// A pair that was issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key, mode 0600.
    pub key: PathBuf,
    /// The URI in it.
    pub identity: Identity,
    /// When it runs out, as in `2026-03-01T10:00:00Z`.
    pub expires: String,
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// The URI names in it; an agent or operator has exactly one.
    pub uris: Vec<String>,
    /// Host names and addresses.
    pub hosts: Vec<String>,
    /// Whether it may sign others.
    pub authority: bool,
    /// In hexadecimal, as a revocation would name it.
    pub serial: String,
    /// From when.
    pub starts: String,
    /// Until when.
    pub expires: String,
    /// Whether this host's clock lies between the two.
    pub in_force: bool,
    /// What it may be used for: `server`, `client`.
    pub uses: Vec<String>,
}

fn refused(code: &'static str, what: String, why: String, next: &str) -> Fail {
    Fail::refused(Code::from_text(code), what, why).next(next)
}

fn broken(what: &str, cause: &dyn std::error::Error) -> Fail {
    Fail::new(Code::from_text("DC-0108"), Exit::Unexpected, what, cause.to_string())
}

/// Makes an authority in `folder`: `ca.pem` and `ca.key`.
///
/// Repeat: refused, nothing is overwritten. Errors: DC-0107 when either file is there;
/// DC-0105 for a trust domain that is not valid; DC-0108 when a file cannot be written.
pub fn init(folder: &Path, trust_domain: &str, days: u32) -> Result<CaFiles, Fail> {
    let files = CaFiles::within(folder);
    for path in [&files.cert, &files.key] {
        if path.exists() {
            let what = format!("no authority was made in {}", folder.display());
            let why = format!("{} exists, and every certificate in use may hang on it", path.display());
            return Err(refused("DC-0107", what, why, "dc-switch cert issue, or another folder"));
        }
    }
    checked_identity(trust_domain, Role::Agent, "x")?;
    let (from, until) = life(days)?;
    let key = KeyPair::generate().map_err(|e| broken("making a key failed", &e))?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (from, until);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("dc-switch authority of {trust_domain}"));
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    let cert = params.self_signed(&key).map_err(|e| broken("signing failed", &e))?;
    fs::create_dir_all(folder).map_err(|e| broken(&format!("making {} failed", folder.display()), &e))?;
    write(&files.key, key.serialize_pem().as_bytes(), 0o600, false)?;
    write(&files.cert, cert.pem().as_bytes(), 0o644, false)?;
    Ok(files)
}

/// Issues a pair into `folder`, as `<role>-<name>.pem` and `<role>-<name>.key`.
///
/// Agents get a certificate for both ends of a connection, everyone else for the client's.
/// Repeat: refused unless `replace`. Errors: DC-0101 to DC-0103 about the authority's
/// files; DC-0105 for a name that is not valid; DC-0107 for a pair that is there; DC-0108.
pub fn issue(ca: &CaFiles, folder: &Path, order: &Order) -> Result<Issued, Fail> {
    let (issuer, trust_domain) = open(ca)?;
    let identity = checked_identity(&trust_domain, order.role, &order.name)?;
    if order.role == Role::Agent {
        SiteId::new(&order.name).map_err(|e| not_issued("DC-0105", e.to_string()))?;
    }
    let stem = format!("{}-{}", order.role, order.name);
    let (cert_path, key_path) = (folder.join(format!("{stem}.pem")), folder.join(format!("{stem}.key")));
    if !order.replace {
        for path in [&cert_path, &key_path] {
            if path.exists() {
                let what = format!("no certificate for {identity} was issued");
                return Err(refused("DC-0107", what, format!("{} exists", path.display()), "--replace"));
            }
        }
    }
    let (from, until) = life(order.days)?;
    let key = KeyPair::generate().map_err(|e| broken("making a key failed", &e))?;
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (from, until);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, stem);
    params.subject_alt_names = names(&identity, order)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if order.role == Role::Agent {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    let cert = params.signed_by(&key, &issuer).map_err(|e| broken("signing failed", &e))?;
    fs::create_dir_all(folder).map_err(|e| broken(&format!("making {} failed", folder.display()), &e))?;
    write(&key_path, key.serialize_pem().as_bytes(), 0o600, order.replace)?;
    write(&cert_path, cert.pem().as_bytes(), 0o644, order.replace)?;
    Ok(Issued { cert: cert_path, key: key_path, identity, expires: text(until) })
}

/// Reads what a certificate file says; of several certificates, the first.
///
/// Errors: DC-0103 when it cannot be read as one.
pub fn show(path: &Path) -> Result<Shown, Fail> {
    let der = read_cert(path)?;
    let (_, cert) = X509Certificate::from_der(&der).map_err(|e| unreadable(path, e.to_string()))?;
    let mut shown = Shown {
        uris: Vec::new(),
        hosts: Vec::new(),
        authority: cert.is_ca(),
        serial: cert.raw_serial_as_string().replace(':', ""),
        starts: text(cert.validity().not_before.to_datetime()),
        expires: text(cert.validity().not_after.to_datetime()),
        in_force: cert.validity().is_valid(),
        uses: Vec::new(),
    };
    if let Ok(Some(found)) = cert.subject_alternative_name() {
        for name in &found.value.general_names {
            match name {
                GeneralName::URI(uri) => shown.uris.push((*uri).to_owned()),
                GeneralName::DNSName(host) => shown.hosts.push((*host).to_owned()),
                GeneralName::IPAddress(bytes) => shown.hosts.push(address(bytes)),
                _ => {}
            }
        }
    }
    if let Ok(Some(usage)) = cert.extended_key_usage() {
        let may = [("server", usage.value.server_auth), ("client", usage.value.client_auth)];
        shown.uses = may.into_iter().filter(|(_, yes)| *yes).map(|(word, _)| word.to_owned()).collect();
    }
    Ok(shown)
}

fn open(ca: &CaFiles) -> Result<(Issuer<'static, KeyPair>, String), Fail> {
    let key = String::from_utf8(read_secret(&ca.key)?).map_err(|_| unreadable(&ca.key, "not PEM".into()))?;
    let key = KeyPair::from_pem(&key).map_err(|e| unreadable(&ca.key, e.to_string()))?;
    let shown = show(&ca.cert)?;
    let trust_domain = match shown.uris.as_slice() {
        [uri] => uri.strip_prefix("spiffe://").map(str::to_owned),
        _ => None,
    };
    let trust_domain = trust_domain.ok_or_else(|| {
        unreadable(
            &ca.cert,
            "it names no trust domain; only `dc-switch cert init` makes one that does".into(),
        )
    })?;
    let der = read_cert(&ca.cert)?;
    let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| unreadable(&ca.cert, e.to_string()))?;
    Ok((issuer, trust_domain))
}

fn names(identity: &Identity, order: &Order) -> Result<Vec<SanType>, Fail> {
    let mut names = vec![uri(&identity.to_string())?];
    for host in &order.dns {
        let bad = |e: rcgen::Error| not_issued("DC-0108", format!("host name {host:?} is not valid: {e}"));
        names.push(SanType::DnsName(host.clone().try_into().map_err(bad)?));
    }
    names.extend(order.ips.iter().copied().map(SanType::IpAddress));
    Ok(names)
}

fn uri(text: &str) -> Result<SanType, Fail> {
    let text = text.to_owned().try_into().map_err(|e: rcgen::Error| not_issued("DC-0105", e.to_string()))?;
    Ok(SanType::URI(text))
}

fn checked_identity(trust_domain: &str, role: Role, name: &str) -> Result<Identity, Fail> {
    Identity::new(trust_domain, role, name).map_err(|e| not_issued("DC-0105", e.to_string()))
}

fn not_issued(code: &'static str, why: String) -> Fail {
    refused(code, "no certificate was made".into(), why, "dc-switch cert issue --help")
}

fn life(days: u32) -> Result<(OffsetDateTime, OffsetDateTime), Fail> {
    if days == 0 || days > DAYS_MAX {
        return Err(not_issued("DC-0108", format!("{days} days asked, 1 to {DAYS_MAX} are possible")));
    }
    let now = OffsetDateTime::now_utc();
    Ok((now - SKEW, now + Duration::days(i64::from(days))))
}

fn unreadable(path: &Path, why: String) -> Fail {
    let what = format!("{} cannot be used", path.display());
    Fail::new(Code::from_text("DC-0103"), Exit::Usage, what, why).next("dc-switch cert init")
}

fn read_cert(path: &Path) -> Result<CertificateDer<'static>, Fail> {
    let text = fs::read(path).map_err(|e| unreadable(path, e.to_string()))?;
    CertificateDer::from_pem_slice(&text).map_err(|e| unreadable(path, e.to_string()))
}

fn address(bytes: &[u8]) -> String {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(four).to_string()
    } else if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        IpAddr::from(sixteen).to_string()
    } else {
        format!("{bytes:?}")
    }
}

fn text(moment: OffsetDateTime) -> String {
    let moment = moment.to_offset(time::UtcOffset::UTC);
    let (year, month, day) = (moment.year(), u8::from(moment.month()), moment.day());
    let (hour, minute, second) = (moment.hour(), moment.minute(), moment.second());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Writes a file so that it is there whole or not at all, never wider than `mode`.
fn write(path: &Path, content: &[u8], mode: u32, replace: bool) -> Result<(), Fail> {
    let draft = path.with_extension("draft");
    let done = (|| -> io::Result<()> {
        if draft.exists() {
            fs::remove_file(&draft)?; // left by a run that died here
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        if replace {
            fs::rename(&draft, path)
        } else {
            fs::hard_link(&draft, path)?; // fails where a file already is
            fs::remove_file(&draft)
        }
    })();
    done.map_err(|e| broken(&format!("writing {} failed", path.display()), &e))
}
