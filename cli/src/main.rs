//! cli
fn main(){ ella_model::t(); }
