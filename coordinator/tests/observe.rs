//! What a coordinator's process tells of itself while a run goes on: spans to a collector of traces, and its log as JSON.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_store::Store;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A collector that keeps what it gets.
#[derive(Clone, Debug, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    resources: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            self.resources.lock().unwrap().extend(attributes.iter().map(|attribute| format!("{}={:?}", attribute.key, attribute.value)));
            self.spans.lock().unwrap().extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (collector, url) = (Self::default(), format!("http://{}", listener.local_addr().unwrap()));
        let service = TraceServiceServer::new(collector.clone());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, url)
    }
}

/// A coordinator of a run of one worker in `folder`, and its address.
async fn coordinator(folder: &std::path::Path, environment: &[(&str, &str)]) -> (Child, String) {
    let (config, output) = (folder.join("run.toml"), folder.join("run"));
    std::fs::write(&config, CONFIG.replace("unused", output.to_str().unwrap()).replace("count = 2", "count = 1")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ella-coordinator"));
    command.arg(config).args(["--log-format", "json"]).envs(environment.iter().copied()).kill_on_drop(true);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = soon("the addresses", lines.next_line()).await.unwrap().unwrap();
    let addresses: serde_json::Value = serde_json::from_str(&line).unwrap();
    (child, addresses["grpc"].as_str().unwrap().to_owned())
}

/// Trains it to its end; gives the exit code and the log.
async fn train(folder: &std::path::Path, mut child: Child, grpc: &str) -> (i32, String) {
    let store = Store::open(folder.join("run").to_str().unwrap()).unwrap();
    let worker = Fake::attach(grpc, hello("a")).await.unwrap();
    worker.train(&config(&["workers.count=1"]), &store, Script::default()).await;
    let mut log = String::new();
    let mut stderr = child.stderr.take().unwrap();
    let ended = async { (child.wait().await.unwrap().code().unwrap(), stderr.read_to_string(&mut log).await.unwrap()).0 };
    let code = soon("the exit", ended).await;
    (code, log)
}

#[tokio::test]
async fn a_runs_commits_and_generations_are_traced() {
    let (folder, (collector, url)) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_RESOURCE_ATTRIBUTES", "team=connectors")];
    let (child, grpc) = coordinator(folder.path(), &environment).await;
    let (code, log) = train(folder.path(), child, &grpc).await;
    assert_eq!(code, 0, "{log}");
    let spans = collector.spans.lock().unwrap().clone();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let (commits, generations) = (named("commit"), named("generation"));
    assert_eq!((commits.len(), generations.len()), (3, 1), "steps 2, 4 and 5 of one generation: {spans:?}");
    let run = folder.path().join("run");
    let wanted = ella_coordinator::trace::Trace::of(ella_coordinator::trace::About::Commit, run.to_str().unwrap(), &[1, 1, 2]);
    let same = format!("{wanted:?}").contains(&format!("{:?}", commits[0].trace_id));
    assert!(same, "whoever knows run, term, generation and step knows the trace: {wanted:?}, {:?}", commits[0].trace_id);
    for commit in commits {
        assert!(commit.parent_span_id.is_empty() && commit.end_time_unix_nano >= commit.start_time_unix_nano);
    }
    let ready = named("get ready");
    assert!(ready.len() == 1 && ready[0].parent_span_id == generations[0].span_id && ready[0].trace_id == generations[0].trace_id);
    let resources = collector.resources.lock().unwrap().join(" ");
    assert!(resources.contains("ella-coordinator") && resources.contains("connectors"), "{resources}");
}

#[tokio::test]
async fn every_line_of_the_log_says_where_the_process_is() {
    let folder = tempfile::tempdir().unwrap();
    let (child, grpc) = coordinator(folder.path(), &[]).await;
    let (code, log) = train(folder.path(), child, &grpc).await;
    assert_eq!(code, 0, "{log}");
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    let places = ["run", "term", "generation", "rank", "step"];
    for line in &lines {
        assert!(
            places.iter().all(|place| line.get(place).is_some()) && line["fields"]["message"].is_string() && line["level"].is_string(),
            "{line}"
        );
    }
    let last = lines.last().unwrap();
    assert_eq!((last["term"].as_u64(), last["generation"].as_u64(), last["step"].as_u64()), (Some(1), Some(1), Some(5)), "{last}");
    assert!(last["run"].as_str().unwrap().ends_with("/run") && last["rank"].is_null(), "{last}");
}

/// LIVE: a collector that is not there costs spans, and one line.
#[tokio::test]
async fn a_collector_that_is_not_there_is_told_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_EXPORTER_OTLP_TIMEOUT", "500")];
    let (child, grpc) = coordinator(folder.path(), &environment).await;
    let (code, log) = train(folder.path(), child, &grpc).await;
    assert_eq!((code, log.matches("not taken by the collector").count()), (0, 1), "{log}");
}

#[tokio::test]
async fn a_protocol_that_is_not_spoken_is_bad_usage() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("run.toml");
    std::fs::write(&config, CONFIG).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ella-coordinator"));
    command.arg(config).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318").env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json");
    let ended = soon("the exit", command.kill_on_drop(true).output()).await.unwrap();
    let log = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(2) && log.contains("OTEL_EXPORTER_OTLP_PROTOCOL=http/json: only grpc"), "{log}");
}
