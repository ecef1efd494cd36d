//! What callers may do.

use serde::{Deserialize, Serialize};

/// What a caller may do. A greater role may do all that a lesser one may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// See: the status, the page, the metrics.
    Viewer,
    /// Take part: what workers do.
    Worker,
    /// Change what a run does: stop it, drain a worker.
    Admin,
}

impl Role {
    /// As files and errors have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }

    /// What a method of the service takes. One that is not known takes the most.
    pub fn of_method(name: &str) -> Self {
        match name {
            "Status" => Self::Viewer,
            "Attach" => Self::Worker,
            _ => Self::Admin,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_service_has_the_role_that_is_meant_for_it() {
        let methods: Vec<(&str, Role)> = include_str!("../../ella/v1/ella.proto")
            .lines()
            .filter_map(|line| line.trim().strip_prefix("rpc ")?.split_once('('))
            .map(|(name, _)| (name.trim(), Role::of_method(name.trim())))
            .collect();
        let meant = [("Attach", Role::Worker), ("Status", Role::Viewer), ("Stop", Role::Admin), ("Drain", Role::Admin)];
        assert_eq!(methods, meant);
        assert_eq!(Role::of_method("Whatever"), Role::Admin);
        assert!(Role::Viewer < Role::Worker && Role::Worker < Role::Admin);
    }
}
