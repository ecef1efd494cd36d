//! Data sets: sources, filters, prepared shards, features, sample order. Nothing here links libtorch.
//!
//! From files to training: [`Source::find`] → [`Preparation`] → [`DataSet::open`]; text encoders add [`FeatureSet`]s, captioners [`CaptionSet`]s.
//! Futures of some size are boxed: the code of an async function is compiled by every program that awaits it, that of a box here alone.
//! Invariants held here (design.md §1): COMMIT in small (a manifest is written last, once, and names every byte) and KNOWN (every
//! sample read is kept or refused with a reason).

mod ahead;
mod caption;
mod caption_set;
mod caption_stats;
mod content;
mod error;
mod feature_file;
mod features;
mod files;
mod ipc;
pub mod ledger;
mod manifest;
mod mix;
pub mod order;
mod picture;
mod plan;
mod prepare;
mod progress;
mod prompts;
mod report;
mod room;
pub mod scenes;
mod set;
mod settings;
mod shard;
mod sidecar;
mod source;
mod tree;
mod verify;

pub use ahead::{Ahead, Reading};
pub use caption::{Captions, captions_from_txt, prepare_captions};
pub use caption_set::{CaptionManifest, CaptionSet, CaptionSpec, Made, captions_in};
pub use caption_stats::{CaptionCounter, CaptionStats, Lengths, Speech, Tokens, caption_stats, is_whole, quantile_rank, sentences};
pub use error::DataError;
pub use feature_file::{FeatureReader, FeatureSpool, FeatureWriter};
pub use features::{FeatureDtype, FeatureLayers, FeatureManifest, FeatureSet, FeatureSpec, Padding, features_in};
pub use files::{CacheLimits, Opened};
pub use manifest::{LatentSpec, MANIFEST, Manifest, SCHEMA, ShardEntry, SourceEntry};
pub use picture::{Crop, Encoding, Picture, PictureRules, SDXL_BUCKETS, Scratch, buckets, cut, decode_rgb, encode};
pub use plan::{PLAN, Part, Plan, PlannedSource, REPORT, UnitRecord, write_file};
pub use prepare::{KeyList, LatentEncoder, Preparation, PrepareOptions, ToDo, TokenCounter, UnitWatch, originals, prepare};
pub use progress::{Progress, progress};
pub use prompts::{Prompt, Prompts};
pub use report::{MOST_NAMED, Refusal, Refused, Report};
pub use room::Memory;
pub use set::{AddedCaptions, DataSet, Features};
pub use settings::{Buckets, CaptionColumn, Condition, Duplicates, Filters, Settings, TokenRule};
pub use shard::{Row, RowRef, ShardLayout, ShardReader, ShardWriter};
pub use sidecar::{Counts, SidecarManifest};
pub use source::{Field, Fields, Member, Piece, PieceRead, Sample, Source, SourceKind, SourceOptions, csv_records};
pub use verify::{Damage, Inventory, Verified};
