//! Four pictures of a prompt as one, as DPG-Bench's official scorer takes them (paper §3.3): their seeds, their places, and whether a file
//! is a whole grid.

use std::io::Cursor;

use ella_model::rng::CounterRng;

use crate::draw::Picture;

/// Pictures of a prompt.
pub(super) const TILES: usize = 4;

/// Where tiles lie, in tiles from the left and from the top, in the scorer's order.
pub(super) const PLACES: [(u32, u32); TILES] = [(0, 0), (1, 0), (0, 1), (1, 1)];

/// The seeds of a prompt's tiles: each follows from these three alone, so that whatever draws them, and in whatever order, it starts from the
/// same noise. Of 53 bits, which every reader of JSON has exactly.
pub fn seeds(seed: u64, id: &str) -> [u64; TILES] {
    let rng = CounterRng::new(seed, id);
    std::array::from_fn(|tile| rng.bits(tile as u64) >> 11)
}

/// One picture of square tiles, whose side is `side` pixels.
pub(super) fn grid(tiles: &[Picture], side: u32) -> Picture {
    let mut sheet = Picture::white(2 * side, 2 * side);
    for (tile, (x, y)) in tiles.iter().zip(PLACES) {
        sheet.paste(tile, (x * side, y * side));
    }
    sheet
}

/// Whether a file is a PNG of a grid's size, to its last byte: its checksums are looked at.
pub(super) fn is_whole(file: &[u8], side: u32) -> bool {
    let mut strict = png::DecodeOptions::default();
    strict.set_skip_ancillary_crc_failures(false);
    let Ok(mut reader) = png::Decoder::new_with_options(Cursor::new(file), strict).read_info() else { return false };
    let info = reader.info();
    // Before memory is taken for as much as a file promises.
    let is_grid = (info.width, info.height) == (2 * side, 2 * side);
    if !is_grid || (info.color_type, info.bit_depth) != (png::ColorType::Rgb, png::BitDepth::Eight) {
        return false;
    }
    let mut pixels = vec![0; 3 * (2 * side as usize).pow(2)];
    reader.next_frame(&mut pixels).is_ok() && reader.finish().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiles_seed_follows_from_its_prompts_name_and_place() {
        let one = seeds(7, "partiprompts97");
        assert_eq!(one, seeds(7, "partiprompts97"));
        // Another value would draw other pictures for the same command.
        assert_eq!(seeds(0, "0"), SEEDS_OF_0);
        let mut all: Vec<u64> = (0..500).flat_map(|n| seeds(7, &n.to_string())).chain(one).chain(seeds(8, "partiprompts97")).collect();
        assert!(all.iter().all(|seed| *seed < 1 << 53));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 502 * TILES);
    }

    const SEEDS_OF_0: [u64; TILES] = [2_259_844_644_125_901, 605_407_377_726_243, 3_556_483_415_748_115, 6_710_424_135_599_518];

    #[test]
    fn tiles_lie_in_the_scorers_order() {
        let tiles: Vec<Picture> = (1..=4).map(|value| Picture { width: 3, height: 3, rgb: vec![value; 27] }).collect();
        let sheet = grid(&tiles, 3);
        let at = |x: usize, y: usize| sheet.rgb[3 * (6 * y + x)];
        assert_eq!([at(0, 0), at(2, 2), at(3, 0), at(5, 2), at(0, 3), at(2, 5), at(3, 3), at(5, 5)], [1, 1, 2, 2, 3, 3, 4, 4]);
        assert_eq!((sheet.width, sheet.height), (6, 6));
    }

    #[test]
    fn a_file_is_a_whole_grid_or_none() {
        let noise: Vec<u8> = (0..3 * 64 * 64).map(|n| (CounterRng::new(1, "x").bits(n) & 255) as u8).collect();
        let file = Picture { width: 64, height: 64, rgb: noise }.png("a prompt").unwrap();
        assert!(is_whole(&file, 32));
        assert!(!is_whole(&file, 16) && !is_whole(&file, 33));
        assert!((0..file.len()).step_by(97).all(|bytes| !is_whole(&file[..bytes], 32)), "a file that was cut");
        assert!(!is_whole(&file[..file.len() - 1], 32));
        for at in (0..file.len()).step_by(101) {
            let mut file = file.clone();
            file[at] ^= 1;
            assert!(!is_whole(&file, 32), "a bit of byte {at}");
        }
        let grey = {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 64, 64);
            encoder.set_color(png::ColorType::Grayscale);
            encoder.write_header().unwrap().write_image_data(&[0; 64 * 64]).unwrap();
            bytes
        };
        assert!(!is_whole(&grey, 32) && !is_whole(b"", 32) && !is_whole(b"GIF89a", 32));
    }
}
