//! Pictures of one size on one sheet, side by side without overlap.

use ella_worker::draw::Picture;

use super::label::Pen;

/// Lines of a prompt under its pictures.
const PROMPT_LINES: usize = 2;

/// About as many columns as rows, wider rather than taller.
pub(super) fn grid(pictures: &[Picture]) -> Picture {
    let count = pictures.len().max(1) as u32;
    let columns = (1..).find(|n| n * n >= count).unwrap_or(count);
    let (width, height) = cell(pictures);
    let gap = if count == 1 { 0 } else { gap(width) };
    let mut sheet = Picture::white(columns * (width + gap) - gap, count.div_ceil(columns) * (height + gap) - gap);
    for (index, picture) in (0..).zip(pictures) {
        sheet.paste(picture, (index % columns * (width + gap), index / columns * (height + gap)));
    }
    sheet
}

/// A row for each prompt, with a picture in each column, and under them the prompt. The columns have names.
pub(super) fn comparison(columns: &[(&str, &[Picture])], prompts: &[&str]) -> Picture {
    let (width, height) = columns.first().map_or((1, 1), |(_, pictures)| cell(pictures));
    let (pen, gap) = (Pen::for_width(width), gap(width));
    let inner = columns.len() as u32 * (width + gap) - gap;
    let captions: Vec<Vec<String>> = prompts.iter().map(|prompt| pen.wrap(prompt, inner, PROMPT_LINES)).collect();
    let under: u32 = captions.iter().map(|lines| lines.len() as u32 * pen.line() + 2 * gap).sum();
    let mut sheet = Picture::white(inner + 2 * gap, gap + pen.line() + under + prompts.len() as u32 * height);
    let left = |column: u32| gap + column * (width + gap);
    for (column, (name, _)) in (0..).zip(columns) {
        let middle = width.saturating_sub(pen.width(name)) / 2;
        pen.write(&mut sheet, (left(column) + middle, gap / 2), name);
    }
    let mut y = gap + pen.line();
    for (row, lines) in captions.iter().enumerate() {
        for (column, (_, pictures)) in (0..).zip(columns) {
            if let Some(picture) = pictures.get(row) {
                sheet.paste(picture, (left(column), y));
            }
        }
        y += height + gap / 2;
        for line in lines {
            pen.write(&mut sheet, (gap, y), line);
            y += pen.line();
        }
        y += gap + gap.div_ceil(2);
    }
    sheet
}

fn cell(pictures: &[Picture]) -> (u32, u32) {
    pictures.first().map_or((1, 1), |picture| (picture.width, picture.height))
}

fn gap(width: u32) -> u32 {
    (width / 32).max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: u8) -> Picture {
        Picture { width: 4, height: 3, rgb: vec![value; 36] }
    }

    fn area(sheet: &Picture, value: u8) -> usize {
        sheet.rgb.iter().filter(|byte| **byte == value).count()
    }

    #[test]
    fn pictures_lie_apart_and_are_whole() {
        for count in 1..12u8 {
            let pictures: Vec<_> = (0..count).map(plain).collect();
            let sheet = grid(&pictures);
            assert_eq!(sheet.rgb.len() as u32, 3 * sheet.width * sheet.height);
            assert!((0..count).all(|value| area(&sheet, value) == 36), "{count}");
        }
        assert_eq!(grid(&[plain(9)]), plain(9));
    }

    #[test]
    fn a_comparison_has_both_columns_their_names_and_the_prompts() {
        let (a, b) = ([plain(1), plain(2), plain(3)], [plain(4), plain(5), plain(6)]);
        let columns: [(&str, &[Picture]); 2] = [("CLIP", &a), ("ELLA", &b)];
        let sheet = comparison(&columns, &["a", "", "a long one that does not fit here at all"]);
        assert!((1..=6).all(|value| area(&sheet, value) == 36));
        assert!(area(&sheet, 40) > 100);
        let other = comparison(&columns, &["b", "", "a long one that does not fit here at all"]);
        assert_ne!(sheet, other);
        // Left of each pair is the first column's.
        let at = |value: u8| sheet.rgb.iter().position(|&byte| byte == value).unwrap();
        assert!(at(1) < at(4) && at(4) < at(2) && at(2) < at(5));
    }
}
