//! Mutual TLS 1.3, with the peer known by the one URI in its certificate.
//!
//! Addresses prove nothing here: a client accepts whoever holds the certificate of the
//! agent it wants to speak to, and a server accepts whoever its CA vouches for; what they
//! may do is `access`'s business. Sessions are never resumed, so every connection shows
//! its certificate. Files are read again on demand; a pair that does not fit is refused
//! and the old one stays in use.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::SiteId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{BadIdentity, Identity, Role};

/// Where the files of one identity are: the `[tls]` section of an agent, the context of a CLI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted; several while one is replaced.
    pub ca: PathBuf,
    /// Own certificate, with what lies between it and the authority.
    pub cert: PathBuf,
    /// Own key; readable by its owner alone.
    pub key: PathBuf,
}

/// Whom a client wants to speak to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// The agent of that site and nobody else.
    Agent(SiteId),
    /// Any agent of the own trust domain.
    AnyAgent,
}

/// One identity, ready to listen and to dial.
pub struct Tls {
    files: TlsFiles,
    loaded: ArcSwap<Loaded>,
}

struct Loaded {
    identity: Identity,
    expires: Duration,
    roots: Arc<RootCertStore>,
    own: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn fail(code: &'static str, what: String, why: String, next: &str) -> Fail {
    Fail::new(Code::from_text(code), Exit::Usage, what, why).next(next)
}

impl Tls {
    /// Reads and checks the three files.
    ///
    /// Errors: DC-0101 to DC-0105, each naming its file: missing, open to others, not
    /// readable as what it should be, not a pair or not signed by the CA, naming nobody.
    pub fn load(files: TlsFiles) -> Result<Self, Fail> {
        let loaded = ArcSwap::from_pointee(Loaded::read(&files)?);
        Ok(Self { files, loaded })
    }

    /// Reads the files again; handshakes from now on use them.
    ///
    /// Repeat: safe. Errors: as `load`, and what was in use stays in use.
    pub fn reload(&self) -> Result<(), Fail> {
        let fresh = Loaded::read(&self.files)?;
        let old = self.loaded.load();
        if fresh.identity != old.identity {
            let why = format!("it is {}, in use is {}", fresh.identity, old.identity);
            let what =
                format!("{} is of another identity; the old one stays in use", self.files.cert.display());
            return Err(fail("DC-0105", what, why, "restart the agent to change who it is"));
        }
        self.loaded.store(Arc::new(fresh));
        Ok(())
    }

    /// Who this is.
    pub fn identity(&self) -> Identity {
        self.loaded.load().identity.clone()
    }

    /// When the own certificate runs out, as time since 1970 UTC.
    pub fn expires(&self) -> Duration {
        self.loaded.load().expires
    }

    /// What the next accepted connection is to be shown.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.loaded.load().server.clone()
    }

    /// What the next dialled connection shows and demands.
    ///
    /// Errors: DC-0104 when the library refuses the pair, which `load` has ruled out.
    pub fn client_config(&self, expected: Expected) -> Result<Arc<ClientConfig>, Fail> {
        let loaded = self.loaded.load();
        let provider = provider();
        let verifier = AgentVerifier {
            roots: loaded.roots.clone(),
            trust_domain: loaded.identity.trust_domain().to_owned(),
            expected,
            provider: provider.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.unusable(&e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(loaded.own.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn unusable(&self, cause: &rustls::Error) -> Fail {
        let what = format!("{} cannot be used", self.files.cert.display());
        fail("DC-0104", what, cause.to_string(), "dc-switch cert issue")
    }
}

impl Loaded {
    fn read(files: &TlsFiles) -> Result<Self, Fail> {
        let key = read_key(&files.key)?;
        let roots = Arc::new(read_roots(&files.ca)?);
        let chain = read_certificates(&files.cert)?;
        let leaf = chain.first().cloned().ok_or_else(|| no_certificate(&files.cert))?;
        let (identity, expires) = read_identity(&files.cert, &leaf)?;
        let pair = |why: String| {
            let what =
                format!("{} and {} cannot be used together", files.cert.display(), files.key.display());
            fail("DC-0104", what, why, "dc-switch cert issue")
        };
        let own = CertifiedKey::from_der(chain.clone(), key, &provider()).map_err(|e| pair(e.to_string()))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|e| pair(e.to_string()))?;
        let now = UnixTime::now();
        let between = chain.get(1..).unwrap_or_default();
        verifier.verify_client_cert(&leaf, between, now).map_err(|e| pair(plainly(&e, &files.ca)))?;
        if identity.role() == Role::Agent {
            let own_name = SiteId::new(identity.name()).map_err(|e| pair(e.to_string()))?;
            let check = AgentVerifier {
                roots: roots.clone(),
                trust_domain: identity.trust_domain().to_owned(),
                expected: Expected::Agent(own_name),
                provider: provider(),
            };
            check.verify(&leaf, between, now).map_err(|e| pair(plainly(&e, &files.ca)))?;
        }
        let own = Arc::new(own);
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| pair(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(own.clone())));
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { identity, expires, roots, own, server: Arc::new(server) })
    }
}

/// The library's words for what an operator can act on.
fn plainly(cause: &rustls::Error, ca: &Path) -> String {
    match cause {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("the certificate is not signed by an authority in {}", ca.display())
        }
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "the certificate has expired".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "the certificate is not valid yet by this host's clock".to_owned(),
        other => other.to_string(),
    }
}

/// Reads a secret that only its owner may be able to read.
///
/// Errors: DC-0101 when it is missing or unreadable, DC-0102 when group or world have any
/// right to it. Neither names a byte of it.
pub fn read_secret(path: &Path) -> Result<Vec<u8>, Fail> {
    let missing = |e: std::io::Error| {
        let what = format!("key file {} cannot be read", path.display());
        fail("DC-0101", what, e.to_string(), "dc-switch cert issue")
    };
    let facts = fs::metadata(path).map_err(missing)?;
    let mode = facts.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        let what = format!("key file {} is open to others", path.display());
        let why = format!("its mode is {mode:04o} (owner uid {}), at most 0600 is allowed", facts.uid());
        return Err(fail("DC-0102", what, why, &format!("chmod 600 {}", path.display())));
    }
    fs::read(path).map_err(missing)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, Fail> {
    PrivateKeyDer::from_pem_slice(&read_secret(path)?).map_err(|_| {
        let what = format!("key file {} holds no key", path.display());
        fail("DC-0103", what, "no PEM block of a private key was found".into(), "dc-switch cert issue")
    })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Fail> {
    let unreadable = |why: String| {
        let what = format!("certificate file {} cannot be read", path.display());
        fail("DC-0103", what, why, "dc-switch cert issue")
    };
    let text = fs::read(path).map_err(|e| unreadable(e.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|e| unreadable(e.to_string()))?;
    if found.is_empty() { Err(no_certificate(path)) } else { Ok(found) }
}

fn no_certificate(path: &Path) -> Fail {
    let what = format!("certificate file {} holds no certificate", path.display());
    fail("DC-0103", what, "no PEM block of a certificate was found".into(), "dc-switch cert issue")
}

fn read_roots(path: &Path) -> Result<RootCertStore, Fail> {
    let mut roots = RootCertStore::empty();
    for cert in read_certificates(path)? {
        roots.add(cert).map_err(|e| {
            let what = format!("{} holds a certificate that is no authority", path.display());
            fail("DC-0103", what, e.to_string(), "dc-switch cert init")
        })?;
    }
    Ok(roots)
}

fn read_identity(path: &Path, leaf: &CertificateDer<'_>) -> Result<(Identity, Duration), Fail> {
    let nobody = |why: BadIdentity| {
        let what = format!("certificate {} names nobody", path.display());
        fail("DC-0105", what, why.to_string(), "dc-switch cert issue")
    };
    let identity = Identity::of_certificate(leaf).map_err(nobody)?;
    let expires = expiry(leaf).map_err(nobody)?;
    Ok((identity, expires))
}

/// When a certificate runs out, as time since 1970 UTC.
///
/// Errors: `Unreadable`.
pub(crate) fn expiry(der: &[u8]) -> Result<Duration, BadIdentity> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| BadIdentity::Unreadable(e.to_string()))?;
    Ok(Duration::from_secs(u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0)))
}

/// A server that is not the agent one wanted.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found}, wanted was {wanted}")]
struct WrongPeer {
    found: String,
    wanted: String,
}

/// Accepts the expected agent, wherever it answers.
#[derive(Debug)]
struct AgentVerifier {
    roots: Arc<RootCertStore>,
    trust_domain: String,
    expected: Expected,
    provider: Arc<CryptoProvider>,
}

impl AgentVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, between, now, algorithms)?;
        let identity = Identity::of_certificate(leaf).map_err(other)?;
        let named = match &self.expected {
            Expected::Agent(site) => identity.name() == site.as_str(),
            Expected::AnyAgent => true,
        };
        if named && identity.role() == Role::Agent && identity.trust_domain() == self.trust_domain {
            Ok(())
        } else {
            let wanted = match &self.expected {
                Expected::Agent(site) => format!("the agent of {site} in {}", self.trust_domain),
                Expected::AnyAgent => format!("an agent in {}", self.trust_domain),
            };
            Err(other(WrongPeer { found: identity.to_string(), wanted }))
        }
    }
}

fn other(cause: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(cause))))
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _address: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, between, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 is the only version spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
