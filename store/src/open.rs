//! From a URL to a store.

use std::path::{Component, Path as FilePath, PathBuf};
use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{DynObjectStore, Error};
use url::Url;

use crate::error::StoreError;

/// A backend, and where in it the folder lies.
pub(crate) struct Opened {
    pub(crate) object: Arc<DynObjectStore>,
    pub(crate) folder: Path,
    pub(crate) url: String,
    pub(crate) local: Option<PathBuf>,
}

/// Opens a plain path, or a `file://`, `memory://`, `s3://`, `gs://` or `az://` URL.
pub(crate) fn open(text: &str) -> Result<Opened, StoreError> {
    if text.is_empty() {
        return Err(bad("(empty)", "no path or URL given; name a folder, or a URL such as s3://bucket/folder"));
    }
    if !text.contains("://") {
        return open_local(FilePath::new(text));
    }
    let url = Url::parse(text)
        .map_err(|error| bad(&redacted(text), &format!("not a URL ({error}); write it as s3://bucket/folder or as a plain path")))?;
    let shown = redacted(text);
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(bad(&shown, "a store URL holds a bucket and a folder only; give credentials and options in the environment"));
    }
    match url.scheme() {
        "file" => open_local(&url.to_file_path().map_err(|()| bad(&shown, "not a local path; write it as file:///folder"))?),
        "memory" => Ok(Opened { object: Arc::new(InMemory::new()), folder: folder_of(&url, &shown)?, url: shown, local: None }),
        "s3" | "gs" | "az" => open_cloud(&url, &shown),
        other => Err(bad(&shown, &format!("unknown scheme {other} (expected file, s3, gs, az or memory)"))),
    }
}

/// The URL without user, password, query and fragment, and without a trailing slash.
fn redacted(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    let text = match text.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        None => text.to_owned(),
    };
    if text.ends_with("://") { text } else { text.trim_end_matches('/').to_owned() }
}

fn open_local(path: &FilePath) -> Result<Opened, StoreError> {
    let shown = path.display().to_string();
    let local = absolute(path).map_err(|error| bad(&shown, &format!("cannot be made an absolute path ({error})")))?;
    let text = local.to_str().ok_or_else(|| bad(&shown, "a store's path must be UTF-8"))?;
    let folder = Path::parse(text).map_err(|error| bad(&shown, &error.to_string()))?;
    if local.exists() && !local.is_dir() {
        return Err(bad(&shown, "a file is there (expected a folder, or nothing); choose another path"));
    }
    // The root is the file system's, so that the folder need not exist before the first write.
    let object = Arc::new(LocalFileSystem::new().with_fsync(true));
    Ok(Opened { object, folder, url: text.to_owned(), local: Some(local) })
}

/// Absolute, with `..` resolved as the file system would (through links, where the folder exists).
fn absolute(path: &FilePath) -> std::io::Result<PathBuf> {
    let mut out = PathBuf::new();
    for part in std::path::absolute(path)?.components() {
        match part {
            Component::ParentDir => {
                out = out.canonicalize().unwrap_or(out);
                out.pop();
            }
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    Ok(out)
}

fn folder_of(url: &Url, shown: &str) -> Result<Path, StoreError> {
    Path::from_url_path(url.path()).map_err(|error| bad(shown, &error.to_string()))
}

fn bad(url: &str, reason: &str) -> StoreError {
    StoreError::BadUrl { url: url.to_owned(), reason: reason.to_owned() }
}

#[cfg(not(feature = "cloud"))]
fn open_cloud(_: &Url, shown: &str) -> Result<Opened, StoreError> {
    Err(StoreError::Unsupported {
        url: shown.to_owned(),
        what: "this build has no cloud stores; build with the feature `cloud`, or use a local folder".into(),
    })
}

/// Credentials, region and endpoint come from each cloud's usual environment variables.
#[cfg(feature = "cloud")]
fn open_cloud(url: &Url, shown: &str) -> Result<Opened, StoreError> {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
    use object_store::{ClientConfigKey, RetryConfig};

    // An error means that a provider is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Some(bucket) = url.host_str().filter(|host| !host.is_empty()) else {
        return Err(bad(shown, "no bucket or container named; write it as SCHEME://BUCKET/FOLDER"));
    };
    // Retries and deadlines are ours: a hidden retry of a create would make a lost reply look like a lost race.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let (timeout, longest) = (ClientConfigKey::Timeout, "1 day");
    let opened: Result<Arc<DynObjectStore>, Error> = match url.scheme() {
        "s3" => AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_config(AmazonS3ConfigKey::Client(timeout), longest)
            .build()
            .map(|store| Arc::new(store) as _),
        "gs" => GoogleCloudStorageBuilder::from_env()
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_config(GoogleConfigKey::Client(timeout), longest)
            .build()
            .map(|store| Arc::new(store) as _),
        _ => MicrosoftAzureBuilder::from_env()
            .with_container_name(bucket)
            .with_retry(retry)
            .with_config(AzureConfigKey::Client(timeout), longest)
            .build()
            .map(|store| Arc::new(store) as _),
    };
    let object = opened.map_err(|error: Error| {
        bad(shown, &format!("cannot be opened ({}); set the cloud's usual environment variables", crate::error::chain(&error)))
    })?;
    Ok(Opened { object, folder: folder_of(url, shown)?, url: shown.to_owned(), local: None })
}
