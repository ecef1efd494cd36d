//! Faults that are drawn: what the environment variable `ELLA_STORE_FAULTS` asks for, to try on a user's own machines what becomes of a run
//! whose store fails. Nothing sets it but `ella chaos`, and whoever wants to.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::error::{Operation, StoreError};
use crate::faulty::{Failure, Faults};
use crate::store::Store;

/// The variable.
pub(crate) const VARIABLE: &str = "ELLA_STORE_FAULTS";
/// How it is written.
const FORM: &str =
    "expected \"seed=7,rate=0.02\", rates from 0 to 1, and perhaps \",surge=0.5,surge_file=/PATH\": the rate while that file exists";
/// The shortest and the longest delay, in milliseconds.
const DELAYS: (u64, u64) = (20, 500);
/// Half a reply, about: most objects of a run are larger.
const CUT_AT: u64 = 200;

/// So many operations in all of this process have been asked about: each has a draw of its own.
static DRAWN: AtomicU64 = AtomicU64::new(0);

/// Which share of operations fails.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chance {
    /// Draws others.
    pub seed: u64,
    /// Of all operations, from 0 to 1.
    pub rate: f64,
    /// The same while `surge_file` exists.
    pub surge: f64,
    /// Any file.
    pub surge_file: Option<PathBuf>,
}

impl FromStr for Chance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut chance = Self::default();
        let share = |text: &str| text.parse::<f64>().ok().filter(|rate| (0.0..=1.0).contains(rate));
        for item in text.split(',') {
            let wrong = || format!("\"{item}\" is not understood; {FORM}");
            let (key, value) = item.split_once('=').ok_or_else(wrong)?;
            match key.trim() {
                "seed" => chance.seed = value.parse().map_err(|_| wrong())?,
                "rate" => chance.rate = share(value).ok_or_else(wrong)?,
                "surge" => chance.surge = share(value).ok_or_else(wrong)?,
                "surge_file" => chance.surge_file = Some(value.into()),
                _ => return Err(wrong()),
            }
        }
        Ok(chance)
    }
}

impl Chance {
    /// How the next operation is to fail, if it is to.
    pub(crate) fn draw(&self, operation: Operation) -> Option<Failure> {
        self.nth(DRAWN.fetch_add(1, Relaxed), operation)
    }

    fn nth(&self, number: u64, operation: Operation) -> Option<Failure> {
        let surges = self.surge_file.as_ref().is_some_and(|file| file.exists());
        let rate = if surges { self.surge } else { self.rate };
        let bits = mixed(mixed(self.seed) ^ number);
        if (bits >> 11) as f64 / (1u64 << 53) as f64 >= rate {
            return None;
        }
        let which = mixed(bits);
        let slow = Failure::Slow(Duration::from_millis(DELAYS.0 + mixed(which) % (DELAYS.1 - DELAYS.0)));
        let ways: &[Failure] = match operation {
            Operation::Get => &[Failure::Before, slow, Failure::CutAt(CUT_AT)],
            Operation::Head | Operation::List => &[Failure::Before, slow],
            _ => &[Failure::Before, Failure::LostReply, Failure::LostReply, slow],
        };
        Some(ways[(which % ways.len() as u64) as usize])
    }
}

/// SplitMix64's finisher: every bit depends on every bit.
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The store, with the faults that the environment asks for between it and its backend, if it does.
pub(crate) fn as_the_environment_says(store: Store) -> Result<Store, StoreError> {
    static WARNING: Once = Once::new();
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(store) };
    let text = text.to_string_lossy();
    let what = |why: String| StoreError::Unsupported { url: store.url().to_owned(), what: format!("{VARIABLE}={text}: {why}") };
    let chance: Chance = text.parse().map_err(what)?;
    WARNING.call_once(|| tracing::warn!("{VARIABLE}={text}: store operations fail or are slow by design; unset it for real work"));
    Ok(Faults::by(chance).inject(&store))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_and_what_is_wrong_with_it_is_said() {
        let chance: Chance = "seed=7,rate=0.05".parse().unwrap();
        assert_eq!(chance, Chance { seed: 7, rate: 0.05, ..Chance::default() });
        let chance: Chance = "seed=7,rate=0,surge=1,surge_file=/tmp/x".parse().unwrap();
        assert_eq!((chance.surge, chance.surge_file), (1.0, Some("/tmp/x".into())));
        for bad in ["", "rate", "rate=2", "rate=-0.1", "rate=nan", "seed=x", "speed=1"] {
            let why = bad.parse::<Chance>().unwrap_err();
            assert!(why.contains("seed=7,rate=0.02"), "{bad}: {why}");
        }
    }

    #[test]
    fn the_share_is_as_asked_and_the_same_for_the_same_seed() {
        let chance = |seed| Chance { seed, rate: 0.1, ..Chance::default() };
        let drawn = |seed| (0..10_000).map(|n| chance(seed).nth(n, Operation::Create)).collect::<Vec<_>>();
        let failures = drawn(1).into_iter().flatten().count();
        assert!((900..1100).contains(&failures), "{failures}");
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        assert!(drawn(1).contains(&Some(Failure::LostReply)) && drawn(1).contains(&Some(Failure::Before)));
    }

    #[test]
    fn a_surge_lasts_as_long_as_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let chance = Chance { seed: 1, rate: 0.0, surge: 1.0, surge_file: Some(file.path().to_owned()) };
        assert!((0..100).all(|n| chance.nth(n, Operation::Get).is_some()));
        drop(file);
        assert!((0..100).all(|n| chance.nth(n, Operation::Get).is_none()));
    }

    /// What a store's callers see of passing faults is that it is slow: a lost reply of a conditional write is told from a lost race.
    #[tokio::test(start_paused = true)]
    async fn writes_and_reads_survive_them() {
        let faults = Faults::by(Chance { seed: 3, rate: 0.3, ..Chance::default() });
        let store = faults.inject(&Store::in_memory());
        for n in 0..200 {
            let (key, bytes) = (format!("log/{n}"), bytes::Bytes::from(vec![n as u8; 500]));
            assert_eq!(store.create(&key, bytes.clone()).await.unwrap(), crate::Created::Yes, "{key}");
            assert_eq!(store.get(&key).await.unwrap(), bytes);
        }
        assert_eq!(store.list("log").await.unwrap().len(), 200);
        assert!(store.retries() > 50, "{:?}", store.retry_report());
    }
}
