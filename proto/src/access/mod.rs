//! How a coordinator is reached: its address, what is shown to it, and what that may do there.

mod role;
pub mod tls;
mod token;

pub use role::Role;
pub use tls::{ClientTls, PeerTls, TlsError, TlsFiles};
pub use token::{Token, TokenError};

use std::pin::Pin;

use crate::v1::coordinator_client::CoordinatorClient;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// The metadata key that a token is shown under.
const KEY: &str = "authorization";

/// Where a coordinator is, and what is shown to it.
#[derive(Clone, Debug)]
pub struct Access {
    /// Its gRPC address: `host:port`, `http://host:port` or `https://host:port`.
    pub url: String,
    /// Shown with every call. None: it is hoped to ask for none.
    pub token: Option<Token>,
    /// For `https://`.
    pub tls: Option<ClientTls>,
}

/// A future whose code is made where it is boxed.
type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A client whose every call shows the token, if there is one.
pub type Client = CoordinatorClient<InterceptedService<Channel, Access>>;

impl Access {
    /// The address with its scheme.
    pub fn full_url(&self) -> String {
        match (self.url.contains("://"), &self.tls) {
            (true, _) => self.url.clone(),
            (false, None) => format!("http://{}", self.url),
            (false, Some(_)) => format!("https://{}", self.url),
        }
    }

    /// The address as tonic has it.
    ///
    /// # Errors
    /// What is wrong with it, in words: it is none, or does not go with the certificates that are given.
    pub fn endpoint(&self) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from_shared(self.full_url()).map_err(|error| crate::with_causes(&error))?;
        match (endpoint.uri().scheme_str(), &self.tls) {
            (Some("https"), None) => Err("https:// needs the coordinator's CA: give --tls-ca (or ELLA_TLS_CA)".to_owned()),
            (Some("http"), Some(_)) => Err("certificates are given, and http:// would not use them: write https://".to_owned()),
            (Some("http" | "https"), _) => Ok(endpoint),
            _ => Err("expected http:// or https://".to_owned()),
        }
    }

    /// A client on a connection to this coordinator.
    ///
    /// # Errors
    /// If nobody answers there, or another than the certificates allow.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Client, tonic::transport::Error> {
        Ok(self.client(self.channel(endpoint).await?))
    }

    /// A connection to this coordinator.
    ///
    /// # Errors
    /// As [`Access::connect`].
    pub fn channel<'a>(&'a self, endpoint: &'a Endpoint) -> BoxFuture<'a, Result<Channel, tonic::transport::Error>> {
        // A future is compiled once more by every program that awaits it. What is in a box is compiled here alone: of HTTP/2 and TLS that is much.
        Box::pin(async move {
            match &self.tls {
                Some(tls) => endpoint.connect_with_connector(tls.clone()).await,
                None => endpoint.connect().await,
            }
        })
    }

    /// A client on a channel to this coordinator.
    pub fn client(&self, channel: Channel) -> Client {
        CoordinatorClient::with_interceptor(channel, self.clone())
    }
}

impl Interceptor for Access {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = self.token.as_ref().and_then(Token::bearer) {
            request.metadata_mut().insert(KEY, bearer);
        }
        Ok(request)
    }
}

impl From<String> for Access {
    fn from(url: String) -> Self {
        Self { url, token: None, tls: None }
    }
}

impl From<&String> for Access {
    fn from(url: &String) -> Self {
        url.clone().into()
    }
}

impl From<&str> for Access {
    fn from(url: &str) -> Self {
        url.to_owned().into()
    }
}

impl From<&Self> for Access {
    fn from(access: &Self) -> Self {
        access.clone()
    }
}
