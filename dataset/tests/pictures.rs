//! Pictures: geometry, buckets, crops, bounds, hashes, and what is stored of them.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{RULES, cut_one, jpeg_of, mean_difference, photo, png, png_of, rgb};
use ella_dataset::{Crop, Encoding, PictureRules, Refusal, SDXL_BUCKETS, Scratch, buckets, cut, decode_rgb, encode};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use proptest::prelude::*;

/// The slow way: the whole picture resized to cover `size`, then cropped.
fn reference(picture: &RgbImage, size: (u32, u32), crop: (u32, u32)) -> Vec<u8> {
    let (width, height) = picture.dimensions();
    let scale = f64::max(f64::from(size.0) / f64::from(width), f64::from(size.1) / f64::from(height));
    let covering = |edge: u32| (f64::from(edge) * scale).round() as u32;
    let (width, height, mut covered) = (covering(width).max(size.0), covering(height).max(size.1), Vec::new());
    covered.resize(3 * width as usize * height as usize, 0);
    let from = TypedImageRef::<U8x3>::from_buffer(picture.width(), picture.height(), picture.as_raw()).unwrap();
    let mut to = TypedImage::<U8x3>::from_buffer(width, height, &mut covered).unwrap();
    let how = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    Resizer::new().resize_typed(&from, &mut to, &how).unwrap();
    let resized = RgbImage::from_raw(width, height, covered).unwrap();
    image::imageops::crop_imm(&resized, crop.0, crop.1, size.0, size.1).to_image().into_raw()
}

/// The last column but one then needs a column more of the original than the last one does.
#[test]
fn a_window_whose_last_pixel_lies_upon_one_of_the_original_is_resized_right() {
    for (width, height, size, seed) in [(41, 41, (26, 59), 13350698210885421835), (41, 300, (60, 20), 5)] {
        let rules = PictureRules { sizes: &[size], crop: Crop::Random { seed }, ..RULES };
        let picture = cut_one(&png_of(&photo(width, height, 3)), &rules).unwrap();
        let whole = reference(&photo(width, height, 3), size, picture.crop);
        let most = picture.rgb.iter().zip(&whole).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(most <= Some(1), "{most:?} at {:?}", picture.crop);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_size_becomes_a_centred_square(width in 1u32..200, height in 1u32..200) {
        let picture = cut_one(&png(width, height, 1), &RULES).unwrap();
        prop_assert_eq!(picture.rgb.len(), 32 * 32 * 3);
        prop_assert_eq!((picture.original, picture.size), ((width, height), (32, 32)));
        let short = width.min(height);
        // The long side after resizing, rounded; what lies left and right of the crop differs by a pixel at most.
        let long = (f64::from(width.max(height)) * 32.0 / f64::from(short)).round() as u32;
        let crop = if width >= height { picture.crop } else { (picture.crop.1, picture.crop.0) };
        prop_assert_eq!(crop, ((long - 32) / 2, 0));
    }

    #[test]
    fn a_part_decoded_alone_is_what_it_is_in_the_whole_picture(
        width in 40u32..400, height in 40u32..400, size in (8u32..64, 8u32..64), seed: u64, format in 0..2usize,
    ) {
        let bytes = if format == 0 { jpeg_of(&photo(width, height, 3), 90) } else { png_of(&photo(width, height, 3)) };
        let rules = PictureRules { sizes: &[size], crop: Crop::Random { seed }, ..RULES };
        let picture = cut_one(&bytes, &rules).unwrap();
        let (whole, ..) = decode_rgb(&bytes).unwrap();
        let whole = reference(&RgbImage::from_raw(width, height, whole).unwrap(), size, picture.crop);
        // A JPEG is shrunk while it is decoded where that leaves twice the pixels that are needed; the others differ by rounding.
        let shrunk = format == 0 && width >= 4 * size.0 && height >= 4 * size.1;
        let (apart, most) = (mean_difference(&picture.rgb, &whole), if shrunk { 1.5 } else { 0.05 });
        prop_assert!(apart <= most, "{apart}");
    }

    #[test]
    fn buckets_are_multiples_within_their_area_and_every_picture_gets_the_nearest(
        step in 8u32..80, steps in 2u32..20, most in 1.0f64..4.0, width in 1u32..3000, height in 1u32..3000,
    ) {
        let resolution = step * steps;
        let sizes = buckets(resolution, step, most);
        for &(w, h) in &sizes {
            prop_assert!(w % step == 0 && h % step == 0 && w * h <= resolution * resolution && w > 0 && h > 0);
            prop_assert!(f64::from(w.max(h)) <= most * f64::from(w.min(h)));
            prop_assert!(sizes.contains(&(h, w)));
        }
        prop_assert!(sizes.contains(&(resolution, resolution)) && sizes.is_sorted());
        let far = |size: (u32, u32)| (f64::from(size.0) / f64::from(size.1) * f64::from(height) / f64::from(width)).ln().abs();
        let rules = PictureRules { sizes: &sizes, max_pixels: 1 << 24, ..RULES };
        let chosen = sizes.iter().copied().min_by(|&a, &b| far(a).total_cmp(&far(b))).unwrap();
        if width * height < 40_000 {
            let picture = cut_one(&png(width, height, 1), &rules).unwrap();
            prop_assert!((far(picture.size) - far(chosen)).abs() < 1e-9);
        }
    }

    #[test]
    fn a_random_crop_depends_on_seed_and_key_alone(width in 33u32..120, height in 33u32..120, seed: u64, key: String) {
        let rules = PictureRules { crop: Crop::Random { seed }, ..RULES };
        let bytes = png(width, height, 1);
        let one = cut(&bytes, &key, &rules, &mut Scratch::default()).unwrap();
        prop_assert_eq!(&one, &Scratch::of_thread(|scratch| cut(&bytes, &key, &rules, scratch)).unwrap());
        prop_assert!(one.crop.0 == 0 || one.crop.1 == 0);
    }
}

#[test]
fn random_crops_lie_everywhere() {
    let bytes = png(64, 32, 1);
    let rules = PictureRules { crop: Crop::Random { seed: 7 }, ..RULES };
    let at = |key: u32| cut(&bytes, &key.to_string(), &rules, &mut Scratch::default()).unwrap().crop.0;
    let seen: std::collections::BTreeSet<_> = (0..400).map(at).collect();
    assert!(seen.len() >= 31 && seen.first() == Some(&0) && seen.last() == Some(&32), "{seen:?}");
}

#[test]
fn a_picture_of_the_right_size_keeps_its_pixels() {
    let picture = cut_one(&png(32, 32, 5), &RULES).unwrap();
    assert_eq!((picture.rgb, picture.crop), (rgb(32, 32, 5).into_raw(), (0, 0)));
    // So does one that is only cropped, and one that may keep its size.
    let picture = cut_one(&png(50, 32, 5), &RULES).unwrap();
    assert_eq!(picture.rgb, image::imageops::crop_imm(&rgb(50, 32, 5), 9, 0, 32, 32).to_image().into_raw());
    let picture = cut_one(&png(50, 32, 5), &PictureRules { sizes: &[], ..RULES }).unwrap();
    assert_eq!((picture.rgb, picture.size), (rgb(50, 32, 5).into_raw(), (50, 32)));
}

#[test]
fn equally_near_buckets_are_decided_by_area_and_then_by_order() {
    let chosen = |sizes: &[(u32, u32)]| cut_one(&png(40, 40, 1), &PictureRules { sizes, ..RULES }).unwrap().size;
    assert_eq!(chosen(&[(16, 16), (32, 32), (24, 24)]), (32, 32));
    assert_eq!(chosen(&[(16, 32), (32, 16)]), (16, 32));
    assert_eq!(chosen(&[(32, 16), (16, 32)]), (32, 16));
}

#[test]
fn sdxl_has_forty_buckets_of_about_a_mebipixel() {
    let distinct: std::collections::BTreeSet<_> = SDXL_BUCKETS.iter().collect();
    assert_eq!(distinct.len(), 40);
    for (width, height) in SDXL_BUCKETS {
        assert!(width % 64 == 0 && height % 64 == 0);
        assert!((0.88..=1.01).contains(&(f64::from(width * height) / f64::from(1 << 20))), "{width} × {height}");
    }
    // Kohya's example: 512 and 64 give 512 × 512, and 448 × 576 beside it.
    let sizes = buckets(512, 64, 2.0);
    assert_eq!(sizes, [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]);
    assert!(buckets(512, 0, 2.0).is_empty() && buckets(63, 64, 2.0).is_empty());
}

#[test]
fn pictures_are_judged_by_edge_aspect_and_area() {
    let bytes = png(60, 40, 1);
    let judged = |rules: PictureRules| cut_one(&bytes, &rules).err();
    assert_eq!(judged(PictureRules { min_edge: 41, ..RULES }), Some(Refusal::MinEdge));
    assert_eq!(judged(PictureRules { min_edge: 40, ..RULES }), None);
    assert_eq!(judged(PictureRules { max_aspect: Some(1.49), ..RULES }), Some(Refusal::Aspect));
    assert_eq!(judged(PictureRules { max_aspect: Some(1.5), ..RULES }), None);
    assert_eq!(judged(PictureRules { min_area: Some(2401), ..RULES }), Some(Refusal::Area));
    assert_eq!(judged(PictureRules { max_area: Some(2399), ..RULES }), Some(Refusal::Area));
    assert_eq!(judged(PictureRules { min_area: Some(2400), max_area: Some(2400), ..RULES }), None);
}

#[test]
fn a_strip_is_cut_without_ever_being_resized_whole() {
    // Raised to 32 pixels it would be 96,000 pixels long.
    let picture = cut_one(&png(1, 3000, 1), &RULES).unwrap();
    assert_eq!((picture.size, picture.crop), ((32, 32), (0, 47_984)));
}

#[test]
fn encoded_pictures_come_back_nearly_the_same() {
    let original = photo(64, 48, 3);
    for (encoding, most) in [
        (Encoding::Jpeg { quality: 95 }, 3.0),
        (Encoding::Jpeg { quality: 60 }, 8.0),
        (Encoding::Webp { quality: 95 }, 4.0),
        (Encoding::Webp { quality: 50 }, 9.0),
    ] {
        let bytes = encode(&original, (64, 48), encoding, &mut Scratch::default()).unwrap();
        let (back, width, height) = decode_rgb(&bytes).unwrap();
        assert_eq!((width, height, back.len()), (64, 48, original.len()));
        let error = mean_difference(&back, &original);
        assert!(error < most, "{encoding:?}: {error}");
    }
    for encoding in [Encoding::Jpeg { quality: 95 }, Encoding::Webp { quality: 95 }] {
        let refused = |rgb: &[u8], size| encode(rgb, size, encoding, &mut Scratch::default()).err();
        assert_eq!(refused(&original, (70_000, 1)), Some(Refusal::ImageTooLarge));
        assert_eq!(refused(&original, (64, 47)), Some(Refusal::ImageUndecodable));
        assert_eq!(refused(&[], (0, 0)), Some(Refusal::ImageUndecodable));
    }
    assert_eq!(decode_rgb(b"none"), Err(Refusal::ImageUndecodable));
}

#[test]
fn near_duplicates_have_near_hashes_and_others_do_not() {
    let rules = PictureRules { phash: true, max_pixels: 1 << 22, ..RULES };
    let hash = |bytes: &[u8]| cut_one(bytes, &rules).unwrap().phash.unwrap();
    let bits = |a: u64, b: u64| (a ^ b).count_ones();
    let mut hashes: Vec<u64> = Vec::new();
    for seed in 0..24 {
        let picture = photo(400, 300, seed);
        let first = hash(&jpeg_of(&picture, 95));
        let smaller = image::imageops::resize(&picture, 211, 160, image::imageops::FilterType::Triangle);
        let larger = image::imageops::resize(&picture, 1000, 750, image::imageops::FilterType::CatmullRom);
        let webp = encode(&picture, (400, 300), Encoding::Webp { quality: 60 }, &mut Scratch::default()).unwrap();
        for (what, again) in
            [("JPEG 50", jpeg_of(&picture, 50)), ("smaller", jpeg_of(&smaller, 85)), ("larger", jpeg_of(&larger, 85)), ("WebP", webp)]
        {
            let apart = bits(first, hash(&again));
            assert!(apart <= 4, "picture {seed}, {what}: {apart} bits");
        }
        for (other, &second) in hashes.iter().enumerate() {
            assert!(bits(first, second) >= 12, "pictures {seed} and {other}: {} bits", bits(first, second));
        }
        hashes.push(first);
    }
    assert_eq!(cut_one(&png(40, 40, 1), &RULES).unwrap().phash, None);
}
