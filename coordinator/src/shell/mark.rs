//! A file in a job's folder while its coordinator serves it, by which workers see that theirs is the same. A run has its log for that.

use super::start::nonce;
use ella_proto::config::JobConfig;
use ella_proto::v1::Welcome;
use ella_store::{Store, StoreError};

#[derive(Debug)]
pub(super) struct Mark {
    store: Store,
    file: String,
    text: String,
}

impl Mark {
    /// Leaves one. None, which is warned of, if the coordinator cannot write there: that its workers can is all that a job needs.
    pub(super) async fn leave(config: &JobConfig) -> Option<Self> {
        let left = async {
            let store = Store::open(&config.job.data)?;
            // The same for all coordinators of the job: one that was killed leaves it to the next.
            let (file, text) = (format!("job-{:.16}", config.digest()), nonce());
            store.put(&file, text.clone().into()).await?;
            Ok::<_, StoreError>(Self { store, file, text })
        };
        left.await.inspect_err(|error| tracing::warn!("{error}; so workers cannot tell whether they see the job's folder")).ok()
    }

    /// Has workers look for it.
    pub(super) fn tell(&self, welcome: &mut Welcome) {
        (welcome.witness_file, welcome.witness) = (self.file.clone(), self.text.clone());
    }

    /// Takes it away, if it is not another coordinator's by now.
    pub(super) async fn remove(self) {
        let removed = async {
            match self.store.get(&self.file).await {
                Ok(there) if there == self.text => self.store.delete(&self.file).await,
                Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        };
        if let Err(error) = removed.await {
            tracing::warn!("{error}; {} in the job's folder may be deleted", self.file);
        }
    }
}
