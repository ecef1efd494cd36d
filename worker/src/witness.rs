//! Whether this worker sees the folder that its coordinator sees: what it saved into another one would never be found (COMMIT).

use ella_proto::v1::Welcome;
use ella_store::{Store, StoreError};
use std::time::Duration;

/// How often the file is looked for, and the pause between: in a shared folder what another machine has just written may be seen a moment later.
const LOOKS: (usize, Duration) = (3, Duration::from_millis(300));

/// Looks for the file that the coordinator has named. Gives what is wrong where this machine has another folder: of a `"run"`, or a `"job"`.
///
/// # Errors
/// The store's.
pub(crate) async fn elsewhere(store: &Store, welcome: &Welcome, of: &str) -> Result<Option<String>, StoreError> {
    let (file, url) = (&welcome.witness_file, store.url());
    if file.is_empty() {
        return Ok(None);
    }
    let mut looks = 0;
    let found = loop {
        looks += 1;
        let found = match store.get_record(file).await {
            Ok(bytes) if String::from_utf8_lossy(&bytes).contains(&welcome.witness) => return Ok(None),
            Ok(_) => "is another one",
            Err(StoreError::NotFound { .. }) => "is not there",
            Err(error) => return Err(error),
        };
        if looks == LOOKS.0 {
            break found;
        }
        tokio::time::sleep(LOOKS.1).await;
    };
    Ok(Some(format!(
        "this worker does not see the {of}'s folder {url}: the coordinator has written {file} there, and here that {found}. All workers must see the \
         coordinator's folder: look at this machine's mounts, and at the endpoint of its store"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn welcome(file: &str, text: &str) -> Welcome {
        Welcome { witness_file: file.into(), witness: text.into(), ..Welcome::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_folder_is_the_coordinators_if_what_that_wrote_is_in_it() {
        let store = Store::in_memory();
        let look = async |file: &str, text: &str| elsewhere(&store, &welcome(file, text), "run").await.unwrap();
        assert_eq!(look("", "").await, None, "nothing is known of it");
        let gone = look("log/000000000007.json", "n1").await.unwrap();
        assert!(
            gone.contains("does not see the run's folder") && gone.contains("log/000000000007.json there, and here that is not there"),
            "{gone}"
        );
        store.put("log/000000000007.json", "{\"nonce\": \"n1\"}".into()).await.unwrap();
        assert_eq!(look("log/000000000007.json", "n1").await, None);
        // A copy from before, or a run of the same name.
        let other = look("log/000000000007.json", "n2").await.unwrap();
        assert!(other.contains("here that is another one"), "{other}");
    }
}
