//! What is asked of the cluster's API.

use std::io::{ErrorKind, Write};
use std::time::Duration;

use ella_k8s::client::{ClientError, Cluster, Taken};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Cancel, Logs, Scale, Submit, There};
use crate::ui::{DONE, FAILED, Fail, Out, USAGE, count, note};

impl From<ClientError> for Fail {
    fn from(error: ClientError) -> Self {
        let code = if matches!(error, ClientError::NoConfig(_)) { USAGE } else { FAILED };
        Self { code, message: error.to_string() }
    }
}

impl Submit {
    pub(super) fn run(&self, out: Out) -> Result<u8, Fail> {
        let rendered = self.what.render()?;
        let made = crate::runtime()?.block_on(async {
            let cluster = Cluster::connect(self.context.as_deref(), &rendered.namespace).await?;
            cluster.submit(&rendered).await
        })?;
        let (name, namespace) = (&rendered.name, &rendered.namespace);
        out.result(&json!({ "name": name, "namespace": namespace, "made": made }), || {
            format!("{}\n{namespace}/{name} is in the cluster: ella k8s logs {name} --namespace {namespace} --follow", made.join("\n"))
        });
        Ok(DONE)
    }
}

impl There {
    async fn cluster(&self) -> Result<Cluster, ClientError> {
        Cluster::connect(self.context.as_deref(), &self.namespace).await
    }
}

impl Logs {
    pub(super) fn run(&self, out: Out) -> Result<u8, Fail> {
        // Whoever closed stdout wants no more lines.
        let (closed, mut failed) = (CancellationToken::new(), None);
        let mut told = |pod: &str, line: &str| {
            let text = if out.json { json!({ "pod": pod, "line": line }).to_string() } else { format!("{pod}  {line}") };
            if let Err(error) = writeln!(std::io::stdout(), "{text}") {
                closed.cancel();
                failed = (error.kind() != ErrorKind::BrokenPipe).then_some(error);
            }
        };
        let telling = async {
            let cluster = self.there.cluster().await?;
            cluster.logs(&self.there.name, &self.of, self.follow, &mut told).await
        };
        crate::runtime()?.block_on(closed.run_until_cancelled(telling)).unwrap_or(Ok(()))?;
        failed.map_or(Ok(DONE), |error| Err(Fail::failed(format_args!("stdout: cannot be written ({error})"))))
    }
}

impl Scale {
    pub(super) fn run(&self, out: Out) -> Result<u8, Fail> {
        let There { name, namespace, .. } = &self.there;
        crate::runtime()?.block_on(async { self.there.cluster().await?.scale(name, self.workers).await })?;
        out.result(&json!({ "name": name, "workers": self.workers }), || {
            format!("{namespace}/{name}: {} from now on", count(self.workers as usize, "worker"))
        });
        Ok(DONE)
    }
}

impl Cancel {
    pub(super) fn run(&self, out: Out) -> Result<u8, Fail> {
        let There { name, namespace, .. } = &self.there;
        let patience = if self.now { Duration::ZERO } else { Duration::from_secs(self.timeout) };
        let taken = crate::runtime()?.block_on(async { self.there.cluster().await?.cancel(name, patience).await })?;
        let Taken { gone, left } = &taken;
        if !left.is_empty() {
            note(format_args!(
                "{namespace}/{name}: you may not look for, or not delete: {}; if it has any, ask the cluster's administrator",
                left.join(", ")
            ));
        }
        out.result(&json!({ "name": name, "gone": gone, "left": left }), || {
            format!("{}\n{namespace}/{name} is gone; its folder stays", gone.join("\n"))
        });
        Ok(DONE)
    }
}
