//! A small HTTP server that keeps objects and answers by script: a plain web server with or without its usual manners, and as much of S3 as
//! the tests ask for.

#![allow(dead_code, clippy::unwrap_used, reason = "each test takes what it needs; what fails to unwrap fails the test")]

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

/// What happens to one request.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// This status, without effect.
    Status(u16),
    /// The same with one more header.
    With(u16, String),
    /// It takes effect, and the connection closes without a reply.
    Lost,
    /// It takes effect, and no reply ever comes.
    Silent,
    /// A get's body breaks off half-way.
    Half,
    /// A get that is said to have so many bytes breaks off after a hundred.
    Claims(u64),
    /// A get's body stops half-way, until [`Server::stop_held`] breaks it off.
    Held,
    /// As it should be.
    Proper,
}

/// What a server does of what it may.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manners {
    pub(crate) ranges: bool,
    pub(crate) head: bool,
    pub(crate) e_tag: bool,
    pub(crate) weak: bool,
    pub(crate) dates: bool,
    pub(crate) length: bool,
    pub(crate) conditions: bool,
}

impl Manners {
    pub(crate) const GOOD: Self = Self { ranges: true, head: true, e_tag: true, weak: false, dates: true, length: true, conditions: true };
    pub(crate) const NONE: Self =
        Self { ranges: false, head: false, e_tag: false, weak: false, dates: false, length: true, conditions: false };
}

pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) objects: Mutex<BTreeMap<String, Vec<u8>>>,
    pub(crate) script: Mutex<VecDeque<Reply>>,
    pub(crate) requests: Mutex<Vec<String>>,
    manners: Manners,
    arrived: Notify,
    released: Semaphore,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    async fn read(connection: &mut TcpStream) -> Option<Self> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(connection.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).unwrap();
        let headers: BTreeMap<_, _> =
            head.lines().filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        let mut body = vec![0; headers.get("content-length").map_or(0, |length| length.parse().unwrap())];
        connection.read_exact(&mut body).await.ok()?;
        let mut words = head.split(' ');
        Some(Self { method: words.next()?.to_owned(), path: words.next()?.to_owned(), headers, body })
    }

    fn range(&self) -> Option<(usize, usize)> {
        let (start, end) = self.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse().unwrap(), end.parse::<usize>().unwrap() + 1))
    }
}

impl Server {
    /// Serves on a port of its own, the first requests by `script`.
    pub(crate) async fn start(script: impl Into<VecDeque<Reply>>, manners: Manners) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            objects: Mutex::default(),
            script: Mutex::new(script.into()),
            requests: Mutex::default(),
            manners,
            arrived: Notify::new(),
            released: Semaphore::new(0),
        });
        let serving = Arc::clone(&server);
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                connection.set_nodelay(true).unwrap();
                let server = Arc::clone(&serving);
                tokio::spawn(async move { while server.answer(&mut connection).await.is_some() {} });
            }
        });
        server
    }

    pub(crate) fn keep(&self, path: &str, bytes: &[u8]) {
        lock(&self.objects).insert(path.to_owned(), bytes.to_vec());
    }

    pub(crate) fn plan(&self, replies: impl IntoIterator<Item = Reply>) {
        lock(&self.script).extend(replies);
    }

    /// Drops what is left of the script.
    pub(crate) fn forget(&self) {
        lock(&self.script).clear();
    }

    /// The requests so far, as `GET /path`.
    pub(crate) fn requests(&self) -> Vec<String> {
        lock(&self.requests).clone()
    }

    /// Waits until so many requests have come.
    pub(crate) async fn seen(&self, count: usize) {
        let come = async {
            while self.requests().len() < count {
                self.arrived.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), come).await.expect("no such request came");
    }

    /// Breaks held replies off, now and later.
    pub(crate) fn stop_held(&self) {
        self.released.close();
    }

    /// Answers one request; `None` when the connection is done.
    async fn answer(&self, connection: &mut TcpStream) -> Option<()> {
        let request = Request::read(connection).await?;
        let reply = lock(&self.script).pop_front().unwrap_or(Reply::Proper);
        // Last, so that who saw the request finds the script used up.
        lock(&self.requests).push(format!("{} {}", request.method, request.path));
        self.arrived.notify_one();
        if let Reply::Status(_) | Reply::With(..) = reply {
            let (status, more) = match reply {
                Reply::With(status, more) => (status, format!("{more}\r\n")),
                Reply::Status(status) => (status, String::new()),
                _ => return None,
            };
            let text = format!("HTTP/1.1 {status} X\r\n{more}content-length: 5\r\n\r\noops\n");
            return connection.write_all(text.as_bytes()).await.ok();
        }
        if let Reply::Claims(bytes) = reply {
            let text = format!("HTTP/1.1 200 X\r\ncontent-length: {bytes}\r\n\r\n{}", "{".repeat(100));
            let _ = connection.write_all(text.as_bytes()).await;
            return None;
        }
        let (head, body) = self.effect(&request);
        match reply {
            Reply::Lost => return None,
            Reply::Silent => std::future::pending().await,
            _ => connection.write_all(head.as_bytes()).await.ok()?,
        }
        if request.method == "HEAD" {
            return Some(());
        }
        let (first, second) = body.split_at(if matches!(reply, Reply::Half | Reply::Held) { body.len() / 2 } else { 0 });
        connection.write_all(first).await.ok()?;
        match reply {
            Reply::Half => return None,
            Reply::Held => self.released.acquire().await.ok()?.forget(),
            _ => {}
        }
        connection.write_all(second).await.ok()?;
        self.manners.length.then_some(())
    }

    /// What a request does, and the reply's head and body.
    fn effect(&self, request: &Request) -> (String, Vec<u8>) {
        let mut objects = lock(&self.objects);
        let path = &request.path;
        let bare = |status: u16| (format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n"), vec![]);
        match request.method.as_str() {
            "PUT" if request.headers.contains_key("if-none-match") && objects.contains_key(path) => bare(412),
            "PUT" => {
                let tag = tag(&request.body);
                objects.insert(path.clone(), request.body.clone());
                (format!("HTTP/1.1 200 X\r\netag: \"{tag}\"\r\ncontent-length: 0\r\n\r\n"), vec![])
            }
            "POST" => uploads(&mut objects, path),
            "HEAD" if !self.manners.head => bare(405),
            _ => objects.get(path).map_or_else(|| bare(404), |found| self.give(request, found)),
        }
    }

    fn give(&self, request: &Request, found: &[u8]) -> (String, Vec<u8>) {
        let manners = self.manners;
        let tag = format!("{}\"{}\"", if manners.weak { "W/" } else { "" }, tag(found));
        let condition = request.headers.get("if-match").filter(|_| manners.conditions);
        if condition.is_some_and(|wanted| manners.weak || *wanted != tag) {
            return ("HTTP/1.1 412 X\r\ncontent-length: 0\r\n\r\n".into(), vec![]);
        }
        let range = request.range().filter(|_| manners.ranges);
        let (start, end) = range.map_or((0, found.len()), |(start, end)| (start, end.min(found.len())));
        if start > end || (range.is_some() && start == found.len()) {
            return (format!("HTTP/1.1 416 X\r\ncontent-range: bytes */{}\r\ncontent-length: 0\r\n\r\n", found.len()), vec![]);
        }
        let body = found[start..end].to_vec();
        let mut head = format!("HTTP/1.1 {} X\r\n", if range.is_some() { 206 } else { 200 });
        if range.is_some() {
            head += &format!("content-range: bytes {start}-{}/{}\r\n", end - 1, found.len());
        }
        head += &if manners.e_tag { format!("etag: {tag}\r\n") } else { String::new() };
        head += if manners.dates { "last-modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n" } else { "" };
        head += &if manners.length { format!("content-length: {}\r\n", body.len()) } else { "connection: close\r\n".into() };
        (head + "\r\n", body)
    }
}

/// S3's uploads in parts: begun, and completed of all parts in the order of their numbers.
fn uploads(objects: &mut BTreeMap<String, Vec<u8>>, path: &str) -> (String, Vec<u8>) {
    let (key, query) = path.split_once('?').unwrap();
    let body = if query == "uploads" || query == "uploads=" {
        "<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
    } else {
        let prefix = format!("{key}?");
        let number = |path: &str| path.split(['=', '&']).nth(1).unwrap().parse::<u32>().unwrap();
        let mut parts: Vec<String> = objects.keys().filter(|path| path.starts_with(&prefix)).cloned().collect();
        parts.sort_by_key(|path| number(path));
        if parts.is_empty() {
            return ("HTTP/1.1 404 X\r\ncontent-length: 0\r\n\r\n".into(), vec![]);
        }
        let whole = parts.iter().flat_map(|path| objects.remove(path).unwrap()).collect();
        objects.insert(key.to_owned(), whole);
        "<CompleteMultipartUploadResult><ETag>\"1\"</ETag></CompleteMultipartUploadResult>"
    };
    (format!("HTTP/1.1 200 X\r\ncontent-length: {}\r\n\r\n", body.len()), body.into())
}

fn tag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
