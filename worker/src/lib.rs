//! The data plane: what a worker does. Feed ([`feed`]) → step ([`train`]) → reduce ([`reduce`]) → commit ([`commit`]), under a
//! coordinator ([`control`], [`session`]); units of a job, alone or under a coordinator ([`job`]); and the text encoder's features
//! ([`text`], [`embed`]).

pub mod commit;
pub mod control;
pub mod device;
pub mod embed;
pub mod feed;
pub mod hub;
pub mod job;
pub mod meter;
pub mod models;
pub mod noise;
pub mod reduce;
pub mod session;
pub mod text;
pub mod train;
