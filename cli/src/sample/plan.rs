//! Which pictures are drawn: of which text, from which seed.

use ella_worker::draw::Shot;
use serde_json::{Value, json};

use crate::ui::{Fail, count};

/// What seeds the pictures get.
#[derive(Debug)]
pub(super) enum Seeds<'a> {
    /// Each prompt's pictures count up from it.
    From(u64),
    /// One for each picture.
    Each(&'a [u64]),
}

/// All pictures to draw.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The prompts, each once.
    pub(super) texts: Vec<String>,
    /// The pictures, prompt by prompt in the order given.
    pub(super) shots: Vec<Shot>,
}

impl Plan {
    /// `images` pictures of each prompt; left out, 1 or as many as there are seeds for.
    pub(super) fn new(prompts: &[String], images: Option<usize>, seeds: &Seeds<'_>) -> Result<Self, Fail> {
        let mut plan = Plan { texts: Vec::new(), shots: Vec::new() };
        let images = images.unwrap_or(match seeds {
            Seeds::From(_) => 1,
            Seeds::Each(seeds) => seeds.len() / prompts.len().max(1),
        });
        let pictures = prompts.len() * images;
        for (number, prompt) in prompts.iter().enumerate() {
            let text = plan.texts.iter().position(|text| text == prompt).unwrap_or(plan.texts.len());
            if text == plan.texts.len() {
                plan.texts.push(prompt.clone());
            }
            for image in 0..images {
                let seed = match seeds {
                    Seeds::From(first) => Some(first.wrapping_add(image as u64)),
                    Seeds::Each(seeds) => seeds.get(number * images + image).copied(),
                };
                plan.shots.extend(seed.map(|seed| Shot { text, seed }));
            }
        }
        match seeds {
            Seeds::Each(seeds) if seeds.len() != pictures || pictures == 0 => {
                let of = format!("{} of {}", count(images.max(1), "picture"), count(prompts.len(), "prompt"));
                let expected = prompts.len() * images.max(1);
                Err(Fail::usage(format_args!(
                    "--seeds must give one for each picture (expected {expected} for {of}, found {})",
                    seeds.len()
                )))
            }
            _ => Ok(plan),
        }
    }

    /// What scripts are told of each picture.
    pub(super) fn json(&self, seeded: bool) -> Vec<Value> {
        self.shots.iter().map(|shot| json!({ "prompt": self.texts[shot.text], "seed": seeded.then_some(shot.seed) })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(prompts: &[&str], images: Option<usize>, seeds: &Seeds<'_>) -> Result<Vec<(usize, u64)>, String> {
        let prompts: Vec<String> = prompts.iter().map(|prompt| (*prompt).to_owned()).collect();
        let plan = Plan::new(&prompts, images, seeds).map_err(|fail| fail.message)?;
        Ok(plan.shots.iter().map(|shot| (shot.text, shot.seed)).collect())
    }

    #[test]
    fn a_pictures_seed_does_not_depend_on_other_prompts() {
        assert_eq!(plan(&["a"], None, &Seeds::From(7)).unwrap(), [(0, 7)]);
        assert_eq!(plan(&["b", "a", "b"], Some(2), &Seeds::From(7)).unwrap(), [(0, 7), (0, 8), (1, 7), (1, 8), (0, 7), (0, 8)]);
    }

    #[test]
    fn seeds_are_given_one_by_one() {
        assert_eq!(plan(&["a", "b"], None, &Seeds::Each(&[5, 9])).unwrap(), [(0, 5), (1, 9)]);
        assert_eq!(plan(&["a"], None, &Seeds::Each(&[5, 9, 5])).unwrap(), [(0, 5), (0, 9), (0, 5)]);
        assert_eq!(plan(&["a", "b"], Some(2), &Seeds::Each(&[1, 2, 3, 4])).unwrap(), [(0, 1), (0, 2), (1, 3), (1, 4)]);
        for (images, seeds) in [(None, &[1, 2, 3][..]), (Some(1), &[1, 2, 3, 4]), (None, &[1]), (Some(3), &[1, 2])] {
            let message = plan(&["a", "b"], images, &Seeds::Each(seeds)).unwrap_err();
            assert!(message.contains("one for each picture") && message.contains(&format!("found {}", seeds.len())), "{message}");
        }
    }
}
