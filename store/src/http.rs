//! HTTP below every remote store: what the client library hides of a reply, and plain web servers as stores.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService, ReqwestConnector};
use object_store::http::HttpBuilder;
use object_store::{ClientOptions, Result};
use reqwest::header::{CONTENT_LENGTH, HeaderMap, RETRY_AFTER};
use reqwest::{Method, StatusCode};
use url::Url;

use crate::cloud::{TIMEOUT, no_retries};
use crate::error::{StoreError, chain};
use crate::limits::Throttled;
use crate::open::{Backend, bad};

/// The web server that `url` names, its files read-only; `shown` is the URL without secrets.
pub(crate) fn open(url: &Url, shown: &str) -> Result<Backend, StoreError> {
    let options = ClientOptions::new().with_allow_http(url.scheme() == "http").with_config(TIMEOUT.0, TIMEOUT.1);
    let builder = HttpBuilder::new().with_url(url.origin().ascii_serialization()).with_client_options(options).with_retry(no_retries());
    match builder.with_http_connector(Connector).build() {
        Ok(server) => Ok(Backend { object: Arc::new(server), parts: None, read_only: true }),
        Err(error) => Err(bad(shown, &format!("cannot be opened ({}); check the URL", chain(&error)))),
    }
}

/// Makes the client that every remote store uses.
#[derive(Debug)]
pub(crate) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        Ok(HttpClient::new(Client(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Client(HttpClient);

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let again = (request.method() == Method::HEAD).then(|| request.clone());
        let reply = self.0.execute(request).await?;
        let reply = match again {
            Some(again) if hides_size(&reply) => self.head_by_get(again).await?,
            _ => reply,
        };
        // The library drops the headers of a reply that is an error, so this one becomes an error of ours.
        let status = reply.status();
        let busy = status == StatusCode::TOO_MANY_REQUESTS || (status.is_server_error() && status != StatusCode::INSUFFICIENT_STORAGE);
        match busy.then(|| wait(reply.headers(), SystemTime::now())).flatten() {
            Some(after) => Err(HttpError::new(HttpErrorKind::Unknown, Throttled { status: status.as_u16(), after })),
            None => Ok(reply),
        }
    }
}

impl Client {
    /// A HEAD as a GET whose body is not read.
    async fn head_by_get(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        *request.method_mut() = Method::GET;
        self.0.execute(request).await
    }
}

/// Whether a reply to HEAD says nothing that one to GET may say: some servers have no HEAD, or leave the size out of it.
fn hides_size(reply: &HttpResponse) -> bool {
    let status = reply.status();
    let none = matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED);
    none || (status.is_success() && !reply.headers().contains_key(CONTENT_LENGTH))
}

/// The wait that a reply asks for: `Retry-After` in seconds or as a date (RFC 9110 §10.2.3).
fn wait(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_seconds_or_a_date_and_nothing_else() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        for (text, seconds) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("Wed, 21 Oct 2015 07:28:09 GMT", Some(9)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(0)),
            ("-3", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            assert_eq!(wait(&headers, now), seconds.map(Duration::from_secs), "{text:?}");
        }
        assert_eq!(wait(&HeaderMap::new(), now), None);
    }
}
