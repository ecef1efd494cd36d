//! Data sets: sources, filters, prepared shards, features, sample order. Nothing here links libtorch.
//!
//! From tars to training: [`Source::find`] → [`prepare`](prepare()) → [`DataSet::open`]; text encoders add [`FeatureSet`]s.
//! Invariants held here (design.md §1): COMMIT in small (a manifest is written last, once, and names every byte) and KNOWN (every
//! sample read is kept or refused with a reason).

mod caption;
mod error;
mod feature_file;
mod features;
mod ipc;
pub mod ledger;
mod manifest;
mod mix;
pub mod order;
mod picture;
mod plan;
mod prepare;
mod report;
pub mod scenes;
mod set;
mod shard;
mod source;

pub use caption::{Captions, captions_from_txt, prepare_captions};
pub use error::DataError;
pub use feature_file::{FeatureReader, FeatureWriter};
pub use features::{FeatureDtype, FeatureLayers, FeatureManifest, FeatureSet, FeatureSpec, Padding};
pub use manifest::{LatentSpec, MANIFEST, Manifest, SCHEMA, Settings, ShardEntry, SourceEntry};
pub use picture::{Picture, PictureRules, cut, decode_rgb, encode_jpeg};
pub use plan::{PLAN, Plan, REPORT, UnitRecord};
pub use prepare::{LatentEncoder, PrepareOptions, Progress, Watch, Work, prepare, prepare_unit};
pub use report::{Refusal, Refused, Report};
pub use set::{CacheLimits, DataSet, Features};
pub use shard::{Row, RowRef, ShardLayout, ShardReader, ShardWriter};
pub use source::{Field, Fields, Member, Piece, PieceRead, Sample, Source, SourceKind, SourceOptions};
