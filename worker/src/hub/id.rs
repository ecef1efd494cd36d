//! Names of models on the hub.

use std::fmt;

/// The branch that is meant where none is named.
const MAIN: &str = "main";

/// `org/name`, `org/name@revision`, or a single file of a repository: `org/name/folder/file.safetensors@revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    repo: String,
    file: Option<String>,
    revision: Option<String>,
}

impl HubId {
    /// Reads an id; nothing if the text cannot be one.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let parts: Vec<&str> = name.split('/').collect();
        let revised = revision.is_none_or(|revision| revision.split('/').all(plain));
        if parts.len() < 2 || !parts.iter().all(|part| plain(part)) || !revised {
            return None;
        }
        let file = (parts.len() > 2).then(|| parts[2..].join("/"));
        if file.as_ref().is_some_and(|file| !file.ends_with(".safetensors")) {
            return None;
        }
        Some(HubId { repo: parts[..2].join("/"), file, revision: revision.map(str::to_owned) })
    }

    /// `org/name`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// The file that is meant, if not the whole model.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// A branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// Letters, digits, and `-`, `_`, `.` within: what the hub allows, and no path that leads elsewhere.
fn plain(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["google/flan-t5-xl", "org/name@refs/pr/1", "a/b.c_d@0123abc", "org/name/sub/x.safetensors", "org/n/x.safetensors@v1.0"] {
            let read = HubId::parse(id).unwrap();
            assert_eq!(read.to_string(), id);
            assert_eq!(read.repo().split('/').count(), 2);
        }
        let read = HubId::parse("org/name/sub/x.safetensors@v1").unwrap();
        assert_eq!((read.repo(), read.file(), read.revision()), ("org/name", Some("sub/x.safetensors"), "v1"));
        assert_eq!(HubId::parse("org/name").unwrap().revision(), "main");
        for path in
            ["models", "/srv/models", "./a/b", "../a/b", "~/a", "a/b/c", "a//b", "a/b/", "a/b@", "a/..", "a/b@../c", "a b/c", "x:/y", ""]
        {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
    }
}
