//! Pictures: geometry, bounds, and that broken ones are refused.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{jpeg, png, rgb, webp};
use ella_dataset::{Picture, PictureRules, Refusal, cut, decode_rgb, encode_jpeg};
use fast_image_resize::Resizer;
use image::{ImageEncoder, RgbImage};
use proptest::prelude::*;

const RULES: PictureRules = PictureRules { resolution: 32, min_edge: 1, max_pixels: 1 << 20 };

fn cut_one(bytes: &[u8], rules: &PictureRules) -> Result<Picture, Refusal> {
    cut(bytes, rules, &mut Resizer::new())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_size_becomes_a_centred_square(width in 1u32..200, height in 1u32..200) {
        let picture = cut_one(&png(width, height, 1), &RULES).unwrap();
        prop_assert_eq!(picture.rgb.len(), 32 * 32 * 3);
        prop_assert_eq!(picture.original, (width, height));
        let short = width.min(height);
        // The long side after resizing, rounded; what lies left and right of the crop differs by a pixel at most.
        let long = (f64::from(width.max(height)) * 32.0 / f64::from(short)).round() as u32;
        let crop = if width >= height { picture.crop } else { (picture.crop.1, picture.crop.0) };
        prop_assert_eq!(crop, ((long - 32) / 2, 0));
    }

    #[test]
    fn broken_pictures_are_refused_or_decoded_but_never_crash(at in 0.0f64..1.0, to: u8, kind in 0..3usize, cut_off: bool) {
        let mut bytes = [jpeg(40, 1), png(40, 40, 1), webp(40, 40, 1)][kind].clone();
        let at = (at * bytes.len() as f64) as usize;
        if cut_off { bytes.truncate(at) } else { bytes[at] = to }
        if let Ok(picture) = cut_one(&bytes, &RULES) {
            prop_assert!(!cut_off || at + 16 > bytes.len(), "a truncated picture was taken");
            prop_assert_eq!(picture.rgb.len(), 32 * 32 * 3);
        }
    }

    #[test]
    fn truncated_jpegs_are_always_refused(seed in 0u32..1000, at in 0.0f64..1.0) {
        let bytes = jpeg(64, seed);
        let short = &bytes[..((bytes.len() - 1) as f64 * at) as usize];
        prop_assert_eq!(cut_one(short, &RULES), Err(Refusal::ImageUndecodable));
    }
}

#[test]
fn a_picture_of_the_right_size_keeps_its_pixels() {
    let picture = cut_one(&png(32, 32, 5), &RULES).unwrap();
    assert_eq!((picture.rgb, picture.crop), (rgb(32, 32, 5).into_raw(), (0, 0)));
}

#[test]
fn pixels_are_bounded_before_they_are_decoded() {
    let rules = PictureRules { max_pixels: 40 * 40 - 1, ..RULES };
    for bytes in [jpeg(40, 1), png(40, 40, 1), webp(40, 40, 1)] {
        assert_eq!(cut_one(&bytes, &rules), Err(Refusal::ImageTooLarge));
        assert!(cut_one(&bytes, &PictureRules { max_pixels: 40 * 40, ..RULES }).is_ok());
        assert_eq!(cut_one(&bytes, &PictureRules { min_edge: 41, ..RULES }), Err(Refusal::MinEdge));
    }
    // Raised to 32 pixels, this strip would be 96,000 pixels long.
    assert_eq!(cut_one(&png(1, 3000, 1), &RULES), Err(Refusal::ImageTooLarge));
}

#[test]
fn encoded_pictures_come_back_nearly_the_same() {
    let original = rgb(64, 64, 3).into_raw();
    for (quality, most) in [(95, 3.0), (60, 9.0)] {
        let (back, width, height) = decode_rgb(&encode_jpeg(&original, 64, quality).unwrap()).unwrap();
        assert_eq!((width, height, back.len()), (64, 64, original.len()));
        let wrap = |a: u8, b: u8| f64::from(a.abs_diff(b).min(a.wrapping_sub(b)).min(b.wrapping_sub(a)));
        let error = back.iter().zip(&original).map(|(&a, &b)| wrap(a, b)).sum::<f64>() / back.len() as f64;
        assert!(error < most, "quality {quality}: {error}");
    }
    assert_eq!(encode_jpeg(&original, 70_000, 95), Err(Refusal::ImageTooLarge));
    assert_eq!(decode_rgb(b"none"), Err(Refusal::ImageUndecodable));
}

/// An EXIF block that says only how the camera was held.
fn exif(orientation: u8) -> Vec<u8> {
    let head = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0";
    [&head[..], &[orientation], &[0; 6]].concat()
}

/// A JPEG of 64 × 32 pixels that was taken so.
fn turned_jpeg(orientation: u8) -> Vec<u8> {
    let mut plain = Vec::new();
    let encoder = jpeg_encoder::Encoder::new(&mut plain, 95);
    encoder.encode(&rgb(64, 32, 1), 64, 32, jpeg_encoder::ColorType::Rgb).unwrap();
    let block = [b"Exif\0\0", &exif(orientation)[..]].concat();
    let length = (block.len() as u16 + 2).to_be_bytes();
    [&plain[..2], &[0xff, 0xe1], &length, &block, &plain[2..]].concat()
}

fn turned_png(orientation: u8) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut out);
    encoder.set_exif_metadata(exif(orientation)).unwrap();
    encoder.write_image(&rgb(64, 32, 1), 64, 32, image::ExtendedColorType::Rgb8).unwrap();
    out
}

#[test]
fn pictures_are_turned_upright_before_they_are_measured_and_cropped() {
    for make in [turned_jpeg, turned_png] {
        let plain = cut_one(&make(1), &RULES).unwrap();
        assert_eq!((plain.original, plain.crop), ((64, 32), (16, 0)));
        let turned = cut_one(&make(6), &RULES).unwrap();
        assert_eq!((turned.original, turned.crop), ((32, 64), (0, 16)));
        let square = |rgb| RgbImage::from_raw(32, 32, rgb).unwrap();
        assert_eq!(square(turned.rgb), image::imageops::rotate90(&square(plain.rgb)));
    }
    // Nonsense turns nothing.
    assert_eq!(cut_one(&turned_jpeg(99), &RULES), cut_one(&turned_jpeg(1), &RULES));
}
