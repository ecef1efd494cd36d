//! The data plane: what a worker does. Feed ([`feed`]) → step ([`train`]) → reduce ([`reduce`]) → commit ([`commit`]), under a
//! coordinator ([`control`], [`session`]); units of a job, alone or under a coordinator ([`job`]): data sets ([`prepare`]), features
//! ([`embed`], [`text`]), captions from a model elsewhere ([`caption`]), and grids of pictures ([`grids`]).

mod album;
pub mod caption;
pub mod commit;
pub mod control;
pub mod device;
pub mod draw;
pub mod embed;
pub mod feed;
pub mod gpu;
pub mod grids;
mod http;
pub mod hub;
pub mod job;
pub mod latents;
mod leave;
pub mod memory;
pub mod meter;
pub mod models;
pub mod noise;
pub mod precision;
pub mod prepare;
pub mod reduce;
pub mod session;
pub mod sight;
pub mod supervise;
pub mod text;
pub mod train;
pub mod trained;
mod vitals;
mod witness;

pub use leave::leave;
