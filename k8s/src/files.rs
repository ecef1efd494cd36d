//! The folders `base`, `components` and `overlays` of this crate, as they were when it was built: one source for kubectl and for us.

macro_rules! files {
    ($($path:literal),+ $(,)?) => {
        /// Every file by its path, as in `base/workers.yaml`.
        pub const FILES: &[(&str, &str)] = &[$(($path, include_str!(concat!("../", $path)))),+];
    };
}

files![
    "base/access.toml",
    "base/access.yaml",
    "base/config.toml",
    "base/coordinator.yaml",
    "base/kustomization.yaml",
    "base/namespace.yaml",
    "base/network.yaml",
    "base/priority.yaml",
    "base/workers.yaml",
    "components/azure/kustomization.yaml",
    "components/gcs/kustomization.yaml",
    "components/gcs/network.yaml",
    "components/ipv6/coordinator.yaml",
    "components/ipv6/kustomization.yaml",
    "components/jobset/coordinator.yaml",
    "components/jobset/jobset.yaml",
    "components/jobset/kustomization.yaml",
    "components/kueue/kustomization.yaml",
    "components/local/kustomization.yaml",
    "components/mtls/access.yaml",
    "components/mtls/coordinator.yaml",
    "components/mtls/kustomization.yaml",
    "components/mtls/workers.yaml",
    "components/prometheus/access.yaml",
    "components/prometheus/coordinator.yaml",
    "components/prometheus/dashboard.json",
    "components/prometheus/kustomization.yaml",
    "components/prometheus/monitor.yaml",
    "components/prometheus/rules.yaml",
    "components/s3-secret/kustomization.yaml",
    "components/s3-secret/network.yaml",
    "components/s3/kustomization.yaml",
    "components/s3/network.yaml",
    "components/spot-gpu/coordinator.yaml",
    "components/spot-gpu/kustomization.yaml",
    "components/spot-gpu/workers.yaml",
    "components/volume/data.yaml",
    "components/volume/kustomization.yaml",
    "overlays/azure/kustomization.yaml",
    "overlays/gcs/kustomization.yaml",
    "overlays/ipv6/kustomization.yaml",
    "overlays/jobset/kustomization.yaml",
    "overlays/kueue/kustomization.yaml",
    "overlays/local/kustomization.yaml",
    "overlays/mtls/kustomization.yaml",
    "overlays/prometheus/kustomization.yaml",
    "overlays/s3-secret/kustomization.yaml",
    "overlays/s3/kustomization.yaml",
    "overlays/spot-gpu/kustomization.yaml",
];

/// One of them.
pub(crate) fn text(path: &str) -> Option<&'static str> {
    FILES.iter().find(|(name, _)| *name == path).map(|(_, text)| *text)
}

/// The names of the overlays, sorted.
pub fn overlays() -> impl Iterator<Item = &'static str> {
    FILES.iter().filter_map(|(path, _)| path.strip_prefix("overlays/")?.strip_suffix("/kustomization.yaml"))
}
