//! Durations and sizes as people write them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
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

/// The longest that a command can be told to wait, in seconds: a year. Clocks can count no further than some bound.
pub const MOST_SECONDS: u64 = 365 * 86_400;

/// A number of bytes; in TOML a string such as `"512MiB"`, `"40GiB"` or `"80GB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const SIZES: [(&str, u64); 8] = [
    ("B", 1),
    ("KB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let largest = SIZES.iter().rev().find(|(_, size)| self.0 >= *size && self.0.is_multiple_of(*size));
        let (name, size) = largest.unwrap_or(&SIZES[0]);
        write!(f, "{}{name}", self.0 / size)
    }
}

impl FromStr for Bytes {
    type Err = String;

    /// Whole numbers and fractions of a unit, `"1.5GiB"`; a fraction of a byte is dropped.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a size; write one such as \"512MiB\", \"40GiB\" or \"80GB\"");
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let unit = text[end..].trim();
        let (_, size) = SIZES.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let bytes = match text[..end].parse::<u64>() {
            Ok(whole) => whole.checked_mul(*size),
            Err(_) => text[..end].parse::<f64>().ok().map(|number| number * *size as f64).filter(|b| *b < 2f64.powi(63)).map(|b| b as u64),
        };
        bytes.map(Self).ok_or_else(wrong)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Millis};

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

    #[test]
    fn sizes_read_back_as_written() {
        for (text, bytes) in [("0B", 0), ("40GiB", 40 << 30), ("80GB", 80_000_000_000), ("512MiB", 512 << 20), ("7B", 7), ("1TiB", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)));
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!("1.5 GiB".parse(), Ok(Bytes(3 << 29)));
        for bad in ["", "40", "GiB", "-1GiB", "1.5.2GiB", "40 gigabytes", "99999999999999999999GiB", "99999999999TiB"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }
}
