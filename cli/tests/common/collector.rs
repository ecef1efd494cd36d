//! A collector of traces that keeps what processes send it.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

type Spans = Arc<Mutex<Vec<(String, Span)>>>;

/// It listens as long as this lives.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) url: String,
    spans: Spans,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Service(Spans);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for told in request.into_inner().resource_spans {
            let name = told.resource.iter().flat_map(|resource| &resource.attributes).find(|attribute| attribute.key == "service.name");
            let service = format!("{:?}", name.and_then(|name| name.value.clone()));
            let spans = told.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let (url, spans) = (format!("http://{}", listener.local_addr().unwrap()), Spans::default());
        let service = TraceServiceServer::new(Service(spans.clone()));
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        Self { url, spans, _runtime: runtime }
    }

    /// What came so far, with who sent it.
    pub(crate) fn spans(&self) -> Vec<(String, Span)> {
        self.spans.lock().unwrap().clone()
    }
}
