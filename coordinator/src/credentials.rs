//! What a process shows a coordinator, as its command line or environment has it.

use clap::Args;
use ella_proto::access::{Access, ClientTls, TlsError, TlsFiles, Token, TokenError};
use ella_store::redacted;
use std::path::PathBuf;

/// The environment variables of these options, which name files and hold no secrets.
pub const VARIABLES: [&str; 4] = ["ELLA_TOKEN_FILE", "ELLA_TLS_CERT", "ELLA_TLS_KEY", "ELLA_TLS_CA"];

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A token's file will not do.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A certificate's files will not do.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address does not go with what is given.
    #[error("{url}: {rule}")]
    Unfit {
        /// The address.
        url: String,
        /// What goes with it.
        rule: String,
    },
    /// The address holds more than an address, which errors, logs and files would tell.
    #[error("{host}: a coordinator's address has no user, password, query or fragment; what it asks for is in a file: --token-file PATH")]
    Address {
        /// What is left of it without those.
        host: String,
    },
}

/// Files of what is shown to a coordinator, or asked for by one. All are read again when they change.
#[derive(Clone, Debug, Default, Args)]
pub struct Credentials {
    /// The file of the token that the coordinator asks for; a coordinator asks for what its own has
    #[arg(long, value_name = "PATH", env = "ELLA_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// This side's certificate (PEM, its chain after it), for https://
    #[arg(long, value_name = "PATH", env = "ELLA_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, value_name = "PATH", env = "ELLA_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// The CA that the other side's certificate must be signed by (PEM)
    #[arg(long, value_name = "PATH", env = "ELLA_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
}

impl Credentials {
    /// The files of certificates.
    pub fn tls_files(&self) -> TlsFiles {
        TlsFiles { cert: self.tls_cert.clone(), key: self.tls_key.clone(), ca: self.tls_ca.clone() }
    }

    /// How the coordinator at this address is reached.
    ///
    /// # Errors
    /// If a file will not do, a secret stands in the address, or it is none that goes with the files.
    pub fn access(&self, url: &str) -> Result<Access, CredentialError> {
        if url.contains(['@', '?', '#']) {
            let has_scheme = url.starts_with("http://") || url.starts_with("https://");
            let host = if has_scheme { redacted(url) } else { redacted(&format!("http://{url}")) };
            return Err(CredentialError::Address { host });
        }
        let access = Access { url: url.to_owned(), ..self.unaddressed()? };
        match access.endpoint() {
            Ok(_) => Ok(access),
            Err(rule) => Err(CredentialError::Unfit { url: url.to_owned(), rule }),
        }
    }

    /// The same for a coordinator whose address is not known yet.
    ///
    /// # Errors
    /// If a file will not do.
    pub fn unaddressed(&self) -> Result<Access, CredentialError> {
        let token = self.token_file.as_deref().map(Token::load).transpose()?;
        let files = self.tls_files();
        let tls = if files.is_empty() { None } else { Some(ClientTls::load(&files)?) };
        Ok(Access { url: String::new(), token, tls })
    }

    /// What a process that is started here is told: where the secrets are, for its arguments are anyone's to read.
    pub fn arguments(&self) -> Vec<String> {
        let options =
            [("--token-file", &self.token_file), ("--tls-cert", &self.tls_cert), ("--tls-key", &self.tls_key), ("--tls-ca", &self.tls_ca)];
        let given = options.into_iter().filter_map(|(name, path)| Some([name.to_owned(), path.as_ref()?.display().to_string()]));
        given.flatten().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_does_not_go_with_what_is_given_is_refused() {
        for (url, rule) in [("https://host:1", "--tls-ca"), ("ftp://host:1", "http://"), ("http://", "")] {
            let said = Credentials::default().access(url).map(|access| access.url).unwrap_err().to_string();
            assert!(said.contains(url) && said.contains(rule), "{said}");
        }
        assert_eq!(Credentials::default().access("host:1").unwrap().url, "host:1");
    }

    #[test]
    fn a_secret_in_an_address_is_refused_and_not_told() {
        for url in ["http://user:hunter2@host:1", "hunter2@host:1", "https://host:1?token=hunter2", "host:1#hunter2"] {
            let said = Credentials::default().access(url).map(|access| access.url).unwrap_err().to_string();
            assert!(said.contains("host:1") && said.contains("--token-file") && !said.contains("hunter2"), "{said}");
        }
        // Where a password holds what should be escaped, nobody knows where it ends.
        for url in ["http://user:hunter2/x@host:1", "user:hunter2?x@host:1", "https://user:x#hunter2@host:1", "ftp://user:hunter2@host"] {
            let said = Credentials::default().access(url).map(|access| access.url).unwrap_err().to_string();
            assert!(said.contains("--token-file") && !said.contains("hunter2"), "{said}");
        }
    }
}
