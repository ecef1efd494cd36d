//! The HTTP client, as every use of it is set up: the process's TLS provider, a deadline for connections, and a bearer's key that no log shows.

use std::time::Duration;

use reqwest::ClientBuilder;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(15);

/// A client that sends `key` with every request; `None` if it holds characters that no header may.
pub(crate) fn client(key: Option<&str>) -> Option<ClientBuilder> {
    // The HTTP client takes the process's TLS provider. An error here means that there is one already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut headers = HeaderMap::new();
    if let Some(key) = key {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    let agent = concat!("ella/", env!("CARGO_PKG_VERSION"));
    Some(reqwest::Client::builder().connect_timeout(CONNECT).default_headers(headers).user_agent(agent))
}

/// An error with its causes, and without its URL: the HTTP client's own words leave out what happened.
pub(crate) fn chain(error: reqwest::Error) -> String {
    format!("{:#}", anyhow::Error::from(error.without_url()))
}
