//! Real servers for the tests' time: moto for S3, azurite for Azure Blob, where they are installed.

#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// The bucket or container that a server starts with.
pub(crate) const BUCKET: &str = "bucket";
/// Azurite's one account, which it publishes.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A server with an empty bucket; it is stopped when dropped.
#[derive(Debug)]
pub(crate) struct Emulator {
    process: Child,
    /// The bucket's URL.
    pub(crate) url: String,
    /// What a client finds it by, and its credentials.
    pub(crate) environment: Vec<(&'static str, String)>,
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Emulator {
    /// An S3 server, or `None`, said, where moto is not installed.
    pub(crate) fn s3() -> Option<Self> {
        let (process, endpoint) = serve(Command::new(find("moto_server", "S3")?).args(["--port", "0"]));
        let made =
            request(&endpoint, &format!("PUT /{BUCKET} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"));
        assert!(made.starts_with("HTTP/1.1 200"), "moto made no bucket: {made}");
        let environment = vec![
            ("AWS_ENDPOINT", endpoint),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "id".into()),
            ("AWS_SECRET_ACCESS_KEY", "secret".into()),
        ];
        Some(Self { process, url: format!("s3://{BUCKET}/suite"), environment })
    }

    /// An Azure Blob server, or `None`, said, where azurite is not installed.
    pub(crate) fn azure() -> Option<Self> {
        let program = find("azurite-blob", "Azure Blob")?;
        // Its reports home are turned off; the client speaks an API version that it does not know yet.
        let flags = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"];
        let (process, endpoint) = serve(Command::new(program).args(flags));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../store/tests/support/container.js");
        let made = Command::new("node").arg(script).args([&endpoint, ACCOUNT, ACCOUNT_KEY, BUCKET]).status();
        assert!(made.unwrap().success(), "azurite made no container");
        let environment = vec![
            ("AZURE_ENDPOINT", format!("{endpoint}/{ACCOUNT}")),
            ("AZURE_ALLOW_HTTP", "true".into()),
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.into()),
            ("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY.into()),
        ];
        Some(Self { process, url: format!("az://{BUCKET}/suite"), environment })
    }
}

/// Where `make test-stores` puts programs, or the PATH.
fn find(program: &str, what: &str) -> Option<PathBuf> {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.stores");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [kept.join("bin"), kept.join("node_modules/.bin")].into_iter().chain(std::env::split_paths(&path));
    let found = folders.map(|folder| folder.join(program)).find(|path| path.is_file());
    if found.is_none() {
        assert!(std::env::var_os("ELLA_TEST_STORES").is_none(), "{program} is not installed, and ELLA_TEST_STORES asks for it");
        println!("skipped: no {what} server to try, {program} is not installed (make test-stores installs it)");
    }
    found
}

/// Starts a server that says on which port it listens.
fn serve(command: &mut Command) -> (Child, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    let process = command.stdout(writer.try_clone().unwrap()).stderr(writer).spawn().unwrap();
    // The command holds the pipe's other end; without this a server that dies would be waited for.
    *command = Command::new("true");
    let mut lines = BufReader::new(reader);
    let (mut line, mut said) = (String::new(), String::new());
    let endpoint = loop {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "the server did not start: {said}");
        let listens = line.contains("Running on") || line.contains("successfully listens");
        if let Some(at) = line.find("http://").filter(|_| listens) {
            break line[at..].trim().to_owned();
        }
        said.push_str(&line);
    };
    // It says more with every request, and would stop when no one listens.
    std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
    (process, endpoint)
}

fn request(endpoint: &str, text: &str) -> String {
    let mut connection = TcpStream::connect(endpoint.strip_prefix("http://").unwrap()).unwrap();
    connection.write_all(text.as_bytes()).unwrap();
    let mut reply = String::new();
    connection.read_to_string(&mut reply).unwrap();
    reply
}
