//! `ella dpg questions`: what is to be asked, of which part of which picture.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use ella_dataset::decode_rgb;
use serde::Serialize;
use serde_json::json;

use super::set::{Question, Set};
use super::{Asked, Note, bad};
use crate::ui::{DONE, Fail, Meter, Out, count};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Questions {
    #[command(flatten)]
    asked: Asked,
    /// A folder with a picture for each item_id, named by it: what stands before the first dot counts. Each is two rows of two tiles
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The file that is written: JSON lines of image, box (left, top, right, bottom; in pixels), item_id, tile, proposition_id and question
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The side of one tile, in pixels; left out: half of the pictures' side
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    resolution: Option<u32>,
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Ask<'a> {
    image: &'a Path,
    r#box: [u32; 4],
    item_id: &'a str,
    tile: u8,
    proposition_id: i64,
    question: &'a str,
}

/// What a folder has.
#[derive(Debug, Default)]
struct Folder {
    /// Files by what stands before their first dot.
    files: BTreeMap<String, PathBuf>,
    /// Names that belong to no item.
    others: Vec<String>,
}

impl Questions {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let set = Set::read(&self.asked.csv)?;
        let mut folder = Folder::read(&self.images, &set)?;
        let (mut missing, mut unreadable) = (Vec::new(), Vec::new());
        let mut side = self.resolution.map(|side| (side, None));
        let mut partial = whole::partial(&self.out)?;
        let mut list = BufWriter::new(partial.as_file_mut());
        let mut meter = Meter::new("pictures", set.items.len() as u64);
        let (mut pictures, mut asked) = (0, 0);
        for (at, (item, questions)) in set.items.iter().zip(set.by_item()).enumerate() {
            meter.at(at as u64, item);
            let Some(image) = folder.files.remove(item) else {
                missing.push(item.as_str());
                continue;
            };
            let size = match size(&image)? {
                Ok(size) => size,
                Err(why) => {
                    unreadable.push(format!("{item}: {why}"));
                    continue;
                }
            };
            let resolution = self.fits(&image, size, &mut side)?;
            for line in asks(&image, item, &questions, resolution, self.asked.pic_num) {
                let line =
                    serde_json::to_string(&line).map_err(|error| bad(format_args!("{}: cannot be told of ({error})", image.display())))?;
                writeln!(list, "{line}").map_err(|error| Fail::io(&self.out, "written", &error))?;
                asked += 1;
            }
            pictures += 1;
        }
        drop(meter);
        if pictures == 0 {
            let hint = format!("a picture must be named by its item_id, such as {}.png", set.items.first().map_or("", String::as_str));
            return Err(bad(format_args!("{}: has no readable picture of any item of {}; {hint}", self.images.display(), set.file)));
        }
        list.flush().map_err(|error| Fail::io(&self.out, "written", &error))?;
        drop(list);
        whole::appear(partial, &self.out)?;
        let mut notes = set.notes();
        notes.extend(
            [
                Note::of("missing", &missing, "prompts without a picture", "not in the list"),
                Note::of("unreadable", &unreadable, "pictures that cannot be read", "not in the list"),
                Note::of("other_file", &folder.others, "names in the folder that belong to no item", "not in the list"),
            ]
            .into_iter()
            .flatten(),
        );
        let resolution = side.map(|(side, _)| side);
        let made = json!({
            "out": self.out, "questions": asked, "pictures": pictures, "tiles": self.asked.pic_num, "resolution": resolution,
            "missing": missing, "unreadable": unreadable, "notes": notes,
        });
        out.result(&made, || {
            let told: String = notes.iter().map(|note| format!("{}\n", note.text)).collect();
            format!("{} about {} in {}\n{told}", count(asked, "question"), count(pictures, "picture"), self.out.display())
        });
        Ok(DONE)
    }

    /// The side of a tile, which is the same for all pictures, as it is for the official script.
    fn fits(&self, image: &Path, (width, height): (u32, u32), side: &mut Option<(u32, Option<PathBuf>)>) -> Result<u32, Fail> {
        let image = image.to_owned();
        let shape = format!("{} is {width}×{height}", image.display());
        if width != height || width % 2 != 0 {
            return Err(bad(format_args!("{shape}: must be square, two rows of two square tiles of a whole number of pixels")));
        }
        let (expected, first) = side.get_or_insert_with(|| (width / 2, Some(image)));
        // Of one tile only, a picture may be that tile.
        if width == 2 * *expected || (self.asked.pic_num == 1 && width == *expected) {
            return Ok(*expected);
        }
        let whole = 2 * *expected;
        Err(match first {
            Some(first) => bad(format_args!("{shape}, and {} is {whole}×{whole}: all must be of one size", first.display())),
            None => Fail::usage(format_args!(
                "--resolution {expected}: is the side of one tile, so that pictures must be {whole}×{whole}, but {shape}; leave it out, or give {}",
                width / 2
            )),
        })
    }
}

impl Folder {
    fn read(path: &Path, set: &Set) -> Result<Self, Fail> {
        let items: HashSet<&str> = set.items.iter().map(String::as_str).collect();
        let mut folder = Self::default();
        let failed = |error: &std::io::Error| Fail::io(path, "read", error);
        let entries = fs::read_dir(path).map_err(|error| failed(&error))?;
        let mut names =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<Vec<_>, _>>().map_err(|error| failed(&error))?;
        names.sort_unstable();
        for name in names {
            let file = path.join(&name);
            let name = name.to_string_lossy().into_owned();
            let key = name.split('.').next().unwrap_or_default();
            if !items.contains(key) || !file.is_file() {
                folder.others.push(name);
            } else if let Some(before) = folder.files.insert(key.to_owned(), file) {
                let rule = "each item must have one picture (the official script would count both)";
                return Err(bad(format_args!("{}: has two of {key:?}, {} and {name}: {rule}", path.display(), before.display())));
            }
        }
        Ok(folder)
    }
}

/// A picture's width and height, or why it cannot be decoded.
fn size(path: &Path) -> Result<Result<(u32, u32), String>, Fail> {
    let bytes = fs::read(path).map_err(|error| Fail::io(path, "read", &error))?;
    Ok(decode_rgb(&bytes).map(|(_, width, height)| (width, height)).map_err(|refusal| refusal.to_string()))
}

/// The questions of an item, tile by tile: upper left, upper right, lower left, lower right.
fn asks<'a>(image: &'a Path, item: &'a str, questions: &'a [&'a Question], side: u32, tiles: u8) -> impl Iterator<Item = Ask<'a>> {
    (0..tiles).flat_map(move |tile| {
        let (left, top) = (u32::from(tile % 2) * side, u32::from(tile / 2) * side);
        let of = move |question: &&'a Question| Ask {
            image,
            r#box: [left, top, left + side, top + side],
            item_id: item,
            tile,
            proposition_id: question.id,
            question: &question.text,
        };
        questions.iter().map(of)
    })
}

#[cfg(test)]
mod tests {
    use super::super::set::tests::set;
    use super::*;

    #[test]
    fn tiles_are_in_the_official_order() {
        let set = set(&[("a", 1, "0", "t"), ("a", 2, "0", "t")]);
        let questions = set.by_item();
        let found: Vec<_> =
            asks(Path::new("a.png"), "a", &questions[0], 8, 4).map(|ask| (ask.tile, ask.proposition_id, ask.r#box)).collect();
        assert_eq!(found.len(), 8);
        assert_eq!(found[1], (0, 2, [0, 0, 8, 8]));
        assert_eq!(found[2], (1, 1, [8, 0, 16, 8]));
        assert_eq!(found[4], (2, 1, [0, 8, 8, 16]));
        assert_eq!(found[6], (3, 1, [8, 8, 16, 16]));
    }
}
