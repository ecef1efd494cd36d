//! Scenes as a benchmark: prompts to draw, and a table of questions in DPG-Bench's form to score the pictures by.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::questions::Question;
use super::scene_with;
use super::world::{Scene, World};
use super::write::{ScenesConfig, ScenesError, failed, refuse_taken};

/// What says which scenes a folder's prompts are of. It is written last.
pub const SUITE: &str = "suite.json";

/// How much a prompt tells of its scene.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telling {
    /// All.
    Dense,
    /// A few things, in at most 12 words.
    Short,
}

impl Telling {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Dense, Self::Short];

    /// The folder of its prompts; its questions are in the file of this name that ends with `.csv`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Short => "short",
        }
    }

    /// What it says of a scene.
    pub fn caption(self, scene: &Scene) -> String {
        match self {
            Self::Dense => scene.dense_caption(),
            Self::Short => scene.short_caption(),
        }
    }

    /// What a picture of that is asked.
    pub fn questions(self, scene: &Scene) -> Vec<Question> {
        match self {
            Self::Dense => scene.questions(),
            Self::Short => scene.short_questions(),
        }
    }
}

/// Which scenes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suite {
    /// The world's name.
    world: String,
    /// What they are drawn from.
    pub seed: u64,
    /// How many.
    pub count: u64,
    /// Objects in a scene.
    pub objects: RangeInclusive<u32>,
}

/// Why a folder is not a suite.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// It could not be read.
    #[error("{path}: cannot be read ({source}); write it with ella scenes --prompts")]
    Unreadable {
        /// The file.
        path: String,
        /// The system's words.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("{path}: {why}; write it with ella scenes --prompts")]
    NotSuite {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
}

impl Suite {
    /// Scenes of a world.
    pub fn new(world: World, seed: u64, count: u64, objects: RangeInclusive<u32>) -> Self {
        Self { world: world.name().to_owned(), seed, count, objects }
    }

    /// What a folder's prompts are of.
    ///
    /// # Errors
    /// The folder was not written by [`Suite::write`].
    pub fn read(folder: &Path) -> Result<Self, SuiteError> {
        let path = folder.join(SUITE);
        let text = fs::read(&path).map_err(|source| SuiteError::Unreadable { path: path.display().to_string(), source })?;
        let not = |why: String| SuiteError::NotSuite { path: path.display().to_string(), why };
        let suite: Self = serde_json::from_slice(&text).map_err(|error| not(error.to_string()))?;
        if suite.world().is_none() {
            return Err(not(format!("there is no world {:?}", suite.world)));
        }
        Ok(suite)
    }

    fn world(&self) -> Option<World> {
        World::NAMES.iter().find(|(name, _)| *name == self.world).map(|(_, world)| *world)
    }

    /// The name of a scene's prompt.
    pub fn key(&self, index: u64) -> String {
        format!("scene-{}-{index:09}", self.seed)
    }

    /// The scenes, each with its prompt's name.
    pub fn scenes(&self) -> impl Iterator<Item = (String, Scene)> {
        let world = self.world().unwrap_or_default();
        (0..self.count).map(move |index| (self.key(index), scene_with(world, self.seed, index, &self.objects)))
    }

    /// Writes `dense/KEY.txt` and `short/KEY.txt`, a prompt each, `dense.csv` and `short.csv` with their questions, and [`SUITE`].
    ///
    /// # Errors
    /// A setting is out of its range, a prompt is there that is not of this suite, the folder holds something else, or the system refused.
    pub fn write(&self, out: &Path) -> Result<(), ScenesError> {
        ScenesConfig {
            world: self.world().unwrap_or_default(),
            seed: self.seed,
            count: self.count,
            objects: self.objects.clone(),
            ..ScenesConfig::default()
        }
        .check()?;
        refuse_taken(out)?;
        for telling in Telling::ALL {
            let folder = out.join(telling.name());
            fs::create_dir_all(&folder).map_err(failed(&folder, "create this folder"))?;
            self.refuse_stale(&folder)?;
        }
        for telling in Telling::ALL {
            let folder = out.join(telling.name());
            let mut table = HEADER.to_owned();
            for (key, scene) in self.scenes() {
                let (caption, file) = (telling.caption(&scene), folder.join(format!("{key}.txt")));
                fs::write(&file, &caption).map_err(failed(&file, "write this file"))?;
                telling.questions(&scene).iter().for_each(|question| table += &row(&key, &caption, question));
            }
            let file = out.join(format!("{}.csv", telling.name()));
            fs::write(&file, table).map_err(failed(&file, "write this file"))?;
        }
        let file = out.join(SUITE);
        fs::write(&file, serde_json::json!(self).to_string()).map_err(failed(&file, "write this file"))
    }

    /// Prompts of another suite would silently be drawn with this one's, and scored by nobody.
    fn refuse_stale(&self, folder: &Path) -> Result<(), ScenesError> {
        let own: HashSet<String> = (0..self.count).map(|index| format!("{}.txt", self.key(index))).collect();
        for entry in fs::read_dir(folder).map_err(failed(folder, "list this folder"))? {
            let path = entry.map_err(failed(folder, "list this folder"))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".txt") && !own.contains(name) {
                return Err(ScenesError::Stale { path, files: format!("{} prompts", self.count) });
            }
        }
        Ok(())
    }
}

/// The columns of `dpg_bench.csv`.
const HEADER: &str = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n";

fn row(key: &str, caption: &str, question: &Question) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let Question { proposition_id, dependency, category_broad, category_detailed, tuple, question_natural_language, .. } = question;
    let (caption, dependency, tuple, asked) = (quoted(caption), quoted(dependency), quoted(tuple), quoted(question_natural_language));
    format!("{key},{caption},,{proposition_id},{dependency},{category_broad},{category_detailed},{tuple},{asked}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_says_what_its_prompts_are_of() {
        let dir = tempfile::tempdir().unwrap();
        let suite = Suite::new(World::Mini, 9, 20, 1..=4);
        suite.write(dir.path()).unwrap();
        assert_eq!(Suite::read(dir.path()).unwrap(), suite);
        for (telling, columns) in [(Telling::Dense, 9), (Telling::Short, 9)] {
            let table = fs::read_to_string(dir.path().join(format!("{}.csv", telling.name()))).unwrap();
            let asked: usize = suite.scenes().map(|(_, scene)| telling.questions(&scene).len()).sum();
            assert_eq!(table.lines().count(), 1 + asked);
            assert_eq!(table.lines().next().unwrap().split(',').count(), columns);
            for (key, scene) in suite.scenes() {
                let prompt = fs::read_to_string(dir.path().join(telling.name()).join(format!("{key}.txt"))).unwrap();
                assert_eq!(prompt, telling.caption(&scene));
            }
        }
    }

    #[test]
    fn prompts_of_another_suite_are_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        Suite::new(World::Mini, 9, 3, 1..=4).write(dir.path()).unwrap();
        let fewer = Suite::new(World::Mini, 9, 2, 1..=4);
        let error = fewer.write(dir.path()).unwrap_err();
        assert!(
            matches!(&error, ScenesError::Stale { path, files } if files == "2 prompts" && path.ends_with("dense/scene-9-000000002.txt"))
        );
        assert_eq!(Suite::read(dir.path()).unwrap().count, 3);
        Suite::new(World::Mini, 9, 4, 1..=4).write(dir.path()).unwrap();
    }

    #[test]
    fn what_is_not_a_suite_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Suite::read(dir.path()), Err(SuiteError::Unreadable { .. })));
        fs::write(dir.path().join(SUITE), "{\"world\":\"flat\",\"seed\":1,\"count\":1,\"objects\":{\"start\":1,\"end\":2}}").unwrap();
        let error = Suite::read(dir.path()).unwrap_err();
        assert!(error.to_string().contains("no world \"flat\""), "{error}");
    }
}
