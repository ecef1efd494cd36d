//! Captions from a multimodal model behind an OpenAI-compatible endpoint (vLLM, SGLang, OpenAI and others): a picture in, a caption out.
//!
//! [`CaptionConfig`] says what is asked of which endpoint, [`Estimate`] what it will take, and [`CaptionClient`] asks. Every picture ends as
//! a caption or as a [`Refused`] with its reason, and every retry is counted ([`CaptionCounts`]; KNOWN). Every wait has an end: an attempt
//! has a deadline and a largest answer, retries are numbered and their pauses bounded, and who waits for a turn waits for such calls only
//! (LIVE). The endpoint's key comes from the environment, and is in no config, error or log.

mod client;
mod config;
mod counts;
mod error;
mod estimate;
mod pace;
mod prompt;
mod reply;
mod request;

pub use self::client::{CaptionClient, Captioned, Probe};
pub use self::config::{CaptionConfig, Cut, ImageDetail};
pub use self::counts::CaptionCounts;
pub use self::error::{CaptionFailure, CaptionRefusal, EndpointError, Passing, Refused};
pub use self::estimate::{Estimate, Work};
pub use self::prompt::{DEFAULT_PROMPT, fill};
pub use self::reply::Usage;
