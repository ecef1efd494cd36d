//! Durations as people write them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::time::Duration;

/// A duration in milliseconds; in TOML a string such as `"250ms"`, `"10s"`, `"5m"` or `"2h"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

impl Millis {
    /// As the standard library has it.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text[..digits].parse().ok()?;
        let unit = text[digits..].trim();
        let (_, millis) = UNITS.iter().find(|(name, _)| *name == unit)?;
        number.checked_mul(*millis).map(Self)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let largest = UNITS.iter().rev().find(|(_, millis)| self.0 >= *millis && self.0.is_multiple_of(*millis));
        let (name, millis) = largest.unwrap_or(&UNITS[0]);
        write!(f, "{}{name}", self.0 / millis)
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!("\"{text}\" is not a duration; write one such as \"250ms\", \"10s\", \"5m\" or \"2h\""))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Millis;

    #[test]
    fn durations_read_back_as_written() {
        for (text, millis) in [("250ms", 250), ("10s", 10_000), ("5m", 300_000), ("2h", 7_200_000), ("0ms", 0)] {
            assert_eq!(Millis::parse(text), Some(Millis(millis)));
            assert_eq!(Millis(millis).to_string(), text);
        }
        for bad in ["", "10", "s", "-1s", "1.5s", "10 parsecs", "99999999999999999999h"] {
            assert_eq!(Millis::parse(bad), None, "{bad}");
        }
    }
}
