//! Pictures that a run drew as it trained, over steps: small ones, for a page.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::Cursor;

use base64::Engine;
use ella_proto::samples::{FOLDER, Image, Index, folder, step_of};
use ella_store::Store;
use image::ImageFormat;
use image::imageops::FilterType;

use super::page::{escape, scroll};
use crate::run::RunFolder;
use crate::ui::{Fail, count, note};

/// Most steps that are shown, evenly spread over those that there are.
const STEPS: usize = 8;
/// Most rows.
const ROWS: usize = 12;
/// Longest side of a small picture, in pixels.
const SIDE: u32 = 160;

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct Grid {
    /// Steps whose pictures are all there.
    total: usize,
    /// Steps of which some pictures are not there: they are being drawn, or were lost with the worker that had drawn them (KNOWN).
    partial: usize,
    /// Steps that would be shown, and whose index cannot be read.
    damaged: usize,
    columns: Vec<u64>,
    /// Prompt and seed, with the picture of each column as base64 of a PNG, where there is one.
    rows: Vec<(String, u64, Vec<Option<String>>)>,
    /// Rows beyond [`ROWS`].
    more: usize,
    /// Pictures that their index names, and that cannot be read.
    unreadable: usize,
    /// How those of the newest step were drawn.
    how: String,
}

impl Grid {
    /// Reads it from a run's folder.
    pub(super) async fn read(run: &RunFolder) -> Result<Self, Fail> {
        let steps = run.sampled_steps().await?;
        let begun = run.store.folders(FOLDER).await?;
        let partial = begun.iter().filter_map(|begun| step_of(begun)).filter(|step| !steps.contains(step)).count();
        let mut grid = Self { total: steps.len(), partial, ..Self::default() };
        let mut indices = Vec::new();
        for step in spread(&steps) {
            match run.samples(step).await {
                Ok(index) => indices.push(index),
                Err(fail) => {
                    note(&fail.message);
                    grid.damaged += 1;
                }
            }
        }
        let Some(newest) = indices.last() else { return Ok(grid) };
        // An exported connector draws others, but for `ella export --ema`.
        let by = if newest.average { "the moving average of the weights" } else { "the weights themselves" };
        grid.how = format!("{}, {}, guidance {}, by {by}", newest.sampler, count(newest.steps as usize, "step"), newest.guidance);
        grid.columns = indices.iter().map(|index| index.step).collect();
        let all = keys(&indices);
        grid.more = all.len().saturating_sub(ROWS);
        for (prompt, seed) in all.into_iter().take(ROWS) {
            let mut row = Vec::new();
            for index in &indices {
                let image = index.images.iter().find(|image| image.prompt == prompt && image.seed == seed);
                row.push(grid.small(&run.store, index.step, image).await);
            }
            grid.rows.push((prompt, seed, row));
        }
        Ok(grid)
    }

    async fn small(&mut self, store: &Store, step: u64, image: Option<&Image>) -> Option<String> {
        let key = format!("{}/{}", folder(step), image?.file);
        let small = match store.get(&key).await {
            Ok(png) => shrunk(&png),
            Err(_) => None,
        };
        self.unreadable += usize::from(small.is_none());
        small
    }

    /// As HTML; empty if there are no pictures.
    pub(super) fn html(&self) -> String {
        let table = if self.columns.is_empty() { String::new() } else { self.table() };
        let left_out = self.left_out();
        if table.is_empty() && left_out.is_empty() { table } else { format!("<h2>Samples over steps</h2>\n{table}{left_out}") }
    }

    fn table(&self) -> String {
        let shown = if self.total > self.columns.len() { format!(", of which {} are shown", self.columns.len()) } else { String::new() };
        let mut html = format!(
            "<p class=\"soft\">Drawn at {} of the training{shown}, from the same noise each time ({}).</p>\n\
             {}<table class=\"grid\"><tr>",
            count(self.total, "step"),
            escape(&self.how),
            scroll("Samples over steps")
        );
        html += &self.columns.iter().map(|step| format!("<th>{step}</th>")).collect::<String>();
        html += "</tr>\n";
        for (prompt, seed, pictures) in &self.rows {
            let columns = self.columns.len();
            let _ = write!(
                html,
                "<tr><td colspan=\"{columns}\"><span class=\"prompt\">{} <small>seed {seed}</small></span></td></tr>\n<tr>",
                escape(prompt)
            );
            for (step, png) in self.columns.iter().zip(pictures) {
                html += &png.as_ref().map_or("<td></td>".to_owned(), |png| {
                    format!("<td><img alt=\"Step {step}\" src=\"data:image/png;base64,{png}\"></td>")
                });
            }
            html += "</tr>\n";
        }
        html + "</table></div>\n"
    }

    /// What is not shown, if anything (KNOWN).
    fn left_out(&self) -> String {
        let mut html = String::new();
        for (number, thing, what) in [
            (self.more, "row", "more in the run's folder"),
            (self.partial, "step", "whose pictures are not all there"),
            (self.damaged, "step", "whose index cannot be read"),
            (self.unreadable, "picture", "that cannot be read"),
        ] {
            if number > 0 {
                let _ = writeln!(html, "<p class=\"soft\">and {} {what}</p>", count(number, thing));
            }
        }
        html
    }
}

/// At most [`STEPS`] of them, the first and the last among them.
fn spread(steps: &[u64]) -> Vec<u64> {
    let last = steps.len().saturating_sub(1);
    let places: BTreeSet<usize> = (0..STEPS).map(|at| (at * last + (STEPS - 1) / 2) / (STEPS - 1)).collect();
    places.into_iter().filter_map(|at| steps.get(at).copied()).collect()
}

/// Prompts and seeds, those of the newest step first: they may have changed when the run was resumed. Of each prompt the first seed comes
/// before the second ones.
fn keys(indices: &[Index]) -> Vec<(String, u64)> {
    let mut keys: Vec<(String, u64)> = Vec::new();
    for image in indices.iter().rev().flat_map(|index| &index.images) {
        if !keys.iter().any(|(prompt, seed)| *prompt == image.prompt && *seed == image.seed) {
            keys.push((image.prompt.clone(), image.seed));
        }
    }
    let place = |at: usize| keys[..at].iter().filter(|(prompt, _)| *prompt == keys[at].0).count();
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by_key(|at| place(*at));
    order.into_iter().map(|at| keys[at].clone()).collect()
}

/// A smaller picture, as base64 of a PNG.
fn shrunk(png: &[u8]) -> Option<String> {
    let picture = image::load_from_memory_with_format(png, ImageFormat::Png).ok()?;
    let large = picture.width().max(picture.height()) > SIDE;
    let picture = if large { picture.resize(SIDE, SIDE, FilterType::Triangle) } else { picture };
    let mut small = Cursor::new(Vec::new());
    picture.write_to(&mut small, ImageFormat::Png).ok()?;
    Some(base64::engine::general_purpose::STANDARD.encode(small.into_inner()))
}

#[cfg(test)]
mod tests {
    use ella_proto::samples::{INDEX, file};

    use super::*;

    fn index(step: u64, images: &[(&str, u64)]) -> Index {
        let image = |(number, (prompt, seed)): (usize, &(&str, u64))| Image { file: file(number), prompt: (*prompt).into(), seed: *seed };
        let images = images.iter().enumerate().map(image).collect();
        Index { step, images, sampler: "ddim".into(), steps: 20, guidance: 3.0, size: "8x8".into(), negative: None, average: true }
    }

    #[test]
    fn of_many_steps_a_few_are_shown_with_the_first_and_the_last() {
        assert_eq!((spread(&[]), spread(&[5]), spread(&[5, 10])), (vec![], vec![5], vec![5, 10]));
        let steps: Vec<u64> = (1..=100).collect();
        let shown = spread(&steps);
        assert_eq!((shown.len(), shown[0], shown[7]), (STEPS, 1, 100));
        assert!(shown.windows(2).all(|pair| (13..=16).contains(&(pair[1] - pair[0]))), "{shown:?}");
    }

    #[test]
    fn rows_are_the_newest_steps_prompts_first() {
        let indices = [index(5, &[("old", 0)]), index(10, &[("a", 0), ("a", 1), ("b", 0), ("b", 1)])];
        let keys = keys(&indices);
        let expected = [("a", 0), ("b", 0), ("old", 0), ("a", 1), ("b", 1)];
        assert_eq!(keys.iter().map(|(prompt, seed)| (prompt.as_str(), *seed)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn pictures_stand_by_prompt_and_step_and_what_is_missing_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let toml = "[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n";
        let config = ella_proto::config::RunConfig::parse(toml, "x", &[]).unwrap();
        let mut png = Cursor::new(Vec::new());
        image::RgbImage::from_pixel(400, 200, image::Rgb([9, 9, 9])).write_to(&mut png, ImageFormat::Png).unwrap();
        let store = Store::open(dir.path().to_str().unwrap()).unwrap();
        let run = RunFolder::new(store.clone(), config);
        let grid = crate::runtime().unwrap().block_on(async {
            for (step, images) in [(4, &[("a <b>", 0), ("b", 0)][..]), (8, &[("a <b>", 0), ("b", 0)])] {
                let folder = store.child(&folder(step));
                folder.put(INDEX, serde_json::to_vec(&index(step, images)).unwrap().into()).await.unwrap();
                folder.put("000.png", png.get_ref().clone().into()).await.unwrap();
            }
            // A step whose pictures are not all there yet has no index.
            store.child(&folder(12)).put("000.png", png.get_ref().clone().into()).await.unwrap();
            store.child(&folder(16)).put(INDEX, "{".into()).await.unwrap();
            assert_eq!(run.sampled_steps().await.unwrap(), [4, 8, 16]);
            Grid::read(&run).await.unwrap()
        });
        assert_eq!((grid.columns.clone(), grid.rows.len(), grid.unreadable), (vec![4, 8], 2, 2));
        let small = base64::engine::general_purpose::STANDARD.decode(grid.rows[0].2[1].as_ref().unwrap()).unwrap();
        let small = image::load_from_memory(&small).unwrap();
        assert_eq!((small.width(), small.height()), (SIDE, SIDE / 2));
        let html = grid.html();
        assert!(
            html.contains("at 3 steps of the training")
                && html.contains("(ddim, 20 steps, guidance 3, by the moving average of the weights)"),
            "{html}"
        );
        assert!(html.contains("a &lt;b&gt;") && html.contains(">8</th>") && html.contains("2 pictures that cannot be read"), "{html}");
        assert!(
            html.contains("and 1 step whose pictures are not all there") && html.contains("and 1 step whose index cannot be read"),
            "{html}"
        );
        assert_eq!((html.matches("<img").count(), Grid::default().html().len()), (2, 0));
        let cut = Grid { columns: vec![4, 8], more: 3, ..Grid::default() };
        assert!(cut.html().contains("and 3 rows more"), "{}", cut.html());
        let damaged = Grid { total: 1, damaged: 1, ..Grid::default() };
        assert!(damaged.html().contains("and 1 step whose index cannot be read"), "{}", damaged.html());
    }
}
