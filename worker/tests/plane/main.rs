//! The data plane from outside: the feed, the gradient, embedding, and a worker's life under a scripted coordinator, on a small data set and
//! nano models that are made once.

#![allow(clippy::unwrap_used, missing_docs)] // what fails to unwrap fails the test

mod ahead;
mod coordinator;
mod embed;
mod families;
mod feed;
mod generations;
mod gradient;
mod not_finite;
mod session;
mod world;
