//! `ella certs`: a CA of one's own, and certificates of it, to try TLS on or to run a small network with.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde::Serialize;

use crate::ui::{DONE, Fail, Out, note};

/// Clocks may be so far apart.
const SKEW: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Whose certificates are made beside the coordinator's: each is for the name ROLE.ella.
const ROLES: [&str; 3] = ["worker", "viewer", "admin"];

/// What is a host.
const HOST: &str = "it must be an address, or a name as in coordinator.example or *.example: between its dots 1 to 63 letters, digits, - and _, \
                    with no - at either end; without a scheme and a port";

/// What may do what, as `ella-coordinator --access` reads it.
const ACCESS: &str = "# Who may do what: docs/security.md says more.\n";

#[derive(Debug, Args)]
pub(crate) struct Certs {
    /// Folder that is made for them
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A name or address that the coordinator is reached by; may be given more than once
    #[arg(long, value_name = "NAME", required = true, value_parser = name)]
    host: Vec<String>,
    /// For so many days
    #[arg(long, default_value_t = 30, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3650))]
    days: u64,
}

#[derive(Debug, Serialize)]
struct Made {
    out: PathBuf,
    hosts: Vec<String>,
    days: u64,
    /// The folders, of which each has `tls.crt`, `tls.key` and `ca.crt`.
    identities: Vec<&'static str>,
}

/// A name or an address: with a scheme or a port, a certificate would never be for what it is reached by.
fn name(host: &str) -> Result<String, String> {
    let is_address = host.parse::<std::net::IpAddr>().is_ok();
    // A wildcard is the whole first part, or none.
    let is_name = host.len() <= 253 && host.strip_prefix("*.").unwrap_or(host).split('.').all(is_part);
    if is_address || is_name { Ok(host.to_owned()) } else { Err(HOST.to_owned()) }
}

/// Whether a name may have it between two dots: else the certificate is for nothing that a client would ask for.
fn is_part(part: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    (1..=63).contains(&part.len()) && part.chars().all(fits) && !part.starts_with('-') && !part.ends_with('-')
}

impl Certs {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        DirBuilder::new().recursive(false).mode(0o700).create(&self.out).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Fail::usage(format_args!("{}: is there already, and nothing is overwritten; choose another --out", self.out.display()))
            }
            _ => Fail::io(&self.out, "made", &error),
        })?;
        self.make().inspect_err(|_| self.unmake()).map_err(|error| match error {
            Trouble::Cert(error) => {
                Fail::usage(format_args!("--host {}: no certificate can be made for it ({error})", self.host.join(", ")))
            }
            Trouble::Io(path, error) => Fail::io(path, "written", &error),
        })?;
        let made = Made {
            out: self.out.clone(),
            hosts: self.host.clone(),
            days: self.days,
            identities: ["coordinator"].into_iter().chain(ROLES).collect(),
        };
        out.result(&made, || self.told());
        Ok(DONE)
    }

    fn make(&self) -> Result<(), Trouble> {
        let (params, key) = self.authority()?;
        let authority = params.self_signed(&key)?.pem();
        write(&self.out.join("ca"), "ca.crt", &authority)?;
        write(&self.out.join("ca"), "ca.key", &key.serialize_pem())?;
        let issuer = Issuer::new(params, key);
        let mut access = ACCESS.to_owned();
        self.identity("coordinator", self.host.clone(), (&issuer, &authority))?;
        for role in ROLES {
            let name = format!("{role}.ella");
            access += &format!("\n[[allow]]\nrole = \"{role}\"\ncertificate = \"{name}\"\n");
            self.identity(role, vec![name], (&issuer, &authority))?;
        }
        write(&self.out, "access.toml", &access)
    }

    /// Takes away the folder, which was made by this process: else a second try would find it there.
    fn unmake(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.out) {
            note(format_args!("{}: cannot be taken away again ({error}); remove it before the next try", self.out.display()));
        }
    }

    fn authority(&self) -> Result<(CertificateParams, KeyPair), Trouble> {
        let mut params = self.params("ella test CA", Vec::new())?;
        // It signs what speaks for itself, and no further CA.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok((params, KeyPair::generate()?))
    }

    /// A certificate of these names, that is good for both sides of a connection only where it is the coordinator's.
    fn identity(&self, name: &str, hosts: Vec<String>, (issuer, authority): (&Issuer<'_, KeyPair>, &str)) -> Result<(), Trouble> {
        let mut params = self.params(name, hosts)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if name == "coordinator" {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate()?;
        let folder = self.out.join(name);
        write(&folder, "tls.crt", &params.signed_by(&key, issuer)?.pem())?;
        write(&folder, "tls.key", &key.serialize_pem())?;
        write(&folder, "ca.crt", authority)
    }

    fn params(&self, name: &str, hosts: Vec<String>) -> Result<CertificateParams, Trouble> {
        let mut params = CertificateParams::new(hosts)?;
        let now = SystemTime::now();
        (params.not_before, params.not_after) = ((now - SKEW).into(), (now + DAY * u32::try_from(self.days).unwrap_or(1)).into());
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn told(&self) -> String {
        let at = |path: &str| self.out.join(path).display().to_string();
        let flags = |of: &str| {
            format!(
                "--tls-cert {} --tls-key {} --tls-ca {}",
                at(&format!("{of}/tls.crt")),
                at(&format!("{of}/tls.key")),
                at(&format!("{of}/ca.crt"))
            )
        };
        let host = self.host.first().map_or("", String::as_str);
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        format!(
            "certificates for {} days; whoever has {} can make more, so keep it away from the cluster\n\
             coordinator  ella-coordinator RUN.toml --listen ADDRESS:PORT {} --access {}\n\
             worker       ella-worker --coordinator https://{host}:PORT {}\n\
             viewer       ella status https://{host}:PORT {}\n\
             admin        ella drain WORKER https://{host}:PORT {}",
            self.days,
            at("ca/ca.key"),
            flags("coordinator"),
            at("access.toml"),
            flags("worker"),
            flags("viewer"),
            flags("admin"),
        )
    }
}

enum Trouble {
    Cert(rcgen::Error),
    Io(PathBuf, std::io::Error),
}

impl From<rcgen::Error> for Trouble {
    fn from(error: rcgen::Error) -> Self {
        Self::Cert(error)
    }
}

/// A new file that only its owner reads, in a folder that is made if it is not there.
fn write(folder: &Path, name: &str, text: &str) -> Result<(), Trouble> {
    let path = folder.join(name);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    let written = made.and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(text.as_bytes()));
    written.map_err(|error| Trouble::Io(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::USAGE;

    fn of(out: &Path, host: &str) -> Certs {
        Certs { out: out.to_owned(), host: vec![host.to_owned()], days: 1 }
    }

    #[test]
    fn a_host_that_will_not_do_leaves_nothing_in_the_way_of_the_next_try() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("certs");
        let fail = of(&out, "n\u{e4}me").run(Out { json: false }).unwrap_err();
        assert!(fail.code == USAGE && fail.message.contains("--host") && !out.exists(), "{fail:?}");
    }

    #[test]
    fn a_host_is_a_name_or_an_address() {
        let longest = "a".repeat(63);
        for host in ["localhost", "ella-0.ella", "10.0.0.1", "::1", "*.example", "_x.example", &longest] {
            assert!(name(host).is_ok(), "{host}");
        }
        let long = format!("{longest}a");
        for host in ["", "localhost:7000", "https://localhost", "[::1]", "a b", "..", "a..b", "a.", "-a", "a-.b", "*", "a.*", "a*.b", &long]
        {
            assert!(name(host).is_err_and(|error| error.contains("1 to 63 letters")), "{host}");
        }
    }

    #[test]
    fn an_address_of_ipv6_is_told_as_urls_have_it() {
        assert!(of(Path::new("certs"), "::1").told().contains("https://[::1]:PORT"));
        assert!(of(Path::new("certs"), "localhost").told().contains("https://localhost:PORT"));
    }
}
