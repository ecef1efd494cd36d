//! From a URL to a store.

use std::path::{Component, Path as FilePath, PathBuf};
use std::sync::Arc;

use object_store::DynObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use url::Url;

#[cfg(feature = "cloud")]
use crate::cloud;
use crate::error::StoreError;
#[cfg(feature = "cloud")]
use crate::http;

/// What a store's URL must not hold.
const UNADORNED: &str = "a store URL holds a bucket and a folder only; give credentials and options in the environment";
const SIGNED: &str = "a web server's URL holds host and path only: signed URLs expire, and passwords would end up in manifests and logs; \
                      use the bucket's own URL (s3://, gs://, az://) with credentials in the environment, or download the files";

/// What a store's calls end at.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) object: Arc<DynObjectStore>,
    /// The same, where an upload's parts can be sent, and sent again, one by one.
    pub(crate) parts: Option<Arc<dyn MultipartStore>>,
    pub(crate) read_only: bool,
}

impl Backend {
    pub(crate) fn whole(object: Arc<DynObjectStore>) -> Self {
        Self { object, parts: None, read_only: false }
    }
}

/// A backend, and where in it the folder lies.
pub(crate) struct Opened {
    pub(crate) backend: Backend,
    pub(crate) folder: Path,
    pub(crate) url: String,
    pub(crate) local: Option<PathBuf>,
}

/// Opens a plain path, or a `file://`, `s3://`, `gs://`, `az://`, `http://` or `https://` URL.
pub(crate) fn open(text: &str) -> Result<Opened, StoreError> {
    if text.is_empty() {
        return Err(bad("(empty)", "no path or URL given; name a folder, or a URL such as s3://bucket/folder"));
    }
    if text == "~" || text.starts_with("~/") {
        return Err(bad(text, "~ is the home folder to a shell only: write the path in full"));
    }
    if !text.contains("://") {
        return open_local(FilePath::new(text));
    }
    let url = Url::parse(text)
        .map_err(|error| bad(&redacted(text), &format!("not a URL ({error}); write it as s3://bucket/folder or as a plain path")))?;
    let shown = redacted(text);
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        let web = matches!(url.scheme(), "http" | "https");
        return Err(bad(&shown, if web { SIGNED } else { UNADORNED }));
    }
    let at = |backend| Ok(Opened { backend, folder: folder_of(&url, &shown)?, url: shown.clone(), local: None });
    match url.scheme() {
        "file" => open_local(&url.to_file_path().map_err(|()| bad(&shown, "not a local path; write it as file:///folder"))?),
        "s3" | "gs" | "az" => at(cloud::open(&url, &shown)?),
        "http" | "https" => at(http::open(&url, &shown)?),
        other => Err(bad(&shown, &format!("unknown scheme {other} (expected file, s3, gs, az, https or http)"))),
    }
}

/// A folder of this process's memory, which no URL opens: what a command put there would be gone with it.
pub(crate) fn in_memory() -> Opened {
    let backend = Backend::whole(Arc::new(InMemory::new()));
    Opened { backend, folder: Path::default(), url: "memory://".to_owned(), local: None }
}

/// The URL without user, password, query and fragment, and without a trailing slash. Of one whose password may go on behind a `/`, `?` or `#`
/// that should have been escaped, only the scheme is left.
pub fn redacted(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.split(['?', '#']).next().unwrap_or_default().trim_end_matches('/').to_owned();
    };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let path = tail.split(['?', '#']).next().unwrap_or_default();
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let has_port = authority.rsplit_once(':').is_none_or(|(_, port)| port.ends_with(']') || is_port(port));
    let host = match authority.rsplit_once('@') {
        Some((_, host)) if !tail.contains('@') => host,
        None if has_port || !tail.contains('@') => authority,
        _ => return format!("{scheme}://"),
    };
    let text = format!("{scheme}://{host}{path}");
    if text.ends_with("://") { text } else { text.trim_end_matches('/').to_owned() }
}

fn open_local(path: &FilePath) -> Result<Opened, StoreError> {
    let shown = path.display().to_string();
    let local = absolute(path).map_err(|error| bad(&shown, &format!("cannot be made an absolute path ({error})")))?;
    let text = local.to_str().ok_or_else(|| bad(&shown, "a store's path must be UTF-8"))?;
    let folder = Path::parse(text).map_err(|error| bad(&shown, &error.to_string()))?;
    // What is there of the path must be folders: a file on the way would fail every call.
    if let Some(there) = local.ancestors().find(|path| path.exists()).filter(|path| !path.is_dir()) {
        let file = if there == local { "a file is there".to_owned() } else { format!("{} is a file", there.display()) };
        return Err(bad(&shown, &format!("{file} (expected a folder, or nothing); choose another path")));
    }
    // The root is the file system's, so that the folder need not exist before the first write.
    let object = Arc::new(LocalFileSystem::new().with_fsync(true));
    Ok(Opened { backend: Backend::whole(object), folder, url: text.to_owned(), local: Some(local) })
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

pub(crate) fn bad(url: &str, reason: &str) -> StoreError {
    StoreError::BadUrl { url: url.to_owned(), reason: reason.to_owned() }
}

#[cfg(not(feature = "cloud"))]
mod cloud {
    use super::{Backend, StoreError, Url};

    pub(super) fn open(_: &Url, shown: &str) -> Result<Backend, StoreError> {
        let what = "this build has no remote stores; build with the feature `cloud`, or use a local folder".into();
        Err(StoreError::Unsupported { url: shown.to_owned(), what })
    }
}
#[cfg(not(feature = "cloud"))]
use cloud as http;

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(url: &str) -> String {
        match open(url) {
            Err(error @ (StoreError::BadUrl { .. } | StoreError::Unsupported { .. })) => error.to_string(),
            Err(other) => panic!("{url}: {other:?}"),
            Ok(opened) => panic!("{url} opened as {}", opened.url),
        }
    }

    #[test]
    fn a_url_that_names_no_folder_is_refused_with_the_rule() {
        for (url, rule) in [
            ("", "no path or URL given"),
            ("~/runs/first", "write the path in full"),
            ("ftp://host/folder", "unknown scheme ftp"),
            ("memory://z", "unknown scheme memory (expected file, s3, gs, az, https or http)"),
            ("file://host/folder", "not a local path"),
            ("s3://bucket/a?token=1", "credentials and options in the environment"),
            ("s3://bucket/a#b", "credentials and options in the environment"),
            ("s3:// /", "not a URL"),
            ("https://host/a.tar?X-Amz-Signature=1", "signed URLs expire"),
            ("https://host/a//b", "empty path segment"),
        ] {
            let text = reason(url);
            assert!(text.contains(rule), "{url:?}: {text}");
        }
    }

    #[test]
    fn secrets_in_a_url_are_not_repeated() {
        for url in [
            "s3://key:hunter2@bucket/folder?sig=hunter2",
            "http://hunter2@host/",
            "s3://a b:hunter2@bucket/x#hunter2",
            "gs://hunter2@b",
            "s3://key:hunter2/more@bucket/folder",
            "s3://key:more/hunter2@bucket/folder",
            "http://key:hunter2#more@host/a",
            "https://key:a@hunter2/more@host/a",
        ] {
            let text = reason(url);
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn what_is_no_secret_stays_in_a_url() {
        for url in ["http://host:80/a@b", "http://[::1]/a@b", "s3://bucket/a@b", "runs/a@b", "s3://"] {
            assert_eq!(redacted(url), url);
        }
        assert_eq!(redacted("s3://key:secret@bucket/a/"), "s3://bucket/a");
    }

    #[test]
    fn a_file_is_no_folder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = reason(file.path().to_str().unwrap());
        assert!(text.contains("a file is there"), "{text}");
        let text = reason(file.path().join("run/here").to_str().unwrap());
        assert!(text.contains(&format!("{} is a file (expected a folder", file.path().display())), "{text}");
    }

    #[test]
    fn local_paths_become_absolute_and_are_resolved_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("real/deep")).unwrap();
        std::os::unix::fs::symlink(root.join("real/deep"), root.join("link")).unwrap();
        let through = open(&format!("{}/link/../x/./y/../z", root.display())).unwrap();
        assert_eq!(through.local.unwrap(), root.join("real/x/z"));
        let file = open(&format!("file://{}/a%20b/", root.display())).unwrap();
        assert_eq!(file.local.unwrap(), root.join("a b"));
        let relative = open("some/folder").unwrap();
        assert_eq!(relative.local.unwrap(), std::env::current_dir().unwrap().join("some/folder"));
        assert!(!FilePath::new("some").exists(), "opening creates nothing");
    }
}
