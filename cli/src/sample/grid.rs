//! Pictures, side by side without overlap.

use std::path::Path;

use image::ExtendedColorType;

use crate::ui::Fail;

/// 8-bit RGB, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picture {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) rgb: Vec<u8>,
}

/// Where each of some pictures of one size lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    columns: u32,
    rows: u32,
    cell: (u32, u32),
    gap: u32,
}

impl Picture {
    /// Writes a PNG.
    pub(super) fn save(&self, file: &Path) -> Result<(), Fail> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        image::ImageEncoder::write_image(encoder, &self.rgb, self.width, self.height, ExtendedColorType::Rgb8)
            .map_err(|error| Fail::failed(format_args!("{}: cannot be encoded ({error})", file.display())))?;
        std::fs::write(file, bytes).map_err(|error| Fail::io(file, "written", &error))
    }
}

impl Grid {
    /// About as many columns as rows, wider rather than taller.
    pub(super) fn of(pictures: &[Picture]) -> Self {
        let count = pictures.len().max(1) as u32;
        let columns = (1..).find(|n| n * n >= count).unwrap_or(count);
        let cell = pictures.first().map_or((1, 1), |picture| (picture.width, picture.height));
        let gap = if count == 1 { 0 } else { (cell.0 / 32).max(2) };
        Self { columns, rows: count.div_ceil(columns), cell, gap }
    }

    /// The left top corner of a picture.
    fn place(&self, index: usize) -> (u32, u32) {
        let (column, row) = (index as u32 % self.columns, index as u32 / self.columns);
        (column * (self.cell.0 + self.gap), row * (self.cell.1 + self.gap))
    }

    /// All pictures on one, white between them.
    pub(super) fn compose(&self, pictures: &[Picture]) -> Picture {
        let width = self.columns * (self.cell.0 + self.gap) - self.gap;
        let height = self.rows * (self.cell.1 + self.gap) - self.gap;
        let mut rgb = vec![255; 3 * width as usize * height as usize];
        for (index, picture) in pictures.iter().enumerate() {
            let (x, y) = self.place(index);
            for (row, line) in picture.rgb.chunks_exact(3 * picture.width as usize).enumerate() {
                let start = 3 * ((y as usize + row) * width as usize + x as usize);
                rgb[start..start + line.len()].copy_from_slice(line);
            }
        }
        Picture { width, height, rgb }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: u8) -> Picture {
        Picture { width: 4, height: 3, rgb: vec![value; 36] }
    }

    #[test]
    fn pictures_lie_apart_and_are_whole() {
        for count in 1..12u8 {
            let pictures: Vec<_> = (0..count).map(plain).collect();
            let grid = Grid::of(&pictures).compose(&pictures);
            assert_eq!(grid.rgb.len() as u32, 3 * grid.width * grid.height);
            for value in 0..count {
                assert_eq!(grid.rgb.iter().filter(|byte| **byte == value).count(), 36, "picture {value} of {count}");
            }
        }
    }

    #[test]
    fn one_picture_is_the_grid() {
        assert_eq!(Grid::of(&[plain(9)]).compose(&[plain(9)]), plain(9));
    }

    #[test]
    fn a_picture_reads_back_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.png");
        plain(200).save(&file).unwrap();
        let read = image::open(&file).unwrap().into_rgb8();
        assert_eq!((read.width(), read.height(), read.into_raw()), (4, 3, plain(200).rgb));
        assert!(plain(1).save(&dir.path().join("no/x.png")).unwrap_err().message.contains("no/x.png"));
    }
}
