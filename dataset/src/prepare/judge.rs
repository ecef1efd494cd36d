//! One sample filtered, and its picture made. Pure: this is what runs on all cores.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use ella_store::Digest;

use super::PrepareOptions;
use crate::caption;
use crate::picture::{self, PictureRules, Scratch};
use crate::report::Refusal;
use crate::settings::{Duplicates, Settings};
use crate::shard::Row;
use crate::source::{Member, Sample};

/// Counts tokens as a text encoder does. Implemented where tokenizers are.
pub trait TokenCounter: Send + Sync {
    /// Which tokenizer this is.
    fn digest(&self) -> Digest;
    /// How many tokens a caption has, special ones included. None: it cannot be told.
    fn count(&self, caption: &str) -> Option<usize>;
}

/// A list of keys.
#[derive(Clone, Default)]
pub struct KeyList {
    keys: HashSet<String>,
    digest: Option<Digest>,
}

impl fmt::Debug for KeyList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyList").field("keys", &self.keys.len()).field("digest", &self.digest).finish()
    }
}

impl KeyList {
    /// One key a line; white space around it and empty lines do not count. Equal sets of keys are the same list.
    pub fn parse(text: &str) -> KeyList {
        let mut lines: Vec<&str> = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines.sort_unstable();
        lines.dedup();
        let digest = Some(Digest::of(lines.join("\n").as_bytes()));
        KeyList { keys: lines.into_iter().map(str::to_owned).collect(), digest }
    }

    /// Digest of the list, as the settings name it.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// A sample that passed the filters.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) row: Row,
    pub(super) size: (u32, u32),
    /// `[height, width, 3]`, only where latents are made.
    pub(super) rgb: Vec<u8>,
    /// Half the digest of the picture's file, where duplicates are looked for.
    pub(super) content: Option<String>,
    /// Perceptual hash, where pictures that look alike are looked for.
    pub(super) look: Option<String>,
}

/// The rules for all samples of a part.
pub(super) struct Judge {
    settings: Settings,
    sizes: Vec<(u32, u32)>,
    prefix: String,
    latents: bool,
    tokens: Option<Arc<dyn TokenCounter>>,
    allow: Option<Arc<KeyList>>,
    deny: Option<Arc<KeyList>>,
    /// Samples that are left out as duplicates.
    left_out: HashMap<String, Refusal>,
}

impl Judge {
    pub(super) fn new(settings: &Settings, prefix: String, options: &PrepareOptions, left_out: HashMap<String, Refusal>) -> Judge {
        Judge {
            settings: settings.clone(),
            sizes: settings.sizes(),
            prefix,
            latents: options.latents.is_some(),
            tokens: options.tokens.clone(),
            allow: options.allow.clone(),
            deny: options.deny.clone(),
            left_out,
        }
    }

    /// The sample's key in the data set, and what becomes of it.
    pub(super) fn judge(&self, sample: Sample, scratch: &mut Scratch) -> (String, Result<Kept, Refusal>) {
        let key = format!("{}{}", self.prefix, sample.key);
        let kept = self.keep(&key, &sample, scratch);
        (key, kept)
    }

    fn keep(&self, key: &str, sample: &Sample, scratch: &mut Scratch) -> Result<Kept, Refusal> {
        self.judge_key(key, sample)?;
        self.judge_numbers(sample)?;
        let image = match &sample.image {
            Member::Absent => return Err(Refusal::ImageMissing),
            Member::TooLarge => return Err(Refusal::ImageTooLarge),
            Member::Data(bytes) => bytes,
        };
        let tokens = self.tokens.as_deref();
        let captions = caption::of_sample(&sample.fields, &self.settings, tokens)?;
        let picture = picture::cut(image, key, &self.picture_rules(), scratch)?;
        let encoding = self.settings.encoding;
        let file = if self.settings.images { picture::encode(&picture.rgb, picture.size, encoding, scratch)? } else { Vec::new() };
        let row = Row { key: key.to_owned(), captions, original: picture.original, crop: picture.crop, image: file, moments: Vec::new() };
        let content = (self.settings.duplicates != Duplicates::Keep).then(|| Digest::of(image).to_string()[..32].to_owned());
        let look = picture.phash.map(|look| format!("{look:016x}"));
        Ok(Kept { row, size: picture.size, rgb: if self.latents { picture.rgb } else { Vec::new() }, content, look })
    }

    fn judge_key(&self, key: &str, sample: &Sample) -> Result<(), Refusal> {
        if let Some(why) = &sample.refused {
            return Err(why.clone());
        }
        if !sample.key_is_utf8 {
            return Err(Refusal::KeyNotUtf8);
        }
        if let Some(why) = self.left_out.get(key) {
            return Err(why.clone());
        }
        let listed = |list: &Option<Arc<KeyList>>| list.as_ref().map(|list| list.keys.contains(key) || list.keys.contains(&sample.key));
        match (listed(&self.allow), listed(&self.deny)) {
            (Some(false), _) => Err(Refusal::NotAllowed),
            (_, Some(true)) => Err(Refusal::Denied),
            _ => Ok(()),
        }
    }

    fn judge_numbers(&self, sample: &Sample) -> Result<(), Refusal> {
        for condition in &self.settings.filters.conditions {
            match condition.holds(&sample.fields) {
                Some(true) => {}
                Some(false) => return Err(Refusal::Condition(condition.to_string())),
                None => return Err(Refusal::NumberMissing(condition.field().to_owned())),
            }
        }
        Ok(())
    }

    fn picture_rules(&self) -> PictureRules<'_> {
        let filters = &self.settings.filters;
        PictureRules {
            sizes: &self.sizes,
            crop: self.settings.crop,
            min_edge: filters.min_edge,
            max_aspect: filters.max_aspect,
            min_area: filters.min_area,
            max_area: filters.max_area,
            max_pixels: filters.max_pixels,
            phash: matches!(self.settings.duplicates, Duplicates::Near { .. }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_of_keys_are_the_same_list() {
        let (a, b) = (KeyList::parse("\u{feff}b\r\n a \n\nb\n"), KeyList::parse("a\nb"));
        assert_eq!((a.len(), a.digest()), (2, b.digest()));
        assert_ne!(a.digest(), KeyList::parse("a").digest());
    }
}
