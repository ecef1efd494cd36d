//! Captions from outside: a client against a small endpoint that answers well, fails, stalls, rambles, breaks off and wants a key. Time is
//! tokio's own, and moves on when nobody has anything to do.

#![allow(clippy::unwrap_used, missing_docs)] // what fails to unwrap fails the test

mod answers;
mod config;
mod endpoint;
mod failures;
mod limits;
