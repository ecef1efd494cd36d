//! Pictures of every format: colours, orientations, animations, and that broken ones are refused.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::io::Cursor;

use common::{RULES, cut_one, jpeg, jpeg_of, mean_difference, photo, png, png_alpha, png_of, rgb, webp};
use ella_dataset::{Crop, Encoding, PictureRules, Refusal, Scratch, cut, decode_rgb, encode};
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat, RgbImage};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn truncated_pictures_are_always_refused(seed in 0u32..1000, at in 0.0f64..1.0, kind in 0..6usize) {
        let lossy = encode(&rgb(64, 64, seed), (64, 64), Encoding::Webp { quality: 80 }, &mut Scratch::default()).unwrap();
        let bytes = [jpeg(64, seed), progressive(&rgb(64, 64, seed)), png(64, 64, seed), webp(64, 64, seed), lossy, gif(1)][kind].clone();
        let short = &bytes[..((bytes.len() - 1) as f64 * at) as usize];
        prop_assert_eq!(cut_one(short, &RULES), Err(Refusal::ImageUndecodable));
    }
}

/// Small numbers, equally distributed enough, that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 33) as usize) % most
    }
}

#[test]
fn broken_pictures_are_refused_or_cut_but_never_crash() {
    let picture = photo(48, 40, 1);
    let lossy = encode(&picture, (48, 40), Encoding::Webp { quality: 80 }, &mut Scratch::default()).unwrap();
    let sound = [jpeg_of(&picture, 90), progressive(&picture), png_of(&picture), webp(48, 40, 1), lossy, gif(1), cmyk(0), turned_jpeg(6)];
    let mut dice = Dice(7);
    let mut taken = 0;
    for round in 0..6000 {
        let mut bytes = sound[round % sound.len()].clone();
        for _ in 0..=dice.below(3) {
            let at = dice.below(bytes.len());
            match dice.below(4) {
                0 => bytes[at] = dice.below(256) as u8,
                1 => bytes[at] ^= 1 << dice.below(8),
                2 => drop(bytes.drain(at..(at + dice.below(20)).min(bytes.len()))),
                _ => bytes.insert(at, [0, 0xff, 0xd8][dice.below(3)]),
            }
            if bytes.is_empty() {
                break;
            }
        }
        let rules = PictureRules { phash: round % 3 == 0, crop: Crop::Random { seed: 1 }, ..RULES };
        match cut_one(&bytes, &rules) {
            Ok(picture) => {
                assert_eq!(picture.rgb.len(), 32 * 32 * 3, "round {round}");
                taken += 1;
            }
            Err(why) => {
                assert!(matches!(why, Refusal::ImageUndecodable | Refusal::ImageTooLarge | Refusal::ImageAnimated), "round {round}: {why}")
            }
        }
    }
    assert!((300..5700).contains(&taken), "{taken} of 6000 were taken: the pictures are hardly broken, or hardly read");
}

#[test]
fn nothing_and_what_is_no_picture_is_refused() {
    let no_pictures: [&[u8]; 8] =
        [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBP", b"GIF89a", b"<html>not found</html>"];
    for bytes in no_pictures {
        assert_eq!(cut_one(bytes, &RULES), Err(Refusal::ImageUndecodable), "{bytes:?}");
    }
    // A JPEG of tables only takes nothing from the picture before it.
    let jpeg = jpeg(40, 1);
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    let tables = [&jpeg[..frame], &[0xff, 0xd9]].concat();
    let mut scratch = Scratch::default();
    cut(&jpeg, "", &RULES, &mut scratch).unwrap();
    assert_eq!(cut(&tables, "", &RULES, &mut scratch), Err(Refusal::ImageUndecodable));
}

#[test]
fn pixels_are_bounded_before_they_are_decoded() {
    let rules = PictureRules { max_pixels: 40 * 40 - 1, ..RULES };
    for bytes in [jpeg(40, 1), png(40, 40, 1), webp(40, 40, 1), gif(1)] {
        assert_eq!(cut_one(&bytes, &rules), Err(Refusal::ImageTooLarge));
        assert!(cut_one(&bytes, &PictureRules { max_pixels: 40 * 40, ..RULES }).is_ok());
        assert_eq!(cut_one(&bytes, &PictureRules { min_edge: 41, ..RULES }), Err(Refusal::MinEdge));
    }
}

/// A JPEG whose header claims another size.
fn claiming(mut jpeg: Vec<u8>, width: u16, height: u16) -> Vec<u8> {
    let frame = jpeg.windows(2).position(|pair| matches!(pair, [0xff, 0xc0 | 0xc2])).unwrap();
    jpeg[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    jpeg[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    jpeg
}

#[test]
fn what_would_need_more_memory_than_there_is_is_refused_before_it_is_decoded() {
    let rules = PictureRules { max_pixels: u64::MAX, ..RULES };
    let picture = rgb(64, 64, 1);
    // 36 million pixels: sequential, a few rows are held at a time (and the data is found missing); progressive, all coefficients.
    assert_eq!(cut_one(&claiming(jpeg_of(&picture, 90), 6000, 6000), &rules), Err(Refusal::ImageUndecodable));
    assert_eq!(cut_one(&claiming(progressive(&picture), 6000, 6000), &rules), Err(Refusal::ImageTooLarge));
    assert_eq!(cut_one(&claiming(jpeg_of(&picture, 90), 65_500, 2000), &rules), Err(Refusal::ImageUndecodable));
    // Interlaced PNGs are held whole, others row by row; a screen of 2³² pixels is no GIF that anybody made.
    let mut wide = interlaced(&picture);
    wide[16..24].copy_from_slice(&[0, 0, 0x1f, 0xff, 0, 0, 0x7f, 0xff]);
    fix_header_checksum(&mut wide);
    assert_eq!(cut_one(&wide, &rules), Err(Refusal::ImageTooLarge));
    let mut screen = gif(1);
    screen[6..10].copy_from_slice(&[0xff; 4]);
    assert_eq!(cut_one(&screen, &rules), Err(Refusal::ImageTooLarge));
}

fn fix_header_checksum(png: &mut [u8]) {
    let mut crc = !0u32;
    for &byte in &png[12..29] {
        crc ^= u32::from(byte);
        (0..8).for_each(|_| crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 });
    }
    png[29..33].copy_from_slice(&(!crc).to_be_bytes());
}

fn progressive(picture: &RgbImage) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut out, 90);
    encoder.set_progressive(true);
    let (width, height) = (picture.width() as u16, picture.height() as u16);
    encoder.encode(picture, width, height, jpeg_encoder::ColorType::Rgb).unwrap();
    out
}

fn interlaced(picture: &RgbImage) -> Vec<u8> {
    // The encoder of the library cannot: seven passes without filters, as the standard has them.
    let passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)];
    let mut rows = Vec::new();
    for (x, y, across, down) in passes {
        for row in (y..picture.height()).step_by(down) {
            let line: Vec<u8> = (x..picture.width()).step_by(across).flat_map(|column| picture.get_pixel(column, row).0).collect();
            if !line.is_empty() {
                rows.push(0);
                rows.extend(line);
            }
        }
    }
    // A picture of those bytes, one row long, is compressed by the library; its data is then put under a header of our own.
    let mut out = Vec::new();
    let (width, height) = picture.dimensions();
    let mut encoder = png::Encoder::new(&mut out, rows.len() as u32 - 1, 1);
    encoder.set_filter(png::Filter::NoFilter);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.write_header().unwrap().write_image_data(&rows[1..]).unwrap();
    out[16..20].copy_from_slice(&width.to_be_bytes());
    out[20..24].copy_from_slice(&height.to_be_bytes());
    out[25..29].copy_from_slice(&[2, 0, 0, 1]);
    fix_header_checksum(&mut out);
    out
}

/// A GIF of so many frames.
fn gif(frames: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut out);
    for seed in 0..frames {
        encoder.encode_frame(image::Frame::new(DynamicImage::from(rgb(40, 40, seed)).into_rgba8())).unwrap();
    }
    drop(encoder);
    out
}

#[test]
fn animated_pictures_are_refused_and_those_of_one_frame_taken() {
    assert!(cut_one(&gif(1), &RULES).is_ok());
    assert_eq!(cut_one(&gif(2), &RULES), Err(Refusal::ImageAnimated));
    let apng = |frames: u32| {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, 40, 40);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_animated(frames, 0).unwrap();
        let mut writer = encoder.write_header().unwrap();
        (0..frames).for_each(|seed| writer.write_image_data(&rgb(40, 40, seed)).unwrap());
        writer.finish().unwrap();
        out
    };
    assert!(cut_one(&apng(1), &RULES).is_ok());
    assert_eq!(cut_one(&apng(2), &RULES), Err(Refusal::ImageAnimated));
    // The extended header of WebP, with the flag of animation.
    let still = webp(40, 40, 1);
    let moving = riff(&[(b"VP8X", &[2, 0, 0, 0, 39, 0, 0, 39, 0, 0]), (b"ANIM", &[0; 6]), (b"ANMF", &[&[0; 16], &still[12..]].concat())]);
    assert_eq!(cut_one(&moving, &RULES), Err(Refusal::ImageAnimated));
}

fn riff(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = chunks
        .iter()
        .flat_map(|(name, body)| [&name[..], &(body.len() as u32).to_le_bytes(), body, &[0][..body.len() % 2]].concat())
        .collect();
    [&b"RIFF"[..], &(body.len() as u32 + 4).to_le_bytes(), b"WEBP", &body].concat()
}

/// An EXIF block that says only how the camera was held.
fn exif(orientation: u8) -> Vec<u8> {
    let head = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0";
    [&head[..], &[orientation], &[0; 6]].concat()
}

/// A JPEG of 64 × 48 pixels that was taken so.
fn turned_jpeg(orientation: u8) -> Vec<u8> {
    let plain = jpeg_of(&photo(64, 48, 1), 95);
    let block = [b"Exif\0\0", &exif(orientation)[..]].concat();
    let length = (block.len() as u16 + 2).to_be_bytes();
    [&plain[..2], &[0xff, 0xe1], &length, &block, &plain[2..]].concat()
}

fn turned_png(orientation: u8) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut out);
    encoder.set_exif_metadata(exif(orientation)).unwrap();
    encoder.write_image(&photo(64, 48, 1), 64, 48, ExtendedColorType::Rgb8).unwrap();
    out
}

/// The same with the chunk behind the picture's own, as some programs write it.
fn late_png(orientation: u8) -> Vec<u8> {
    let mut png = turned_png(orientation);
    let kind = png.windows(4).position(|bytes| bytes == b"eXIf").unwrap();
    let chunk: Vec<u8> = png.drain(kind - 4..kind + 4 + exif(orientation).len() + 4).collect();
    let end = png.len() - 12;
    png.splice(end..end, chunk);
    png
}

fn turned_webp(orientation: u8) -> Vec<u8> {
    let plain = encode(&photo(64, 48, 1), (64, 48), Encoding::Webp { quality: 90 }, &mut Scratch::default()).unwrap();
    let length = u32::from_le_bytes(*plain[16..].first_chunk().unwrap()) as usize;
    riff(&[(b"VP8X", &[8, 0, 0, 0, 63, 0, 0, 47, 0, 0]), (b"VP8 ", &plain[20..20 + length]), (b"EXIF", &exif(orientation))])
}

#[test]
fn pictures_are_turned_upright_before_they_are_measured_and_cropped() {
    let sizes = [(24, 40)];
    let rules = PictureRules { sizes: &sizes, ..RULES };
    for (make, most) in [(turned_jpeg as fn(u8) -> Vec<u8>, 1.0), (turned_png, 0.5), (late_png, 0.5), (turned_webp, 1.0)] {
        for orientation in 1..=8 {
            let turned = cut_one(&make(orientation), &rules).unwrap();
            let mut upright = DynamicImage::from(RgbImage::from_raw(64, 48, decode_rgb(&make(1)).unwrap().0).unwrap());
            upright.apply_orientation(image::metadata::Orientation::from_exif(orientation).unwrap());
            let plain = cut_one(&png_of(&upright.to_rgb8()), &rules).unwrap();
            assert_eq!((turned.original, turned.crop, turned.size), (plain.original, plain.crop, plain.size), "orientation {orientation}");
            assert_eq!(turned.original, if orientation < 5 { (64, 48) } else { (48, 64) });
            let apart = mean_difference(&turned.rgb, &plain.rgb);
            assert!(apart < most, "orientation {orientation}: {apart}");
        }
        // Nonsense turns nothing.
        assert_eq!(cut_one(&make(99), &rules), cut_one(&make(1), &rules));
    }
}

/// Solid red in CMYK inks: as Adobe's files have them, inverted (0), and as YCCK too (1); or as they are, without Adobe's marker (2).
fn cmyk(kind: u8) -> Vec<u8> {
    // The encoder inverts.
    let ink = if kind == 2 { [255, 0, 0, 255] } else { [0, 255, 255, 0] };
    let pixels: Vec<u8> = std::iter::repeat_n(ink, 40 * 40).flatten().collect();
    let colours = if kind == 1 { jpeg_encoder::ColorType::CmykAsYcck } else { jpeg_encoder::ColorType::Cmyk };
    let mut out = Vec::new();
    jpeg_encoder::Encoder::new(&mut out, 95).encode(&pixels, 40, 40, colours).unwrap();
    if kind == 2 {
        let at = out.windows(2).position(|pair| pair == [0xff, 0xee]).unwrap();
        let length = usize::from(u16::from_be_bytes([out[at + 2], out[at + 3]]));
        out.drain(at..at + 2 + length);
    }
    out
}

#[test]
fn inks_greys_depths_palettes_and_transparency_come_out_as_colours() {
    let near = |bytes: &[u8], colour: [u8; 3]| {
        let rgb = cut_one(bytes, &RULES).unwrap().rgb;
        assert!(rgb.chunks_exact(3).all(|p| p.iter().zip(colour).all(|(a, b)| a.abs_diff(b) <= 2)), "{:?}, not {colour:?}", &rgb[..3]);
    };
    for kind in 0..3 {
        near(&cmyk(kind), [255, 0, 0]);
    }
    let written = |picture: DynamicImage| {
        let mut out = Cursor::new(Vec::new());
        picture.write_to(&mut out, ImageFormat::Png).unwrap();
        out.into_inner()
    };
    near(&png_alpha(40, [10, 20, 30, 0]), [255; 3]);
    near(&png_alpha(40, [10, 20, 30, 255]), [10, 20, 30]);
    near(&png_alpha(40, [0, 100, 200, 128]), [127, 177, 227]);
    near(&written(image::GrayImage::from_pixel(40, 40, image::Luma([70])).into()), [70; 3]);
    near(&written(image::GrayAlphaImage::from_pixel(40, 40, image::LumaA([0, 51])).into()), [204; 3]);
    near(&written(image::ImageBuffer::from_pixel(40, 40, image::Rgb([257u16 * 9, 257 * 100, 65_535])).into()), [9, 100, 255]);
    near(&written(image::ImageBuffer::from_pixel(40, 40, image::Rgba([257u16 * 9, 257 * 100, 65_535, 0])).into()), [255; 3]);
    near(&written(image::ImageBuffer::from_pixel(40, 40, image::Luma([257u16 * 33])).into()), [33; 3]);
    let palette = {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, 40, 40);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(png::BitDepth::Two);
        encoder.set_palette(vec![0, 0, 0, 1, 200, 3]);
        encoder.write_header().unwrap().write_image_data(&[0b0101_0101; 400]).unwrap();
        out
    };
    near(&palette, [1, 200, 3]);
    let mut grey = Vec::new();
    jpeg_encoder::Encoder::new(&mut grey, 95).encode(&[90; 1600], 40, 40, jpeg_encoder::ColorType::Luma).unwrap();
    near(&grey, [90; 3]);
    let mut clear = Cursor::new(Vec::new());
    DynamicImage::from(image::RgbaImage::from_pixel(40, 40, image::Rgba([0, 0, 0, 0]))).write_to(&mut clear, ImageFormat::WebP).unwrap();
    near(&clear.into_inner(), [255; 3]);
}

#[test]
fn interlaced_progressive_and_oddly_sampled_pictures_are_as_the_plain_ones() {
    let picture = photo(61, 47, 5);
    let whole = |bytes: &[u8]| decode_rgb(bytes).unwrap().0;
    assert_eq!(whole(&interlaced(&picture)), picture.as_raw().as_slice());
    let (rules, plain) = (PictureRules { sizes: &[(20, 40)], ..RULES }, png_of(&picture));
    let cut = |bytes: &[u8]| cut_one(bytes, &rules).unwrap().rgb;
    assert_eq!(cut(&interlaced(&picture)), cut(&plain));
    // A progressive picture has the coefficients of the sequential one.
    let mut sequential = Vec::new();
    jpeg_encoder::Encoder::new(&mut sequential, 90).encode(&picture, 61, 47, jpeg_encoder::ColorType::Rgb).unwrap();
    assert_eq!(cut(&progressive(&picture)), cut(&sequential));
    use jpeg_encoder::SamplingFactor as S;
    for factor in [S::F_1_1, S::F_2_1, S::F_1_2, S::F_2_2, S::F_4_1, S::F_4_2, S::F_1_4, S::F_2_4] {
        let mut out = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut out, 95);
        encoder.set_sampling_factor(factor);
        encoder.encode(&picture, 61, 47, jpeg_encoder::ColorType::Rgb).unwrap();
        let decoded = RgbImage::from_raw(61, 47, whole(&out)).unwrap();
        let apart = mean_difference(&cut(&out), &cut(&png_of(&decoded)));
        assert!(apart < 0.5, "{factor:?}: {apart}");
    }
}

#[test]
fn kind_is_told_from_the_bytes() {
    // Nothing here sees a name; each comes out as itself.
    for bytes in [png(40, 40, 2), webp(40, 40, 2)] {
        assert_eq!(decode_rgb(&bytes).unwrap(), (rgb(40, 40, 2).into_raw(), 40, 40));
    }
}
