//! Captions to token ids.
