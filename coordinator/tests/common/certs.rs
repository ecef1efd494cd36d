//! Certificates for a test: a CA, and files of what it signs.

use ella_proto::access::{ClientTls, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use std::path::Path;

pub struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "a test's CA");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Writes a certificate for this name, its key, and this CA as that of the others.
    pub fn write(&self, folder: &Path, name: &str) -> TlsFiles {
        self.write_until(folder, name, 4096)
    }

    /// The same, for one that ended long ago.
    pub fn write_expired(&self, folder: &Path, name: &str) -> TlsFiles {
        self.write_until(folder, name, 2001)
    }

    fn write_until(&self, folder: &Path, name: &str, year: i32) -> TlsFiles {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(2000, 1, 1), rcgen::date_time_ymd(year, 1, 1));
        let key = KeyPair::generate().unwrap();
        let files = TlsFiles { cert: Some(folder.join("tls.crt")), key: Some(folder.join("tls.key")), ca: Some(folder.join("ca.crt")) };
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("tls.crt"), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
        std::fs::write(folder.join("ca.crt"), &self.pem).unwrap();
        files
    }

    /// One who shows a certificate of this CA's, and trusts it.
    pub fn client(&self, folder: &Path, name: &str) -> ClientTls {
        ClientTls::load(&self.write(&folder.join(name), name)).unwrap()
    }
}
