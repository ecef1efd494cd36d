//! S3, Google Cloud Storage and Azure Blob. Credentials, region and endpoint come from each cloud's usual environment variables.

use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::multipart::MultipartStore;
use object_store::{ClientConfigKey, ObjectStore, Result, RetryConfig};
use url::Url;

use crate::error::{StoreError, chain};
use crate::http::Connector;
use crate::open::{Backend, bad};

/// Deadlines are ours; the client's own would cut a long read off.
pub(crate) const TIMEOUT: (ClientConfigKey, &str) = (ClientConfigKey::Timeout, "1 day");

/// The bucket or container that `url` names; `shown` is the URL without secrets.
pub(crate) fn open(url: &Url, shown: &str) -> Result<Backend, StoreError> {
    let Some(bucket) = url.host_str().filter(|host| !host.is_empty()) else {
        return Err(bad(shown, "no bucket or container named; write it as SCHEME://BUCKET/FOLDER"));
    };
    let opened = match url.scheme() {
        "s3" => s3(AmazonS3Builder::from_env(), bucket),
        "gs" => gs(GoogleCloudStorageBuilder::from_env(), bucket),
        _ => az(MicrosoftAzureBuilder::from_env(), bucket),
    };
    opened.map_err(|error| bad(shown, &format!("cannot be opened ({}); set the cloud's usual environment variables", chain(&error))))
}

/// Retries are ours: a hidden retry of a create would make a lost reply look like a lost race.
pub(crate) fn no_retries() -> RetryConfig {
    // The HTTP client takes the process's TLS provider. An error here means that there is one already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn backend(store: impl ObjectStore + MultipartStore) -> Backend {
    let store = Arc::new(store);
    Backend { object: Arc::clone(&store) as _, parts: Some(store), read_only: false }
}

fn s3(builder: AmazonS3Builder, bucket: &str) -> Result<Backend> {
    let builder = builder.with_bucket_name(bucket).with_retry(no_retries()).with_http_connector(Connector);
    Ok(backend(builder.with_config(AmazonS3ConfigKey::Client(TIMEOUT.0), TIMEOUT.1).build()?))
}

fn gs(builder: GoogleCloudStorageBuilder, bucket: &str) -> Result<Backend> {
    let builder = builder.with_bucket_name(bucket).with_retry(no_retries()).with_http_connector(Connector);
    Ok(backend(builder.with_config(GoogleConfigKey::Client(TIMEOUT.0), TIMEOUT.1).build()?))
}

fn az(builder: MicrosoftAzureBuilder, bucket: &str) -> Result<Backend> {
    let builder = builder.with_container_name(bucket).with_retry(no_retries()).with_http_connector(Connector);
    Ok(backend(builder.with_config(AzureConfigKey::Client(TIMEOUT.0), TIMEOUT.1).build()?))
}

#[cfg(test)]
mod tests;
