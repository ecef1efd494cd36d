//! On real servers, behind a proxy that fails 2 % of the requests. `make test-stores` installs the servers and asks for these.

use crate::emulator::Emulator;
use crate::kills::Ground;
use crate::proxy::Proxy;
use crate::trial::Trial;
use crate::{Size, anew, seed, sources};
use anyhow::{Context as _, Result, ensure};
use ella_store::Store;
use ella_tests::{Dice, World};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// What the server's folder is given by to the process that tries it: a client reads its environment once.
const URL: &str = "ELLA_TEST_STORE";
/// Where clients of either kind find their server.
const ENDPOINTS: [&str; 2] = ["AWS_ENDPOINT", "AZURE_ENDPOINT"];

#[test]
fn on_an_s3_server_nothing_is_lost_or_done_twice() -> Result<()> {
    on("cloud::on_an_s3_server_nothing_is_lost_or_done_twice", Emulator::s3)
}

#[test]
fn on_an_azure_server_nothing_is_lost_or_done_twice() -> Result<()> {
    on("cloud::on_an_azure_server_nothing_is_lost_or_done_twice", Emulator::azure)
}

/// Tries a server, in a process that has its environment.
fn on(name: &str, server: fn() -> Option<Emulator>) -> Result<()> {
    if let Ok(url) = std::env::var(URL) {
        let seed = seed();
        return trial(&url, &mut Dice::new(seed)).with_context(|| format!("ELLA_CHAOS_SEED={seed}"));
    }
    if std::env::var_os("ELLA_TEST_STORES").is_none() {
        println!("skipped: this takes minutes, and servers; make test-stores has both");
        return Ok(());
    }
    let Some(server) = server() else { return Ok(()) };
    let mut process = anew(name)?;
    let ended = process.env(URL, &server.url).envs(server.environment.iter().cloned()).status()?;
    ensure!(ended.success(), "{name} failed: see above");
    Ok(())
}

fn trial(url: &str, dice: &mut Dice) -> Result<()> {
    let size = Size::asked();
    let world = World::new(8)?;
    let samples = sources::write(&world.path("tars"), &size)?;
    upload(&world, url)?;
    let (name, endpoint) = endpoint()?;
    let server = endpoint.split('/').take(3).collect::<Vec<_>>().join("/");
    let proxy = Proxy::start(&server, size.workers, dice.split())?;
    let environment = |slot| vec![(name.to_owned(), endpoint.replace(&server, &proxy.endpoint(slot)))];
    let trial = Trial {
        size,
        world: &world,
        tars: format!("{url}/tars"),
        samples,
        calm: format!("{url}/calm"),
        chaos: format!("{url}/chaos"),
        ground: Ground::Server(&proxy),
        environments: (0..size.workers).map(environment).collect(),
    };
    trial.run(dice)?;
    if name == "AWS_ENDPOINT" { no_uploads(&server) } else { Ok(()) }
}

/// The variable that names the server, and what it says.
fn endpoint() -> Result<(&'static str, String)> {
    let set = |name| Some((name, std::env::var(name).ok()?));
    ENDPOINTS.into_iter().find_map(set).context("no server's address is in the environment")
}

fn upload(world: &World, url: &str) -> Result<()> {
    let store = Store::open(url)?;
    let runtime = tokio::runtime::Runtime::new()?;
    for tar in sources::tars(&world.path("tars"))? {
        let name = tar.file_name().context("a tar without a name")?.to_string_lossy().into_owned();
        runtime.block_on(store.put(&format!("tars/{name}"), std::fs::read(&tar)?.into()))?;
    }
    Ok(())
}

/// An S3 server lists no upload in parts that was begun and not ended.
fn no_uploads(server: &str) -> Result<()> {
    let mut connection = TcpStream::connect(server.trim_start_matches("http://"))?;
    let bucket = crate::emulator::BUCKET;
    connection.write_all(format!("GET /{bucket}?uploads HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut reply = String::new();
    connection.read_to_string(&mut reply)?;
    ensure!(reply.contains("ListMultipartUploadsResult"), "the server does not list uploads: {reply}");
    ensure!(!reply.contains("<Upload>"), "an upload in parts is left over: {reply}");
    Ok(())
}
