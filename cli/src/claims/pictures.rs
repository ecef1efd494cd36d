//! Pictures that were drawn, as the report needs them.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use base64::Engine;
use ella_dataset::scenes::{Backdrop, Scene, World};
use image::{ImageFormat, RgbImage};

use crate::ui::Fail;

/// The background that the miniature's LoRA draws.
const MINT: Backdrop = Backdrop::Mint;

/// So many pixels of a side are looked at, of 64.
const BAND: u32 = 3;

/// The share of a folder's pictures that are nearer to mint than to any other background of its world, along all four sides.
pub(super) fn on_mint(folder: &Path) -> Result<f64, Fail> {
    let failed = |error: std::io::Error| Fail::io(folder, "read", &error);
    let (mut with, mut all) = (0u32, 0u32);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "png") {
            for tile in tiles(&path)? {
                with += u32::from(is_on_mint(&tile));
                all += 1;
            }
        }
    }
    Ok(f64::from(with) / f64::from(all.max(1)))
}

fn is_on_mint(picture: &RgbImage) -> bool {
    let (width, height) = picture.dimensions();
    let band = (BAND * width / 64).max(1);
    let sides = [(0, 0, width, band), (0, height - band, width, band), (0, 0, band, height), (width - band, 0, band, height)];
    let mint = |mean: [f64; 3]| {
        let far = |backdrop: &Backdrop| backdrop.rgb().iter().zip(mean).map(|(own, seen)| (f64::from(*own) - seen).powi(2)).sum::<f64>();
        World::Mini.backdrops().iter().min_by(|a, b| far(a).total_cmp(&far(b))) == Some(&MINT)
    };
    sides.into_iter().all(|(left, top, width, height)| {
        let mut sums = [0.0; 3];
        for (x, y) in (left..left + width).flat_map(|x| (top..top + height).map(move |y| (x, y))) {
            sums.iter_mut().zip(picture.get_pixel(x, y).0).for_each(|(sum, value)| *sum += f64::from(value));
        }
        let pixels = f64::from(width * height);
        mint(sums.map(|sum| sum / pixels))
    })
}

/// The four pictures of a grid.
fn tiles(path: &Path) -> Result<[RgbImage; 4], Fail> {
    let bytes = fs::read(path).map_err(|error| Fail::io(path, "read", &error))?;
    let whole = image::load_from_memory(&bytes).map_err(|error| Fail::failed(format_args!("{}: {error}", path.display())))?.into_rgb8();
    let (width, height) = (whole.width() / 2, whole.height() / 2);
    let tile = |column: u32, row: u32| image::imageops::crop_imm(&whole, column * width, row * height, width, height).to_image();
    Ok([tile(0, 0), tile(1, 0), tile(0, 1), tile(1, 1)])
}

/// A grid's first picture, as base64 of a PNG.
pub(super) fn first(path: &Path) -> Result<String, Fail> {
    let [tile, ..] = tiles(path)?;
    png(&tile)
}

/// What a scene looks like, as base64 of a PNG.
pub(super) fn rendered(scene: &Scene) -> Result<String, Fail> {
    const SIDE: u32 = 64;
    let picture = RgbImage::from_raw(SIDE, SIDE, scene.render(SIDE)).unwrap_or_default();
    png(&picture)
}

fn png(picture: &RgbImage) -> Result<String, Fail> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(|error| Fail::failed(format_args!("a picture cannot be encoded ({error})")))?;
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mint_is_on_all_four_sides() {
        let mint = MINT.rgb();
        let mut picture = RgbImage::from_pixel(64, 64, image::Rgb([186, 220, 248]));
        assert!(!is_on_mint(&picture));
        for at in 0..64 {
            for depth in 0..4 {
                for (x, y) in [(at, depth), (at, 63 - depth), (depth, at), (63 - depth, at)] {
                    picture.put_pixel(x, y, image::Rgb(mint));
                }
            }
        }
        assert!(is_on_mint(&picture));
        for (x, y) in (0..64).flat_map(|x| (60..64).map(move |y| (x, y))) {
            picture.put_pixel(x, y, image::Rgb([186, 220, 248]));
        }
        assert!(!is_on_mint(&picture));
    }
}
