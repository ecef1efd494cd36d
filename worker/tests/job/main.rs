//! Jobs of leased units, over real gRPC with workers in this process, and alone.

#![allow(clippy::unwrap_used)]

mod leased;
mod local;
mod toy;

use std::time::Duration;

/// Nothing in these tests takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(90);

async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} did not come within {PATIENCE:?}"))
}
