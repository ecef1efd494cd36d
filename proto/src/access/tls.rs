//! Certificates from files, which are read again as they change, and connections that use them: TLS 1.3 only, without early data and
//! without resumption, so that nothing that was sent once can be sent again and every connection shows its certificate.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme, WantsVerifier};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::{Service, http::Uri};

/// How old what was read may be.
const FRESH: Duration = Duration::from_secs(2);
/// What workers speak with each other, as ALPN names it.
const SUMS: &str = "ella-reduce";
/// A certificate file is never as long as this.
const LONGEST_FILE: u64 = 1 << 20;
/// Files that change while they are read are read again so often: who replaces several does it within an instant.
const TRIES: usize = 5;

/// The files of one side: its own certificate (a chain) and key, and the CA's by which the other side's is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those that lead from it to its CA.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The certificates that others' must be signed by.
    pub ca: Option<PathBuf>,
}

/// Why there can be no TLS. Of a key nothing is told.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("{}: cannot be read ({source}); check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What it holds will not do.
    #[error("{}: {rule}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        rule: String,
    },
    /// A file is missing beside another.
    #[error("{missing} is missing: {why}")]
    Incomplete {
        /// The option.
        missing: &'static str,
        /// The rule.
        why: &'static str,
    },
}

/// Who must show a certificate to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Whoever has one may show it, where the files have a CA to check it by.
    Optional,
    /// Everyone.
    Required,
}

/// What the files hold.
struct Pems {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

/// Makes a configuration of what the files hold.
type Make<C> = dyn Fn(&Pems) -> Result<C, TlsError> + Send + Sync;

/// A configuration of TLS, made anew when its files have changed. New connections have the newest; those that stand are not touched.
pub struct Reloaded<C> {
    files: TlsFiles,
    make: Box<Make<C>>,
    kept: Mutex<Kept<C>>,
    failed: AtomicU64,
}

struct Kept<C> {
    config: Arc<C>,
    /// Of the files, when they were last read.
    files: Option<blake3::Hash>,
    read: Instant,
}

impl<C> std::fmt::Debug for Reloaded<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reloaded").field(&self.files).finish()
    }
}

impl<C> Reloaded<C> {
    fn load(files: &TlsFiles, make: impl Fn(&Pems) -> Result<C, TlsError> + Send + Sync + 'static) -> Result<Self, TlsError> {
        let (pems, digest) = files.read()?;
        let kept = Kept { config: Arc::new(make(&pems)?), files: Some(digest), read: Instant::now() };
        Ok(Self { files: files.clone(), make: Box::new(make), kept: Mutex::new(kept), failed: AtomicU64::new(0) })
    }

    /// The newest. Files that will not do are told of in the log, and what was read before stays.
    pub fn newest(&self) -> Arc<C> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.read.elapsed() >= FRESH {
            kept.read = Instant::now();
            self.refresh(&mut kept);
        }
        kept.config.clone()
    }

    /// How often the files had become such that will not do (KNOWN).
    pub fn failed_reloads(&self) -> u64 {
        self.newest();
        self.failed.load(Relaxed)
    }

    fn refresh(&self, kept: &mut Kept<C>) {
        let read = self.files.read();
        let digest = read.as_ref().ok().map(|(_, digest)| *digest);
        if digest == kept.files {
            return;
        }
        kept.files = digest;
        match read.and_then(|(pems, _)| (self.make)(&pems)) {
            Ok(config) => {
                kept.config = Arc::new(config);
                tracing::info!("the certificates were replaced: {}", self.files);
            }
            Err(error) => {
                self.failed.fetch_add(1, Relaxed);
                tracing::warn!("{error}; the certificates from before stay in use");
            }
        }
    }
}

impl std::fmt::Display for TlsFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<String> = [&self.cert, &self.key, &self.ca].into_iter().flatten().map(|path| path.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}

impl TlsFiles {
    /// Whether no file is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// All files as they are at one time: Kubernetes replaces them all at once, between two of our reads perhaps.
    fn read(&self) -> Result<(Pems, blake3::Hash), TlsError> {
        let mut before = None;
        for _ in 0..TRIES {
            let pems = Pems { cert: read(self.cert.as_deref())?, key: read(self.key.as_deref())?, ca: read(self.ca.as_deref())? };
            let digest = pems.digest();
            if before == Some(digest) {
                return Ok((pems, digest));
            }
            before = Some(digest);
        }
        let path = self.cert.clone().or_else(|| self.ca.clone()).unwrap_or_default();
        Err(TlsError::Unfit { path, rule: "it changes again and again while it is read".to_owned() })
    }

    fn chain(&self, pems: &Pems) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let unfit = |path: &Option<PathBuf>, rule: String| TlsError::Unfit { path: path.clone().unwrap_or_default(), rule };
        let chain = certificates(&pems.cert).map_err(|rule| unfit(&self.cert, rule))?;
        // The parser's own words might repeat what it read.
        let key =
            PrivateKeyDer::from_pem_slice(&pems.key).map_err(|_| unfit(&self.key, "expected a PEM file with one private key".into()))?;
        Ok((chain, key))
    }

    fn roots(&self, pems: &Pems) -> Result<RootCertStore, TlsError> {
        let unfit = |rule: String| TlsError::Unfit { path: self.ca.clone().unwrap_or_default(), rule };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&pems.ca).map_err(unfit)? {
            roots.add(certificate).map_err(|error| unfit(format!("a certificate in it is no CA's ({error})")))?;
        }
        Ok(roots)
    }

    /// Checks the certificates of those that call, and asks for one.
    fn client_verifier(&self, pems: &Pems, clients: Clients) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots(pems)?), provider());
        let verifier = if clients == Clients::Optional { verifier.allow_unauthenticated() } else { verifier };
        verifier.build().map_err(|error| TlsError::Unfit { path: self.ca.clone().unwrap_or_default(), rule: error.to_string() })
    }

    fn server(&self, pems: &Pems, clients: Clients, protocol: &str) -> Result<ServerConfig, TlsError> {
        let (chain, key) = self.chain(pems)?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| self.unfit(&error))?;
        let builder = match &self.ca {
            None => builder.with_no_client_auth(),
            Some(_) => builder.with_client_cert_verifier(self.client_verifier(pems, clients)?),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| self.unfit(&error))?;
        config.alpn_protocols = vec![protocol.into()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client_builder(&self) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsError> {
        ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).map_err(|error| self.unfit(&error))
    }

    fn client(
        &self,
        pems: &Pems,
        trusting: ConfigBuilder<ClientConfig, WantsClientCert>,
        protocol: &str,
    ) -> Result<ClientConfig, TlsError> {
        let mut config = match self.cert {
            None => trusting.with_no_client_auth(),
            Some(_) => {
                let (chain, key) = self.chain(pems)?;
                trusting.with_client_auth_cert(chain, key).map_err(|error| self.unfit(&error))?
            }
        };
        config.alpn_protocols = vec![protocol.into()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    fn peers(&self, pems: &Pems) -> Result<PeerTls, TlsError> {
        let verifier = PeerVerifier(self.client_verifier(pems, Clients::Required)?);
        let trusting = self.client_builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        Ok(PeerTls { calls: Arc::new(self.client(pems, trusting, SUMS)?), called: Arc::new(self.server(pems, Clients::Required, SUMS)?) })
    }

    /// What a certificate and its key have against each other, said of the certificate's file.
    fn unfit(&self, error: &rustls::Error) -> TlsError {
        TlsError::Unfit { path: self.cert.clone().unwrap_or_default(), rule: format!("cannot be used with its key ({error})") }
    }
}

impl Pems {
    fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.cert, &self.key, &self.ca] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.finalize()
    }
}

fn read(path: Option<&Path>) -> Result<Vec<u8>, TlsError> {
    use std::io::Read as _;
    let Some(path) = path else { return Ok(Vec::new()) };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LONGEST_FILE).read_to_end(&mut bytes));
    read.map_err(|source| TlsError::Unreadable { path: path.to_owned(), source })?;
    Ok(bytes)
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err("expected a PEM file with certificates".to_owned()),
    }
}

/// Checks a called worker's certificate as a calling one's is checked: the CA that signed it, its dates, and that it is good for a client.
/// Workers call each other at addresses that no certificate could name beforehand, and theirs are made for showing to a coordinator: many
/// would not do for a server's. Which of the CA's certificates belong to this generation is told by its greeting.
#[derive(Debug)]
struct PeerVerifier(Arc<dyn ClientCertVerifier>);

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify_client_cert(end_entity, intermediates, now).map(|_| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A server's side. `protocol`: what is spoken over it, as ALPN names it.
///
/// # Errors
/// If the certificate or its key is missing, or a file will not do.
pub fn server(files: &TlsFiles, clients: Clients, protocol: &'static str) -> Result<Reloaded<ServerConfig>, TlsError> {
    const WHY: &str = "a coordinator's certificate and its key go together, and --tls-ca is for checking others' beside them";
    if files.cert.is_none() {
        return Err(TlsError::Incomplete { missing: "--tls-cert", why: WHY });
    }
    if files.key.is_none() {
        return Err(TlsError::Incomplete { missing: "--tls-key", why: WHY });
    }
    let of = files.clone();
    Reloaded::load(files, move |pems| of.server(pems, clients, protocol))
}

/// A client's side: trusts the files' CA, and shows their certificate if there is one.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<Reloaded<Sides>>);

/// What a process speaks with its coordinator, and with its like.
#[derive(Debug)]
struct Sides {
    coordinator: Arc<ClientConfig>,
    peers: Option<PeerTls>,
}

/// Both sides of what workers speak with each other: each shows its certificate, and checks the other's by its own CA.
#[derive(Clone, Debug)]
pub struct PeerTls {
    /// Of the one that calls.
    pub calls: Arc<ClientConfig>,
    /// Of the one that is called.
    pub called: Arc<ServerConfig>,
}

impl ClientTls {
    /// Reads the files.
    ///
    /// # Errors
    /// If the CA is missing, a certificate is without its key, or a file will not do.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        if files.ca.is_none() {
            return Err(TlsError::Incomplete { missing: "--tls-ca", why: "without it no coordinator's certificate can be checked" });
        }
        if files.cert.is_some() != files.key.is_some() {
            let missing = if files.cert.is_some() { "--tls-key" } else { "--tls-cert" };
            return Err(TlsError::Incomplete { missing, why: "a certificate and its key go together" });
        }
        let of = files.clone();
        let sides = Reloaded::load(files, move |pems| {
            let trusting = of.client_builder()?.with_root_certificates(of.roots(pems)?);
            let coordinator = Arc::new(of.client(pems, trusting, "h2")?);
            let peers = of.cert.is_some().then(|| of.peers(pems)).transpose()?;
            Ok(Sides { coordinator, peers })
        })?;
        Ok(Self(Arc::new(sides)))
    }

    /// What is spoken with other workers, with the newest certificate; none without a certificate of one's own.
    pub fn peers(&self) -> Option<PeerTls> {
        self.0.newest().peers.clone()
    }
}

/// Opens a connection for tonic, each with the newest certificate.
impl Service<Uri> for ClientTls {
    type Response = hyper_util::rt::TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connector = TlsConnector::from(self.0.newest().coordinator.clone());
        Box::pin(async move {
            let host = to.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let stream = TcpStream::connect((host.as_str(), to.port_u16().unwrap_or(443))).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(host).map_err(std::io::Error::other)?;
            Ok(hyper_util::rt::TokioIo::new(connector.connect(name, stream).await?))
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, Connection, ServerConnection};
    use std::net::Ipv4Addr;

    /// Certificates of two CAs, which workers' own tests use.
    const CERTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../worker/src/reduce/tcp/certs");

    fn files(folder: &Path) -> TlsFiles {
        let [cert, key, ca] = ["tls.crt", "tls.key", "ca.crt"].map(|name| Some(folder.join(name)));
        TlsFiles { cert, key, ca }
    }

    /// As if enough time had passed since the files were read.
    fn later(tls: &ClientTls) -> PeerTls {
        let mut kept = tls.0.kept.lock().unwrap();
        kept.read = kept.read.checked_sub(FRESH).unwrap();
        drop(kept);
        tls.peers().unwrap()
    }

    fn pass(from: &mut Connection, to: &mut Connection) -> Result<(), rustls::Error> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(())
    }

    /// Whether these two get through a handshake, whoever calls.
    fn meet(one: &PeerTls, other: &PeerTls) -> bool {
        [(one, other), (other, one)].into_iter().all(|(calls, called)| {
            let mut calls = ClientConnection::new(calls.calls.clone(), Ipv4Addr::LOCALHOST.into()).unwrap().into();
            let mut called = ServerConnection::new(called.called.clone()).unwrap().into();
            (0..2).all(|_| pass(&mut calls, &mut called).and_then(|()| pass(&mut called, &mut calls)).is_ok())
        })
    }

    #[test]
    fn workers_meet_with_their_newest_certificates_and_broken_ones_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let [ours, others] = ["ours", "others"].map(|ca| ClientTls::load(&files(&Path::new(CERTS).join(ca))).unwrap().peers().unwrap());
        let put = |ca: &str| {
            for name in ["tls.crt", "tls.key", "ca.crt"] {
                std::fs::copy(Path::new(CERTS).join(ca).join(name), folder.path().join(name)).unwrap();
            }
        };
        put("ours");
        let tls = ClientTls::load(&files(folder.path())).unwrap();
        let before = tls.peers().unwrap();
        assert!(meet(&before, &ours) && !meet(&before, &others));
        put("others");
        let after = later(&tls);
        assert!(meet(&after, &others) && !meet(&after, &ours));
        std::fs::write(folder.path().join("tls.key"), "half of it").unwrap();
        assert!(meet(&later(&tls), &others));
        assert_eq!(tls.0.failed_reloads(), 1);
    }
}
