//! WebDataset tars of scenes.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use image::{
    ExtendedColorType, ImageEncoder,
    codecs::png::{CompressionType, FilterType, PngEncoder},
};
use rayon::prelude::*;
use serde::Serialize;

use super::{
    truth::Truth,
    world::{Scene, World},
};
use crate::{manifest::MANIFEST, plan::PLAN};

/// The smallest and the largest picture.
const SIZES: RangeInclusive<u32> = 16..=4096;

/// About so many bytes of pictures are rendered between two writes.
const BATCH_BYTES: usize = 32 << 20;

/// What [`write()`] makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScenesConfig {
    /// How many scenes.
    pub count: u64,
    /// What may be in them.
    pub world: World,
    /// What they are drawn from.
    pub seed: u64,
    /// Width and height in pixels, 16 to 4096.
    pub size: u32,
    /// Scenes in a tar; the last one may have fewer.
    pub per_tar: u64,
    /// Objects in a scene, within 1 to [`World::most_objects`].
    pub objects: RangeInclusive<u32>,
    /// Every so manieth scene has its short caption as `.txt`; 0: none has.
    pub short_every: u64,
}

impl Default for ScenesConfig {
    fn default() -> Self {
        Self { count: 1000, world: World::Rich, seed: 0, size: 64, per_tar: 1000, objects: 1..=World::Rich.most_objects(), short_every: 0 }
    }
}

/// What [`write()`] made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ScenesReport {
    /// Scenes written.
    pub scenes: u64,
    /// Objects in them.
    pub objects: u64,
    /// Tars written.
    pub tars: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why scenes were not written.
#[derive(Debug, thiserror::Error)]
pub enum ScenesError {
    /// A setting is out of its range.
    #[error("scenes: {field} is {found} (expected {rule})")]
    Setting {
        /// Which setting.
        field: &'static str,
        /// What it must be.
        rule: &'static str,
        /// What was given.
        found: String,
    },
    /// The folder holds a file of another set, which would be read as part of this one.
    #[error("{}: is not part of these {files} (another set's?); remove it, or choose another folder", path.display())]
    Stale {
        /// The file in the way.
        path: PathBuf,
        /// What there will be, as in `2 tars`.
        files: String,
    },
    /// The folder is a prepared data set's.
    #[error("{}: holds something else: a prepared data set ({file} is there); choose another folder", folder.display())]
    Taken {
        /// The folder.
        folder: PathBuf,
        /// What says so.
        file: &'static str,
    },
    /// The system refused: no such folder, no permission, a full disk.
    #[error("{}: cannot {action} ({source}); free space or choose another folder, then run the same command again", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A picture could not be encoded.
    #[error("scene {index}: cannot be encoded as png")]
    Encode {
        /// Which scene.
        index: u64,
        /// What the encoder said.
        source: image::ImageError,
    },
}

impl ScenesConfig {
    pub(super) fn check(&self) -> Result<(), ScenesError> {
        let (first, last) = (*self.objects.start(), *self.objects.end());
        let rules = [
            ("count", self.count > 0, "at least 1", self.count.to_string()),
            ("per_tar", self.per_tar > 0, "at least 1", self.per_tar.to_string()),
            ("size", SIZES.contains(&self.size), "16 to 4096 pixels", self.size.to_string()),
            (
                "objects",
                1 <= first && first <= last && last <= self.world.most_objects(),
                "a range within 1 and the most that the world has",
                format!("{first} to {last}"),
            ),
        ];
        match rules.into_iter().find(|(_, holds, ..)| !holds) {
            Some((field, _, rule, found)) => Err(ScenesError::Setting { field, rule, found }),
            None => Ok(()),
        }
    }

    fn tars(&self) -> u64 {
        self.count.div_ceil(self.per_tar)
    }

    /// The scenes of a tar.
    fn part(&self, tar: u64) -> std::ops::Range<u64> {
        tar * self.per_tar..self.count.min((tar + 1).saturating_mul(self.per_tar))
    }
}

/// Writes `scenes-00000.tar`, `scenes-00001.tar`, … into the folder `out`, which is made if it is not there.
///
/// A scene is three members named by its key, `scene-SEED-INDEX`: `.png`, `.txt` (the dense caption, or the short one, see
/// [`ScenesConfig::short_every`]) and `.json` (`caption`, `short_caption`, `truth`). Scenes are rendered on rayon's current pool and written in order. A tar gets
/// its name when it is whole; one of this name is replaced. `progress` is told the number of scenes written so far.
///
/// # Errors
/// [`ScenesError`]: a setting out of range, a tar in the folder that is not of this set, a folder that holds something else, or what the system
/// refused.
pub fn write(out: &Path, config: &ScenesConfig, progress: &mut dyn FnMut(u64)) -> Result<ScenesReport, ScenesError> {
    config.check()?;
    refuse_taken(out)?;
    fs::create_dir_all(out).map_err(failed(out, "create this folder"))?;
    refuse_stale(out, config.tars())?;
    let mut report = ScenesReport::default();
    for tar in 0..config.tars() {
        let path = out.join(tar_name(tar));
        let partial = out.join(format!("{}.partial", tar_name(tar)));
        let written = write_tar(&partial, config, tar, &mut report, progress);
        let named = written.and_then(|()| fs::rename(&partial, &path).map_err(failed(&path, "give the finished tar its name")));
        if let Err(error) = named {
            // The reason of the failure is what counts, not whether its trace could be removed.
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
        report.tars += 1;
    }
    Ok(report)
}

fn tar_name(tar: u64) -> String {
    format!("scenes-{tar:05}.tar")
}

pub(super) fn failed<'a>(path: &'a Path, action: &'static str) -> impl FnOnce(io::Error) -> ScenesError + 'a {
    move |source| ScenesError::Io { path: path.to_owned(), action, source }
}

/// Among the files of a prepared data set, tars would be nobody's.
pub(super) fn refuse_taken(out: &Path) -> Result<(), ScenesError> {
    match [PLAN, MANIFEST].into_iter().find(|file| out.join(file).exists()) {
        Some(file) => Err(ScenesError::Taken { folder: out.to_owned(), file }),
        None => Ok(()),
    }
}

/// Tars of an earlier run with more scenes would silently join the set.
fn refuse_stale(out: &Path, tars: u64) -> Result<(), ScenesError> {
    for entry in fs::read_dir(out).map_err(failed(out, "list this folder"))? {
        let path = entry.map_err(failed(out, "list this folder"))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("scenes-").and_then(|rest| rest.strip_suffix(".tar"));
        if number.is_some_and(|number| number.parse::<u64>().is_ok_and(|number| number >= tars)) {
            return Err(ScenesError::Stale { path, files: format!("{tars} tars") });
        }
    }
    Ok(())
}

fn write_tar(
    path: &Path,
    config: &ScenesConfig,
    tar: u64,
    report: &mut ScenesReport,
    progress: &mut dyn FnMut(u64),
) -> Result<(), ScenesError> {
    let file = File::create(path).map_err(failed(path, "create this file"))?;
    let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, file));
    let part: Vec<u64> = config.part(tar).collect();
    let batch = (BATCH_BYTES / (config.size as usize).pow(2) / 3).clamp(8, 256);
    for indices in part.chunks(batch) {
        let samples: Vec<Sample> = indices.par_iter().map(|index| Sample::make(config, *index)).collect::<Result<_, _>>()?;
        for sample in samples {
            sample.append(&mut archive).map_err(failed(path, "write this file"))?;
            report.scenes += 1;
            report.objects += sample.objects;
        }
        progress(report.scenes);
    }
    let file = archive.into_inner().and_then(|buffer| buffer.into_inner().map_err(io::IntoInnerError::into_error));
    let size = file.and_then(|file| file.sync_all().and_then(|()| file.metadata()));
    report.bytes += size.map_err(failed(path, "write this file"))?.len();
    Ok(())
}

/// One scene as it lies in a tar.
struct Sample {
    key: String,
    png: Vec<u8>,
    text: String,
    json: Vec<u8>,
    objects: u64,
}

#[derive(Serialize)]
struct Label<'a> {
    caption: &'a str,
    short_caption: String,
    truth: Truth<'a>,
}

impl Sample {
    fn make(config: &ScenesConfig, index: u64) -> Result<Self, ScenesError> {
        let scene = Scene::draw(config.world, config.seed, index, &config.objects);
        let encode_failed = |source| ScenesError::Encode { index, source };
        let mut png = Vec::new();
        PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Up)
            .write_image(&scene.render(config.size), config.size, config.size, ExtendedColorType::Rgb8)
            .map_err(encode_failed)?;
        let (caption, short_caption) = (scene.dense_caption(), scene.short_caption());
        let short = config.short_every > 0 && index.is_multiple_of(config.short_every);
        let text = if short { short_caption.clone() } else { caption.clone() };
        let label = Label { caption: &caption, short_caption, truth: Truth::of(&scene) };
        let json = serde_json::to_vec(&label).map_err(|error| encode_failed(image::ImageError::IoError(error.into())))?;
        let key = format!("scene-{}-{index:09}", config.seed);
        Ok(Self { key, png, json, objects: scene.objects.len() as u64, text })
    }

    fn append(&self, archive: &mut tar::Builder<impl Write>) -> io::Result<()> {
        for (extension, data) in [("json", self.json.as_slice()), ("png", &self.png), ("txt", self.text.as_bytes())] {
            let mut header = tar::Header::new_ustar();
            header.set_path(format!("{}.{extension}", self.key))?;
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            archive.append(&header, data)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn config() -> ScenesConfig {
        ScenesConfig { count: 50, seed: 7, size: 32, per_tar: 20, ..ScenesConfig::default() }
    }

    fn digests(out: &Path) -> Vec<(String, blake3::Hash)> {
        let mut files: Vec<PathBuf> = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        files.iter().map(|path| (name(path), blake3::hash(&fs::read(path).unwrap()))).collect()
    }

    fn made(config: &ScenesConfig, threads: usize) -> Vec<(String, blake3::Hash)> {
        let out = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| write(out.path(), config, &mut |_| ())).unwrap();
        digests(out.path())
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
        let once = made(&config(), 1);
        assert_eq!(
            once.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["scenes-00000.tar", "scenes-00001.tar", "scenes-00002.tar"]
        );
        assert_eq!(once, made(&config(), 1));
        assert_eq!(once, made(&config(), 3));
        let other = made(&ScenesConfig { seed: 8, ..config() }, 2);
        assert!(once.iter().zip(&other).all(|(a, b)| a.1 != b.1));
    }

    #[test]
    fn a_tar_holds_what_the_scene_is() {
        let out = tempfile::tempdir().unwrap();
        let mut told = Vec::new();
        let report = write(out.path(), &config(), &mut |done| told.push(done)).unwrap();
        assert_eq!((report.scenes, report.tars, told.last()), (50, 3, Some(&50)));
        assert_eq!(
            report.bytes,
            digests(out.path()).iter().map(|(name, _)| fs::metadata(out.path().join(name)).unwrap().len()).sum::<u64>()
        );
        let mut archive = tar::Archive::new(File::open(out.path().join("scenes-00001.tar")).unwrap());
        let mut members = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.mtime().unwrap(), header.uid().unwrap(), header.gid().unwrap(), header.mode().unwrap()), (0, 0, 0, 0o644));
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            (entry.path().unwrap().display().to_string(), data)
        });
        for index in 20..40 {
            let scene = super::super::scene(7, index);
            let [json, png, txt] = std::array::from_fn(|_| members.next().unwrap());
            let key = format!("scene-7-{index:09}");
            assert_eq!([&json.0, &png.0, &txt.0], [&format!("{key}.json"), &format!("{key}.png"), &format!("{key}.txt")]);
            let label: serde_json::Value = serde_json::from_slice(&json.1).unwrap();
            assert_eq!((label["caption"].as_str(), &label["truth"]), (Some(scene.dense_caption().as_str()), &scene.truth()));
            assert_eq!(label["short_caption"], scene.short_caption());
            assert_eq!(txt.1, scene.dense_caption().into_bytes());
            let picture = image::load_from_memory(&png.1).unwrap().into_rgb8();
            assert_eq!((picture.dimensions(), picture.into_raw()), ((32, 32), scene.render(32)));
        }
        assert!(members.next().is_none());
    }

    #[test]
    fn the_number_of_objects_is_kept() {
        let out = tempfile::tempdir().unwrap();
        let report = write(out.path(), &ScenesConfig { objects: 3..=3, ..config() }, &mut |_| ()).unwrap();
        assert_eq!(report.objects, 150);
    }

    #[test]
    fn some_scenes_may_have_short_captions() {
        let out = tempfile::tempdir().unwrap();
        write(out.path(), &ScenesConfig { short_every: 5, count: 10, ..config() }, &mut |_| ()).unwrap();
        let mut archive = tar::Archive::new(File::open(out.path().join("scenes-00000.tar")).unwrap());
        let mut texts = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            if entry.path().unwrap().extension().is_some_and(|extension| extension == "txt") {
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                texts.push(text);
            }
        }
        let scene = |index| super::super::scene(7, index);
        let expected = (0..10).map(|index| if index % 5 == 0 { scene(index).short_caption() } else { scene(index).dense_caption() });
        assert_eq!(texts, expected.collect::<Vec<_>>());
    }

    #[test]
    fn settings_out_of_range_are_refused_before_anything_is_made() {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join("new");
        let refused = |config: ScenesConfig| match write(&folder, &config, &mut |_| ()).unwrap_err() {
            ScenesError::Setting { field, .. } => field,
            other => panic!("{other}"),
        };
        assert_eq!(refused(ScenesConfig { count: 0, ..config() }), "count");
        assert_eq!(refused(ScenesConfig { per_tar: 0, ..config() }), "per_tar");
        assert_eq!(refused(ScenesConfig { size: 15, ..config() }), "size");
        assert_eq!(refused(ScenesConfig { size: 5000, ..config() }), "size");
        assert_eq!(refused(ScenesConfig { objects: 0..=6, ..config() }), "objects");
        assert_eq!(refused(ScenesConfig { objects: 1..=7, ..config() }), "objects");
        assert_eq!(refused(ScenesConfig { world: World::Mini, objects: 1..=5, ..config() }), "objects");
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let reversed = 4..=2;
        assert_eq!(refused(ScenesConfig { objects: reversed, ..config() }), "objects");
        assert!(!folder.exists());
    }

    #[test]
    fn scenes_do_not_join_a_prepared_data_set() {
        for file in ["plan.json", "manifest.json"] {
            let out = tempfile::tempdir().unwrap();
            fs::write(out.path().join(file), "").unwrap();
            let error = write(out.path(), &config(), &mut |_| ()).unwrap_err();
            assert!(matches!(&error, ScenesError::Taken { file: found, .. } if *found == file), "{error}");
            let suite = crate::scenes::Suite::new(World::Mini, 9, 3, 1..=4);
            assert!(matches!(suite.write(out.path()), Err(ScenesError::Taken { .. })));
            assert_eq!(digests(out.path()).len(), 1);
        }
    }

    #[test]
    fn a_smaller_set_does_not_join_a_larger_one() {
        let out = tempfile::tempdir().unwrap();
        write(out.path(), &config(), &mut |_| ()).unwrap();
        let before = digests(out.path());
        let error = write(out.path(), &ScenesConfig { count: 40, ..config() }, &mut |_| ()).unwrap_err();
        assert!(matches!(&error, ScenesError::Stale { path, files } if files == "2 tars" && path.ends_with("scenes-00002.tar")), "{error}");
        assert_eq!(before, digests(out.path()));
        // The same set again: the same names, the same bytes.
        write(out.path(), &config(), &mut |_| ()).unwrap();
        assert_eq!(before, digests(out.path()));
    }

    #[test]
    fn what_the_system_refuses_names_the_file_and_leaves_no_part() {
        let out = tempfile::tempdir().unwrap();
        let file = out.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write(&file.join("below"), &config(), &mut |_| ()).unwrap_err();
        assert!(matches!(&error, ScenesError::Io { path, .. } if path.starts_with(&file)), "{error}");
        // A folder in the place of the second tar: the first is whole, no part is left.
        fs::create_dir(out.path().join("scenes-00001.tar")).unwrap();
        let error = write(out.path(), &config(), &mut |_| ()).unwrap_err();
        assert!(matches!(&error, ScenesError::Io { path, .. } if path.ends_with("scenes-00001.tar")), "{error}");
        assert!(out.path().join("scenes-00000.tar").is_file());
        assert!(fs::read_dir(out.path()).unwrap().all(|entry| !entry.unwrap().path().to_string_lossy().ends_with(".partial")));
    }
}
