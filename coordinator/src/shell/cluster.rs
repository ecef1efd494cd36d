//! The API of the Kubernetes cluster that this process runs in, as far as a coordinator needs it.
//!
//! Address, CA and token are those that every pod is given. The token's file is read for every request and the CA's too, for both are
//! replaced while a pod lives. Nothing is tried twice here: whoever asks knows what a second try is worth.

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, Method, Response};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where a pod finds its token and CA.
const FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a request may take in all.
const ANSWER: Duration = Duration::from_secs(10);
/// More than this no answer that is asked for here has.
const LARGEST_ANSWER: usize = 1 << 20;
/// So much of what the server says of an error is passed on.
const TOLD: usize = 300;
/// What comes before `NAMESPACE:NAME` in the name of a service account.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";

/// Why the cluster's API was of no use.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// This process runs in no cluster.
    #[error("{variable} is not set: this process runs in no Kubernetes pod")]
    NoCluster {
        /// Which environment variable every pod has.
        variable: &'static str,
    },
    /// A file that every pod has can't be used. What it holds is not told.
    #[error("{}: {reason}; does the pod's service account mount its token (automountServiceAccountToken)?", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It does not answer, or not in time.
    #[error("{url}: the Kubernetes API does not answer ({reason})")]
    Unreachable {
        /// Its address.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// It answers, and refuses.
    #[error("{method} {path}: the Kubernetes API refuses ({status}: {reason}); the pod's service account may lack the right to do this")]
    Refused {
        /// What was asked for.
        method: String,
        /// Of what.
        path: String,
        /// The HTTP status.
        status: u16,
        /// What the server said.
        reason: String,
    },
    /// Its answer is none.
    #[error("{path}: the Kubernetes API's answer cannot be used ({reason})")]
    Odd {
        /// What was asked for.
        path: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

/// Whose token it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reviewed {
    /// A service account's.
    ServiceAccount {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Nobody's that counts, and why.
    Nobody(String),
}

/// The API of this process's cluster.
#[derive(Debug)]
pub struct Cluster {
    url: String,
    folder: PathBuf,
    /// With the CA that it trusts.
    client: Mutex<Option<(Vec<u8>, Client)>>,
}

impl Cluster {
    /// That of the pod which this process runs in.
    ///
    /// # Errors
    /// If it runs in none.
    pub fn here() -> Result<Self, ClusterError> {
        let get = |variable| std::env::var(variable).ok().filter(|value| !value.is_empty()).ok_or(ClusterError::NoCluster { variable });
        let (host, port) = (get("KUBERNETES_SERVICE_HOST")?, get("KUBERNETES_SERVICE_PORT")?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        Ok(Self::at(format!("https://{host}:{port}"), Path::new(FOLDER)))
    }

    /// One at this address, with the files `token`, `ca.crt` and `namespace` of this folder.
    pub fn at(url: impl Into<String>, folder: &Path) -> Self {
        Self { url: url.into(), folder: folder.to_owned(), client: Mutex::new(None) }
    }

    /// The namespace of this pod.
    ///
    /// # Errors
    /// If its file can't be read.
    pub fn namespace(&self) -> Result<String, ClusterError> {
        self.text("namespace")
    }

    /// Creates what `body` says at this path, as in `/api/v1/namespaces/NS/events`.
    ///
    /// # Errors
    /// If the API can't be reached in 10 s, or refuses.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClusterError> {
        self.ask(Method::POST, path, ("application/json", body)).await
    }

    /// Changes what is at this path: a JSON merge patch (RFC 7386).
    ///
    /// # Errors
    /// If the API can't be reached in 10 s, or refuses.
    pub async fn patch(&self, path: &str, body: &Value) -> Result<Value, ClusterError> {
        self.ask(Method::PATCH, path, ("application/merge-patch+json", body)).await
    }

    /// Asks whose token this is, and whether it was made for this audience (TokenReview).
    ///
    /// # Errors
    /// If the API can't be reached in 10 s, or refuses to review tokens.
    pub async fn review(&self, token: &str, audience: &str) -> Result<Reviewed, ClusterError> {
        const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": [audience] },
        });
        let answer = self.post(PATH, &review).await?;
        let status = &answer["status"];
        if !status.is_object() {
            return Err(ClusterError::Odd { path: PATH.to_owned(), reason: "it has no status".to_owned() });
        }
        Ok(reviewed(status, audience))
    }

    async fn ask(&self, method: Method, path: &str, (kind, body): (&'static str, &Value)) -> Result<Value, ClusterError> {
        let mut bearer =
            HeaderValue::try_from(format!("Bearer {}", self.text("token")?)).map_err(|_| self.bad("token", "holds no token"))?;
        bearer.set_sensitive(true);
        let request = self.client()?.request(method.clone(), format!("{}{path}", self.url));
        let request = request.header(AUTHORIZATION, bearer).header(CONTENT_TYPE, kind).body(body.to_string());
        let answered = async {
            let answer = request.send().await?;
            Ok((answer.status(), read(answer).await?))
        };
        let unreachable = |error: reqwest::Error| ClusterError::Unreachable {
            url: self.url.clone(),
            reason: ella_proto::with_causes(&error.without_url()),
        };
        let (status, bytes) = answered.await.map_err(unreachable)?;
        let odd = |reason: String| ClusterError::Odd { path: path.to_owned(), reason };
        let bytes = bytes.ok_or_else(|| odd(format!("it is longer than {LARGEST_ANSWER} bytes")))?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| odd(error.to_string()));
        }
        let said = serde_json::from_slice::<Value>(&bytes).ok().and_then(|said| said["message"].as_str().map(str::to_owned));
        let reason = said.unwrap_or_default().chars().take(TOLD).collect();
        Err(ClusterError::Refused { method: method.to_string(), path: path.to_owned(), status: status.as_u16(), reason })
    }

    /// One that trusts the CA of now.
    fn client(&self) -> Result<Client, ClusterError> {
        let ca = if self.url.starts_with("https:") { self.read("ca.crt")? } else { Vec::new() };
        let mut kept = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = kept.as_ref().filter(|(of, _)| *of == ca) {
            return Ok(client.clone());
        }
        // The HTTP client takes the process's TLS provider. An error here means that there is one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let roots = Certificate::from_pem_bundle(&ca).map_err(|_| self.bad("ca.crt", "holds no certificates"))?;
        // No proxy and no redirect: the token is for this address only.
        let client = Client::builder().connect_timeout(CONNECT).timeout(ANSWER).no_proxy().redirect(Policy::none());
        let client = client.tls_certs_only(roots).build();
        let client = client.map_err(|error| self.bad("ca.crt", &ella_proto::with_causes(&error)))?;
        *kept = Some((ca, client.clone()));
        Ok(client)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, ClusterError> {
        std::fs::read(self.folder.join(name)).map_err(|error| self.bad(name, &format!("cannot be read ({error})")))
    }

    fn text(&self, name: &str) -> Result<String, ClusterError> {
        let text = String::from_utf8(self.read(name)?).map_err(|_| self.bad(name, "is no text"))?;
        Ok(text.trim().to_owned())
    }

    fn bad(&self, name: &str, reason: &str) -> ClusterError {
        ClusterError::BadFile { path: self.folder.join(name), reason: reason.to_owned() }
    }
}

/// The whole body, unless it is too long.
async fn read(mut answer: Response) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if bytes.len() + chunk.len() > LARGEST_ANSWER {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}

/// What a TokenReview's status says. A server that does not know of audiences leaves them out, and would take a token made for others.
fn reviewed(status: &Value, audience: &str) -> Reviewed {
    let nobody = |why: String| Reviewed::Nobody(why);
    if status["authenticated"] != true {
        let error = status["error"].as_str().unwrap_or("the cluster does not know it");
        return nobody(error.chars().take(TOLD).collect());
    }
    if !status["audiences"].as_array().is_some_and(|audiences| audiences.iter().any(|one| one == audience)) {
        return nobody(format!("it was not made for the audience {audience:?}"));
    }
    let user = status["user"]["username"].as_str().unwrap_or_default();
    match user.strip_prefix(SERVICE_ACCOUNT).and_then(|rest| rest.split_once(':')) {
        Some((namespace, name)) => Reviewed::ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() },
        None => nobody(format!("{user:?} is no service account")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use axum::extract::Request;
    use axum::http::StatusCode;
    use axum::{Json, Router};

    /// An API that answers with this, whatever it is asked; what it was asked is echoed under `asked`.
    async fn api(status: u16, mut answer: Value) -> (Cluster, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "the-pods-own-token\n").unwrap();
        let answering = async move |request: Request| {
            let (head, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            answer["asked"] = json!({
                "what": format!("{} {}", head.method, head.uri), "authorization": header("authorization"),
                "type": header("content-type"), "body": serde_json::from_slice::<Value>(&body).unwrap(),
            });
            (StatusCode::from_u16(status).unwrap(), Json(answer))
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answering)).await });
        (Cluster::at(url, folder.path()), folder)
    }

    #[tokio::test]
    async fn what_is_asked_has_the_pods_newest_token() {
        let (cluster, folder) = api(200, json!({})).await;
        let body = json!({ "metadata": { "annotations": { "step": "7" } } });
        for token in ["the-pods-own-token", "the-next-one"] {
            std::fs::write(folder.path().join("token"), token).unwrap();
            let asked = cluster.patch("/api/v1/namespaces/a/pods/b", &body).await.unwrap()["asked"].take();
            assert_eq!(asked["what"], "PATCH /api/v1/namespaces/a/pods/b");
            assert_eq!(asked["authorization"], format!("Bearer {token}"));
            assert_eq!((&asked["type"], &asked["body"]), (&json!("application/merge-patch+json"), &body));
        }
    }

    #[tokio::test]
    async fn a_review_names_the_service_account_if_the_audience_is_right() {
        let known = |audiences: Value, user: &str| json!({ "status": { "authenticated": true, "audiences": audiences, "user": { "username": user } } });
        let account = "system:serviceaccount:lab:trainer";
        let cases = [
            (known(json!(["ella"]), account), None),
            (known(json!(["https://kubernetes"]), account), Some("audience")),
            (known(Value::Null, account), Some("audience")),
            (known(json!(["ella"]), "jane"), Some("no service account")),
            (json!({ "status": { "error": "token has expired" } }), Some("has expired")),
            (json!({ "status": {} }), Some("does not know it")),
        ];
        for (answer, refused) in cases {
            let (cluster, _folder) = api(201, answer.clone()).await;
            match (cluster.review("a-workers-token", "ella").await.unwrap(), refused) {
                (Reviewed::ServiceAccount { namespace, name }, None) => assert_eq!((&*namespace, &*name), ("lab", "trainer")),
                (Reviewed::Nobody(why), Some(word)) => assert!(why.contains(word), "{why}"),
                other => panic!("{answer}: {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn an_api_that_refuses_is_absent_or_odd_is_an_error_without_secrets() {
        let (refusing, _one) = api(403, json!({ "message": "tokenreviews is forbidden" })).await;
        let (odd, _two) = api(200, json!({})).await;
        let (gone, folder) = (Cluster::at("http://127.0.0.1:1", _one.path()), tempfile::tempdir().unwrap());
        let bare = Cluster::at("https://127.0.0.1:1", folder.path());
        for (cluster, word) in [(refusing, "is forbidden"), (odd, "no status"), (gone, "does not answer"), (bare, "token: cannot be read")]
        {
            let error = cluster.review("a-workers-token", "ella").await.unwrap_err();
            let said = format!("{error} {error:?}");
            assert!(said.contains(word) && !said.contains("-token ") && !said.contains("own-token"), "{said}");
        }
    }
}
