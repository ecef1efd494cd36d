//! Random models to try things on.
