//! The GPU's half of the kernels, by an emulator of its threads: all tests of fused operators once more.

#[path = "fused.rs"]
mod fused;
