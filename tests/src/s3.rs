//! A folder served as an S3 bucket, as far as reading goes: whole objects, ranges, and listings. It counts what is asked of it.

use anyhow::Result;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

/// A server over a folder, for as long as the process lives.
#[derive(Debug)]
pub struct Bucket {
    address: String,
    gets: Arc<Mutex<Vec<String>>>,
}

impl Bucket {
    /// Serves the files below a folder under `s3://bucket/`.
    pub fn serve(folder: PathBuf) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, gets) = (listener.local_addr()?.to_string(), Arc::new(Mutex::new(Vec::new())));
        let seen = Arc::clone(&gets);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, seen) = (folder.clone(), Arc::clone(&seen));
                // A client that goes away ends its thread.
                std::thread::spawn(move || answer(stream, &folder, &seen));
            }
        });
        Ok(Self { address, gets })
    }

    /// Has a command take this server for S3.
    pub fn lend(&self, command: &mut Command) {
        command.env("AWS_ENDPOINT", format!("http://{}", self.address)).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
        command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret");
    }

    /// The objects that were read since the last call, as often as they were.
    pub fn taken(&self) -> Vec<String> {
        std::mem::take(&mut *self.gets.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Answers one request after the other until the client goes.
fn answer(stream: TcpStream, folder: &Path, gets: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let (mut line, mut range, mut length) = (String::new(), None, 0);
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let header = header.trim().to_ascii_lowercase();
            if let Some(bytes) = header.strip_prefix("range: bytes=") {
                range = bytes.split_once('-').map(|(from, to)| (from.parse().unwrap_or(0), to.parse().unwrap_or(usize::MAX)));
            }
            if let Some(bytes) = header.strip_prefix("content-length: ") {
                length = bytes.parse().unwrap_or(0);
            }
            if header.is_empty() {
                break;
            }
        }
        std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let key = path.trim_start_matches("/bucket").trim_start_matches('/');
        let (status, body) = match (method, query.contains("list-type=2")) {
            ("GET", true) => ("200 OK", list(folder, query).into_bytes()),
            ("GET" | "HEAD", false) => match std::fs::read(folder.join(key)) {
                Ok(bytes) => {
                    if method == "GET" {
                        gets.lock().unwrap_or_else(PoisonError::into_inner).push(key.to_owned());
                    }
                    match range {
                        Some((from, to)) => {
                            ("206 Partial Content", bytes[from.min(bytes.len())..to.saturating_add(1).min(bytes.len())].to_vec())
                        }
                        None => ("200 OK", bytes),
                    }
                }
                Err(_) => ("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>".to_vec()),
            },
            _ => ("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>".to_vec()),
        };
        let total = std::fs::metadata(folder.join(key)).map_or(0, |meta| meta.len());
        let content_range = range
            .filter(|_| status.starts_with("206"))
            .map(|(from, _)| format!("Content-Range: bytes {from}-{}/{total}\r\n", from + body.len() - 1));
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{}ETag: \"{total}\"\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n\r\n",
            body.len(),
            content_range.unwrap_or_default()
        );
        stream.write_all(head.as_bytes())?;
        if method != "HEAD" {
            stream.write_all(&body)?;
        }
    }
}

/// What `ListObjectsV2` says: all files below the prefix, on one page.
fn list(folder: &Path, query: &str) -> String {
    let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix=")).unwrap_or_default().replace("%2F", "/");
    let mut text = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for path in std::fs::read_dir(at).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let key = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
            if key.starts_with(&prefix) {
                let size = path.metadata().map_or(0, |meta| meta.len());
                let _ = write!(
                    text,
                    "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>\"{size}\"</ETag><LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
                );
            }
        }
    }
    text + "</ListBucketResult>"
}
