//! Who may do what: rules that give a role to whoever knows a secret, has a certificate, or is a service account.

use super::cluster::{Cluster, ClusterError};
use super::review::Reviews;
use ella_proto::access::{Role, TlsError, TlsFiles, Token, TokenError};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Who may speak to a coordinator, and how that is told.
#[derive(Clone, Debug, Default)]
pub struct AccessControl {
    rules: Vec<Rule>,
    reviews: Option<Arc<Reviews>>,
    tls: TlsFiles,
    insecure: bool,
}

/// Why access can't be controlled as asked.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file of rules can't be read.
    #[error("{}: the access file cannot be read ({source}); check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What it holds will not do.
    #[error("{}: {rule}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Which part, and the rule that it breaks.
        rule: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Options(&'static str),
    /// A token's file will not do.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A certificate's files will not do.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is no cluster to review tokens.
    #[error("--token-review: {0}")]
    Cluster(#[from] ClusterError),
}

#[derive(Clone, Debug)]
struct Rule {
    role: Role,
    who: Who,
}

#[derive(Clone, Debug)]
enum Who {
    Token(Token),
    /// Any that its CA signed.
    AnyCertificate,
    Certificate(String),
    ServiceAccount {
        namespace: String,
        name: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    allow: Vec<Allow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    role: Role,
    token_file: Option<PathBuf>,
    certificate: Option<String>,
    service_account: Option<String>,
}

impl AccessControl {
    /// The rules of a file (`--access`), if there is one; beside them, whoever knows the secret of `token` may do everything; and so may any
    /// certificate that `tls.ca` signed, if nothing else is said of certificates. Service accounts are those of the cluster that this
    /// process runs in, for tokens made for the audience `review`.
    ///
    /// # Errors
    /// If a file will not do, or what is asked for can't be.
    pub fn load(file: Option<&Path>, token: Option<&Path>, tls: TlsFiles, review: Option<&str>) -> Result<Self, AccessError> {
        let reviews = review.map(|audience| Ok::<_, ClusterError>(Reviews::new(Cluster::here()?, audience)));
        Self::with(file, token, tls, reviews.transpose()?)
    }

    /// The rules of a file, with the tokens of service accounts reviewed by this cluster.
    ///
    /// # Errors
    /// If a file will not do.
    pub fn from_file_reviewed(file: &Path, cluster: Cluster, audience: &str) -> Result<Self, AccessError> {
        Self::with(Some(file), None, TlsFiles::default(), Some(Reviews::new(cluster, audience)))
    }

    fn with(file: Option<&Path>, token: Option<&Path>, tls: TlsFiles, reviews: Option<Reviews>) -> Result<Self, AccessError> {
        let mut rules = file.map(read).transpose()?.unwrap_or_default();
        if let Some(path) = token {
            rules.push(Rule { role: Role::Admin, who: Who::Token(Token::load(path)?) });
        }
        if tls.ca.is_some() && file.is_none() {
            rules.push(Rule { role: Role::Admin, who: Who::AnyCertificate });
        }
        let control = Self { rules, reviews: reviews.map(Arc::new), tls, insecure: false };
        control.check()?;
        Ok(control)
    }

    /// Whoever knows the secret, if there is one, may do everything.
    pub fn of_token(token: Option<Token>) -> Self {
        let rules = token.into_iter().map(|token| Rule { role: Role::Admin, who: Who::Token(token) }).collect();
        Self { rules, ..Self::default() }
    }

    fn check(&self) -> Result<(), AccessError> {
        let any = |is: fn(&Who) -> bool| self.rules.iter().any(|rule| is(&rule.who));
        let (certificates, accounts) =
            (any(|who| matches!(who, Who::Certificate(_))), any(|who| matches!(who, Who::ServiceAccount { .. })));
        let rules = [
            (!certificates || self.tls.ca.is_some(), "--access names certificates, and nothing checks them: give --tls-ca"),
            (
                !accounts || self.reviews.is_some(),
                "--access names service accounts, and nothing reviews their tokens: give --token-review AUDIENCE",
            ),
            (
                accounts || self.reviews.is_none(),
                "--token-review is given, and --access names no service account: add one, or leave it out",
            ),
            (
                self.tls.ca.is_none() || self.tls.cert.is_some(),
                "--tls-ca without --tls-cert and --tls-key: a coordinator needs its own first",
            ),
        ];
        rules.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, rule)| Err(AccessError::Options(rule)))
    }

    /// The same, on addresses that other machines reach even if there are no rules.
    #[must_use]
    pub fn insecure(self, insecure: bool) -> Self {
        Self { insecure, ..self }
    }

    /// Whether it was said that anyone on the network may do everything.
    pub(super) fn is_insecure(&self) -> bool {
        self.insecure
    }

    /// The certificate and key, and the CA of others'.
    pub fn tls(&self) -> &TlsFiles {
        &self.tls
    }

    /// Whether anything is asked of callers.
    pub fn is_on(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether a certificate is all that lets anyone in.
    pub(super) fn needs_certificates(&self) -> bool {
        self.is_on() && self.rules.iter().all(|rule| matches!(rule.who, Who::AnyCertificate | Who::Certificate(_)))
    }

    /// What a stranger should show, in words.
    pub(super) fn advice(&self) -> String {
        let any = |is: fn(&Who) -> bool| self.rules.iter().any(|rule| is(&rule.who));
        let mut ways = Vec::new();
        if any(|who| matches!(who, Who::Token(_))) {
            ways.push("give --token-file (or ELLA_TOKEN_FILE) a copy of the coordinator's token file");
        }
        if any(|who| matches!(who, Who::ServiceAccount { .. })) {
            ways.push("give --token-file the pod's projected service-account token");
        }
        if any(|who| matches!(who, Who::AnyCertificate | Who::Certificate(_))) {
            ways.push("give --tls-cert and --tls-key a certificate of the coordinator's CA");
        }
        ways.join(", or ")
    }

    /// The role of whoever shows this certificate, if its holder has any.
    pub(super) fn of_certificate(&self, names: &[String]) -> Option<Role> {
        let fits = |who: &Who| match who {
            Who::AnyCertificate => true,
            Who::Certificate(pattern) => names.iter().any(|name| matches(pattern, name)),
            _ => false,
        };
        self.greatest(fits)
    }

    /// The role of whoever knows this secret.
    pub(super) fn of_secret(&self, secret: &[u8]) -> Option<Role> {
        self.greatest(|who| matches!(who, Who::Token(token) if token.accepts(secret)))
    }

    /// The role of a service account.
    pub(super) fn of_account(&self, account: (&str, &str)) -> Option<Role> {
        self.greatest(|who| matches!(who, Who::ServiceAccount { namespace, name } if (namespace.as_str(), name.as_str()) == account))
    }

    /// Who says whose a service account's token is.
    pub(super) fn reviews(&self) -> Option<&Arc<Reviews>> {
        self.reviews.as_ref()
    }

    /// How often a token's file had become one that will not do.
    pub(super) fn failed_reloads(&self) -> u64 {
        let of = |rule: &Rule| if let Who::Token(token) = &rule.who { token.failed_reloads() } else { 0 };
        self.rules.iter().map(of).sum()
    }

    fn greatest(&self, fits: impl Fn(&Who) -> bool) -> Option<Role> {
        self.rules.iter().filter(|rule| fits(&rule.who)).map(|rule| rule.role).max()
    }
}

fn read(path: &Path) -> Result<Vec<Rule>, AccessError> {
    let text = std::fs::read_to_string(path).map_err(|source| AccessError::Unreadable { path: path.to_owned(), source })?;
    let unfit = |rule: String| AccessError::Unfit { path: path.to_owned(), rule };
    // Without the line that it shows: a secret may have been written there by mistake.
    let file: File = toml::from_str(&text).map_err(|error| unfit(error.message().to_owned()))?;
    if file.allow.is_empty() {
        return Err(unfit("expected at least one [[allow]] table".to_owned()));
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    (1..)
        .zip(file.allow)
        .map(|(number, allow)| {
            rule(allow, folder).map_err(|error| match error {
                RuleError::Rule(rule) => unfit(format!("[[allow]] number {number}: {rule}")),
                RuleError::Token(error) => error.into(),
            })
        })
        .collect()
}

enum RuleError {
    Rule(&'static str),
    Token(TokenError),
}

fn rule(allow: Allow, folder: &Path) -> Result<Rule, RuleError> {
    let who = match (allow.token_file, allow.certificate, allow.service_account) {
        (Some(path), None, None) => Who::Token(Token::load(&folder.join(path)).map_err(RuleError::Token)?),
        (None, Some(pattern), None) if !pattern.is_empty() => Who::Certificate(pattern),
        (None, Some(_), None) => return Err(RuleError::Rule("certificate must not be empty")),
        (None, None, Some(account)) => match account.split_once('/') {
            Some((namespace, name)) if ![namespace, name].contains(&"") && !name.contains('/') => {
                Who::ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() }
            }
            _ => return Err(RuleError::Rule("service_account must be NAMESPACE/NAME")),
        },
        _ => return Err(RuleError::Rule("expected exactly one of token_file, certificate, service_account")),
    };
    Ok(Rule { role: allow.role, who })
}

/// Whether a name is as the pattern has it, where `*` stands for any characters but `.` and `/`: one label or one part of a path.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            let end = rest.find(['.', '/']).unwrap_or(rest.len());
            let cuts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]).filter(|at| *at <= end);
            cuts.into_iter().any(|at| matches(after, &rest[at..]))
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_one_label_or_one_part_of_a_path() {
        for (pattern, name, fits) in [
            ("worker.ella", "worker.ella", true),
            ("worker.ella", "xworker.ella", false),
            ("*.workers.lab", "a.workers.lab", true),
            ("*.workers.lab", "a.b.workers.lab", false),
            ("*.workers.lab", "a.workers.lab.evil", false),
            ("spiffe://lab/ns/*/sa/train-*", "spiffe://lab/ns/x/sa/train-7", true),
            ("spiffe://lab/ns/*/sa/train-*", "spiffe://lab/ns/x/y/sa/train-7", false),
            ("*", "anything", true),
            ("*", "two.labels", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn the_greatest_role_counts_and_who_is_not_named_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("viewer"), "the-viewers-own-secret").unwrap();
        std::fs::write(path("admin"), "the-admins-own-secret").unwrap();
        let text = "[[allow]]\nrole = \"viewer\"\ntoken_file = \"viewer\"\n[[allow]]\nrole = \"worker\"\ncertificate = \"worker-*.lab\"\n\
                    [[allow]]\nrole = \"admin\"\ncertificate = \"worker-1.lab\"\n[[allow]]\nrole = \"worker\"\nservice_account = \"lab/trainer\"\n";
        std::fs::write(path("access.toml"), text).unwrap();
        let tls = TlsFiles { cert: Some(path("c")), key: Some(path("k")), ca: Some(path("ca")) };
        let rules = read(&path("access.toml")).unwrap();
        let reviews = Some(Arc::new(Reviews::new(Cluster::at("http://127.0.0.1:1", folder.path()), "ella")));
        let control = AccessControl { rules, reviews, tls, insecure: false };
        control.check().unwrap();
        let names = |name: &str| [name.to_owned()];
        assert_eq!(control.of_certificate(&names("worker-1.lab")), Some(Role::Admin));
        assert_eq!(control.of_certificate(&names("worker-2.lab")), Some(Role::Worker));
        assert_eq!(control.of_certificate(&names("other.lab")), None);
        assert_eq!(control.of_secret(b"the-viewers-own-secret"), Some(Role::Viewer));
        assert_eq!(control.of_secret(b"the-admins-own-secret"), None, "it is not named");
        assert_eq!((control.of_account(("lab", "trainer")), control.of_account(("lab", "other"))), (Some(Role::Worker), None));
        assert!(!control.needs_certificates());
    }

    #[test]
    fn what_will_not_do_is_named_with_the_rule() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.toml");
        let secret = "a-secret-in-the-wrong-place";
        for (text, rule) in [
            ("", "at least one"),
            ("[[allow]]\nrole = \"boss\"\ntoken_file = \"x\"", "unknown variant `boss`"),
            ("[[allow]]\nrole = \"viewer\"", "number 1: expected exactly one of"),
            ("[[allow]]\nrole = \"viewer\"\ntoken_file = \"x\"\ncertificate = \"y\"", "exactly one of"),
            ("[[allow]]\nrole = \"viewer\"\nservice_account = \"trainer\"", "NAMESPACE/NAME"),
            ("[[allow]]\nrole = \"viewer\"\ncertificate = \"\"", "must not be empty"),
            ("[[allow]]\nrole = \"viewer\"\ntoken_file = \"none\"", "cannot be read"),
            ("[[allow]]\nrole = \"viewer\"\ntoken = \"a-secret-in-the-wrong-place\"", "unknown field `token`"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err();
            let said = format!("{error} {error:?}");
            assert!(said.contains(rule) && said.contains(folder.path().to_str().unwrap()) && !said.contains(secret), "{said}");
        }
        std::fs::write(&path, "[[allow]]\nrole = \"worker\"\nservice_account = \"a/b\"").unwrap();
        let error = AccessControl::load(Some(&path), None, TlsFiles::default(), None).unwrap_err();
        assert!(error.to_string().contains("give --token-review"), "{error}");
        let ca = TlsFiles { ca: Some(path.clone()), ..TlsFiles::default() };
        let error = AccessControl::load(None, None, ca, None).unwrap_err();
        assert!(error.to_string().contains("--tls-ca without --tls-cert"), "{error}");
    }
}
