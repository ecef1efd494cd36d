//! Aspect-ratio buckets: the sizes that pictures are cut to, so that a batch of one size loses little of each.

use std::cmp::Ordering;

/// The 40 widths and heights that SDXL was trained on (arXiv 2307.01952, appendix I; about 1024² pixels each).
pub const SDXL_BUCKETS: [(u32, u32); 40] = [
    (2048, 512),
    (1984, 512),
    (1920, 512),
    (1856, 512),
    (1792, 576),
    (1728, 576),
    (1664, 576),
    (1600, 640),
    (1536, 640),
    (1472, 704),
    (1408, 704),
    (1344, 704),
    (1344, 768),
    (1280, 768),
    (1216, 832),
    (1152, 832),
    (1152, 896),
    (1088, 896),
    (1088, 960),
    (1024, 960),
    (1024, 1024),
    (960, 1024),
    (960, 1088),
    (896, 1088),
    (896, 1152),
    (832, 1152),
    (832, 1216),
    (768, 1280),
    (768, 1344),
    (704, 1408),
    (704, 1472),
    (640, 1536),
    (640, 1600),
    (576, 1664),
    (576, 1728),
    (576, 1792),
    (512, 1856),
    (512, 1920),
    (512, 1984),
    (512, 2048),
];

/// Widths and heights, multiples of `step` pixels, of at most `resolution`² pixels and sides of at most `max_aspect` to 1: for every width
/// the largest height, and turned (the rule of NovelAI's and kohya's trainers), sorted. None if `step` is 0 or above `resolution`.
pub fn buckets(resolution: u32, step: u32, max_aspect: f64) -> Vec<(u32, u32)> {
    let Some(square) = resolution.checked_div(step).filter(|&steps| steps > 0).map(|steps| steps * step) else { return Vec::new() };
    let area = u64::from(resolution) * u64::from(resolution);
    let tall = |width: u32| {
        let height = area / u64::from(width) / u64::from(step) * u64::from(step);
        u32::try_from(height).ok().map(|height| (width, height))
    };
    let fits = |&(width, height): &(u32, u32)| f64::from(height) <= max_aspect * f64::from(width);
    let mut sizes: Vec<_> = (step..=square).step_by(step as usize).filter_map(tall).filter(fits).collect();
    sizes.extend_from_within(..);
    let half = sizes.len() / 2;
    sizes[half..].iter_mut().for_each(|size| *size = (size.1, size.0));
    sizes.push((square, square));
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// The size whose aspect ratio is nearest to a picture's, by the ratio of the two; of equally near ones the largest, then the first.
/// Whole numbers only, so that every machine chooses alike. None if there are no sizes.
pub(super) fn nearest(sizes: &[(u32, u32)], (width, height): (u32, u32)) -> Option<(u32, u32)> {
    // How far the ratios are apart, as a fraction of one or more.
    let apart = |size: (u32, u32)| {
        let (a, b) = (u128::from(size.0) * u128::from(height), u128::from(size.1) * u128::from(width));
        (a.max(b), a.min(b))
    };
    let area = |size: (u32, u32)| u64::from(size.0) * u64::from(size.1);
    let better = |a: (u32, u32), b: (u32, u32)| {
        let ((a_over, a_under), (b_over, b_under)) = (apart(a), apart(b));
        (a_over * b_under).cmp(&(b_over * a_under)).then(area(b).cmp(&area(a))) == Ordering::Less
    };
    sizes.iter().copied().reduce(|best, size| if better(size, best) { size } else { best })
}
