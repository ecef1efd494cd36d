//! Pictures that a run draws as it trains, as they lie in its folder: `samples/STEP/000.png` and so on, prompt by prompt, and `index.json`,
//! which is written when all of them are there.

use serde::{Deserialize, Serialize};

/// Where they lie in the run's folder.
pub const FOLDER: &str = "samples";
/// What says that all pictures of a step are there, and how they were made.
pub const INDEX: &str = "index.json";

/// The folder of a step's pictures, in the run's.
pub fn folder(step: u64) -> String {
    format!("{FOLDER}/{step:012}")
}

/// The step of a folder like [`folder`]'s; none of any other, for nobody would find its pictures.
pub fn step_of(folder: &str) -> Option<u64> {
    let name = folder.trim_end_matches('/').rsplit('/').next()?;
    if name.len() == 12 && name.bytes().all(|byte| byte.is_ascii_digit()) { name.parse().ok() } else { None }
}

/// The file of a step's picture of this number.
pub fn file(number: usize) -> String {
    format!("{number:03}.png")
}

/// What `index.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// With the weights after this many steps.
    pub step: u64,
    /// The pictures, prompt by prompt.
    pub images: Vec<Image>,
    /// The sampler's name.
    pub sampler: String,
    /// From noise to picture.
    pub steps: u32,
    /// How much the prompt counted beside the negative one.
    pub guidance: f64,
    /// `WIDTHxHEIGHT` in pixels.
    pub size: String,
    /// What was not to be drawn.
    pub negative: Option<String>,
    /// Whether the moving average of the weights drew them.
    pub average: bool,
}

/// One picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its file, beside the index.
    pub file: String,
    /// What was to be drawn.
    pub prompt: String,
    /// What its noise was drawn from.
    pub seed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steps_folder_sorts_by_step_and_tells_it() {
        assert_eq!(folder(400), "samples/000000000400");
        assert_eq!([folder(400).as_str(), "samples/000000000012/", "samples/else"].map(step_of), [Some(400), Some(12), None]);
        assert_eq!(["samples/400", "samples/+00000000400", "samples/0000000000400"].map(step_of), [None; 3]);
        assert_eq!((file(7), file(999)), ("007.png".to_owned(), "999.png".to_owned()));
    }
}
