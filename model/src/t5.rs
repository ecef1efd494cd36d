//! The T5 text encoder.
