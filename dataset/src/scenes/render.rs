//! The rasteriser: shapes as signed distances, edges anti-aliased from them.
//!
//! Only IEEE operations that every machine rounds alike are used (+, −, ×, ÷, √, floor), so a scene has the same bytes
//! everywhere. Lengths are in units of an object's radius or in picture widths; y points down.

use std::sync::LazyLock;

use super::world::{Background, Direction, Object, Scene, Shape, Texture};

type Vec2 = [f32; 2];
type Rgb = [f32; 3];

const COS_36: f32 = 0.809_017;
const SIN_36: f32 = 0.587_785_25;
const COS_72: f32 = 0.309_017;
const SIN_72: f32 = 0.951_056_5;
const COS_30: f32 = 0.866_025_4;
const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;

/// Corners are rounded by this much.
const ROUNDING: f32 = 0.05;
/// The radius of round shapes.
const ROUND: f32 = 0.95;
/// A dark line along the edge.
const RIM: f32 = 0.07;
/// Where the shadow falls, how soft it is and how dark.
const SHADOW: Vec2 = [0.1, 0.13];
const SHADOW_BLUR: f32 = 0.16;
const SHADOW_ALPHA: f32 = 0.3;
/// A heart is a square on its corner, this far from its middle, with a disc on each upper side.
const HEART: f32 = 0.787;
const HEART_MIDDLE: f32 = 0.0815;

struct Edge {
    from: Vec2,
    along: Vec2,
    inverse_square: f32,
}

struct Polygon(Vec<Edge>);

impl Polygon {
    fn new(points: &[Vec2]) -> Self {
        let next = points.iter().cycle().skip(1);
        Self(
            points
                .iter()
                .zip(next)
                .map(|(from, to)| {
                    let along = [to[0] - from[0], to[1] - from[1]];
                    Edge { from: *from, along, inverse_square: 1.0 / dot(along, along) }
                })
                .collect(),
        )
    }

    /// The distance to the nearest edge, negative inside (by counting the edges that a ray to the right crosses).
    fn distance(&self, point: Vec2) -> f32 {
        let (mut nearest, mut inside) = (f32::MAX, false);
        for Edge { from, along, inverse_square } in &self.0 {
            let to = [point[0] - from[0], point[1] - from[1]];
            let share = (dot(to, *along) * inverse_square).clamp(0.0, 1.0);
            let gap = [to[0] - along[0] * share, to[1] - along[1] * share];
            nearest = nearest.min(dot(gap, gap));
            if (to[1] < 0.0) != (to[1] < along[1]) && (to[0] * along[1] < to[1] * along[0]) == (along[1] > 0.0) {
                inside = !inside;
            }
        }
        if inside { -nearest.sqrt() } else { nearest.sqrt() }
    }
}

/// The shapes that are polygons before rounding, by [`Shape`]'s number.
static POLYGONS: LazyLock<Vec<Option<Polygon>>> =
    LazyLock::new(|| Shape::ALL.iter().map(|shape| corners(*shape).map(|points| Polygon::new(&points))).collect());

fn corners(shape: Shape) -> Option<Vec<Vec2>> {
    // Five-fold shapes are moved down to fill their box.
    let five = |radius: f32, y: f32| {
        [[0.0, -1.0], [SIN_72, -COS_72], [SIN_36, COS_36], [-SIN_36, COS_36], [-SIN_72, -COS_72]]
            .map(|[px, py]| [px * radius, py * radius + y])
    };
    let points = match shape {
        Shape::Square => vec![[-0.74, -0.74], [0.74, -0.74], [0.74, 0.74], [-0.74, 0.74]],
        Shape::Triangle => vec![[0.0, -0.82], [0.95, 0.82], [-0.95, 0.82]],
        Shape::Diamond => vec![[0.0, -0.95], [0.68, 0.0], [0.0, 0.95], [-0.68, 0.0]],
        Shape::Hexagon => [[1.0, 0.0], [0.5, COS_30], [-0.5, COS_30], [-1.0, 0.0], [-0.5, -COS_30], [0.5, -COS_30]]
            .map(|[x, y]| [0.93 * x, 0.93 * y])
            .to_vec(),
        Shape::Pentagon => five(0.98, 0.09).to_vec(),
        Shape::Star => {
            let inner = five(-0.46, 0.09);
            five(0.99, 0.09).into_iter().enumerate().flat_map(|(i, outer)| [outer, inner[(i + 3) % 5]]).collect()
        }
        Shape::Cross => {
            let (arm, end) = (0.28, 0.9);
            let quarter = [[-arm, -end], [arm, -end], [arm, -arm]];
            let turns: [fn(Vec2) -> Vec2; 4] = [|p| p, |[x, y]| [-y, x], |[x, y]| [-x, -y], |[x, y]| [y, -x]];
            turns.iter().flat_map(|turn| quarter.map(turn)).collect()
        }
        Shape::Circle | Shape::Ring | Shape::Heart | Shape::Crescent => return None,
    };
    Some(points)
}

fn dot(a: Vec2, b: Vec2) -> f32 {
    a[0] * b[0] + a[1] * b[1]
}

fn disc(point: Vec2, middle: Vec2, radius: f32) -> f32 {
    let gap = [point[0] - middle[0], point[1] - middle[1]];
    dot(gap, gap).sqrt() - radius
}

/// How far `point` is from the edge of a shape, in radii; negative inside.
fn distance(shape: Shape, point: Vec2) -> f32 {
    match shape {
        Shape::Circle => disc(point, [0.0; 2], ROUND),
        Shape::Ring => disc(point, [0.0; 2], 0.7).abs() - 0.25,
        Shape::Crescent => disc(point, [0.0; 2], ROUND).max(-disc(point, [0.48, -0.16], 0.78)),
        Shape::Heart => {
            let mirrored = [point[0].abs(), point[1] - HEART_MIDDLE];
            let square = (mirrored[0] + mirrored[1].abs() - HEART) * SQRT_HALF;
            square.min(disc(mirrored, [HEART / 2.0, -HEART / 2.0], HEART * SQRT_HALF))
        }
        _ => POLYGONS[shape as usize].as_ref().map_or(f32::MAX, |polygon| polygon.distance(point) - ROUNDING),
    }
}

/// The box around a shape: left, top, right, bottom in radii from its middle.
fn extent(shape: Shape) -> [f32; 4] {
    let Some(points) = corners(shape) else {
        return match shape {
            Shape::Heart => [-ROUND, -ROUND + HEART_MIDDLE, ROUND, HEART + HEART_MIDDLE],
            // The lower tip, where bite and rim meet, lies at (0.762, 0.567): nothing is right of it.
            Shape::Crescent => [-ROUND, -ROUND, 0.762, ROUND],
            _ => [-ROUND, -ROUND, ROUND, ROUND],
        };
    };
    let start = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
    let [left, top, right, bottom] = points.iter().fold(start, |[l, t, r, b], [x, y]| [l.min(*x), t.min(*y), r.max(*x), b.max(*y)]);
    [left - ROUNDING, top - ROUNDING, right + ROUNDING, bottom + ROUNDING]
}

impl Object {
    /// The box around it: left, top, right, bottom as shares of the picture.
    pub fn bounds(&self) -> [f32; 4] {
        let [left, top, right, bottom] = extent(self.shape).map(|side| side * self.radius);
        let [x, y] = self.center;
        [x + left, y + top, x + right, y + bottom]
    }
}

/// The share of a pixel inside an edge that is `pixels` away (negative: the pixel's middle is inside).
fn coverage(pixels: f32) -> f32 {
    (0.5 - pixels).clamp(0.0, 1.0)
}

fn blend(from: Rgb, to: Rgb, share: f32) -> Rgb {
    [0, 1, 2].map(|channel| from[channel] + (to[channel] - from[channel]) * share)
}

fn rgb(bytes: [u8; 3]) -> Rgb {
    bytes.map(f32::from)
}

/// The share of a texture's second shade at (u, v), counted in its periods; `pixel` is a pixel's side in periods.
fn ink(texture: Texture, [u, v]: Vec2, pixel: f32) -> f32 {
    // The distance in periods from the middle of a period, so that half a period is inked.
    let wave = |x: f32| coverage(((x - x.floor() - 0.5).abs() - 0.25) / pixel);
    match texture {
        Texture::Plain => 0.0,
        Texture::Striped => wave((u + v) * SQRT_HALF),
        Texture::Checkered => {
            let (across, down) = (wave(u), wave(v));
            across + down - 2.0 * across * down
        }
        Texture::Dotted => coverage(disc([u - u.floor(), v - v.floor()], [0.5; 2], 0.3) / pixel),
    }
}

/// The period of a texture, in radii of the object that it covers.
const fn period(texture: Texture) -> f32 {
    match texture {
        Texture::Plain => 1.0,
        Texture::Striped => 0.5,
        Texture::Dotted => 0.56,
        Texture::Checkered => 0.8,
    }
}

/// A shade of a colour that shows on it: lighter on dark colours, darker on light ones.
fn second_shade(base: Rgb) -> Rgb {
    let light = 0.3 * base[0] + 0.59 * base[1] + 0.11 * base[2];
    if light < 150.0 { blend(base, [255.0; 3], 0.62) } else { blend(base, [30.0, 20.0, 30.0], 0.42) }
}

/// A square picture being drawn, 3 bytes a pixel.
struct Canvas {
    side: usize,
    bytes: Vec<u8>,
}

impl Canvas {
    fn put(&mut self, x: usize, y: usize, color: Rgb) {
        let at = (y * self.side + x) * 3;
        self.bytes[at..at + 3].copy_from_slice(&color.map(|channel| (channel + 0.5) as u8));
    }

    fn get(&self, x: usize, y: usize) -> Rgb {
        let at = (y * self.side + x) * 3;
        [0, 1, 2].map(|channel| f32::from(self.bytes[at + channel]))
    }

    /// A pixel's middle in picture widths.
    fn middle(&self, pixel: usize) -> f32 {
        (pixel as f32 + 0.5) / self.side as f32
    }

    fn fill(&mut self, background: &Background) {
        let side = self.side;
        for y in 0..side {
            let v = self.middle(y);
            for x in 0..side {
                self.put(x, y, backdrop(background, [self.middle(x), v], 1.0 / side as f32));
            }
        }
    }

    fn draw(&mut self, object: &Object) {
        let radius = object.radius;
        let reach = radius * (1.0 + SHADOW[1] + SHADOW_BLUR);
        let span = |middle: f32| {
            let pixel = |at: f32| (at * self.side as f32).clamp(0.0, self.side as f32) as usize;
            pixel(middle - reach)..(pixel(middle + reach) + 1).min(self.side)
        };
        let (columns, rows) = (span(object.center[0]), span(object.center[1]));
        let brush = Brush::new(object, radius * self.side as f32);
        for y in rows {
            for x in columns.clone() {
                let point = [(self.middle(x) - object.center[0]) / radius, (self.middle(y) - object.center[1]) / radius];
                let color = brush.over(point, || self.get(x, y));
                color.into_iter().for_each(|color| self.put(x, y, color));
            }
        }
    }
}

/// The background's colour at (u, v), in picture widths; `pixel` is a pixel's side.
fn backdrop(background: &Background, [u, v]: Vec2, pixel: f32) -> Rgb {
    match *background {
        Background::Plain { color } => rgb(color.rgb()),
        Background::Gradient { from, to, direction } => {
            let share = match direction {
                Direction::Down => v,
                Direction::Right => u,
                Direction::Diagonal => (u + v) / 2.0,
            };
            blend(rgb(from.rgb()), rgb(to.rgb()), share)
        }
        Background::Pattern { color, texture } => {
            let base = rgb(color.rgb());
            let second = if color.is_dark() { blend(base, [255.0; 3], 0.13) } else { blend(base, [90.0, 90.0, 110.0], 0.16) };
            let periods = 3.0 / period(texture);
            blend(base, second, ink(texture, [u * periods, v * periods], periods * pixel))
        }
    }
}

/// How an object looks at a point.
struct Brush {
    shape: Shape,
    texture: Texture,
    base: Rgb,
    second: Rgb,
    rim: Rgb,
    /// Pixels in a radius.
    scale: f32,
}

impl Brush {
    fn new(object: &Object, scale: f32) -> Self {
        let base = rgb(object.color.rgb());
        Self { shape: object.shape, texture: object.texture, base, second: second_shade(base), rim: blend(base, [12.0; 3], 0.42), scale }
    }

    /// The colour at `point`, in radii, over what is `behind` it; `None` where the object and its shadow do not reach.
    fn over(&self, point: Vec2, behind: impl Fn() -> Rgb) -> Option<Rgb> {
        let edge = distance(self.shape, point);
        let body = coverage(edge * self.scale);
        if body >= 1.0 {
            return Some(self.body(point, edge));
        }
        let shadow = distance(self.shape, [point[0] - SHADOW[0], point[1] - SHADOW[1]]);
        let dim = SHADOW_ALPHA * coverage(shadow / SHADOW_BLUR);
        if dim <= 0.0 && body <= 0.0 {
            return None;
        }
        let behind = behind();
        let shaded = blend(behind, [0.0; 3], dim);
        Some(if body > 0.0 { blend(shaded, self.body(point, edge), body) } else { shaded })
    }

    fn body(&self, point: Vec2, edge: f32) -> Rgb {
        let period = period(self.texture);
        // A dot sits in the middle of its period: half a period on, one sits in the middle of the object.
        let at = if self.texture == Texture::Dotted { point.map(|x| x / period + 0.5) } else { point.map(|x| x / period) };
        let inked = blend(self.base, self.second, ink(self.texture, at, 1.0 / (period * self.scale)));
        // Light from above.
        let lit = blend(inked, [255.0; 3], 0.06 * (1.0 - point[1]).clamp(0.0, 2.0));
        let rim = 1.0 - coverage((edge + RIM) * self.scale);
        blend(lit, self.rim, 0.8 * rim)
    }
}

impl Scene {
    /// The picture: `size` × `size` pixels, rows from the top, 3 bytes (red, green, blue) each.
    pub fn render(&self, size: u32) -> Vec<u8> {
        let side = size as usize;
        let mut canvas = Canvas { side, bytes: vec![0; side * side * 3] };
        canvas.fill(&self.background);
        self.objects.iter().for_each(|object| canvas.draw(object));
        canvas.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::scene;

    /// What the truth says of boxes is what the pixels show.
    #[test]
    fn every_shapes_box_fits_its_pixels() {
        let steps = 400;
        let at = |step: i32| step as f32 / steps as f32 * 1.1;
        for shape in Shape::ALL {
            let inside: Vec<Vec2> = (-steps..=steps)
                .flat_map(|y| (-steps..=steps).map(move |x| [at(x), at(y)]))
                .filter(|p| distance(*shape, *p) <= 0.0)
                .collect();
            let fold = |axis: usize, pick: fn(f32, f32) -> f32| inside.iter().map(|p| p[axis]).reduce(pick).unwrap();
            let seen = [fold(0, f32::min), fold(1, f32::min), fold(0, f32::max), fold(1, f32::max)];
            let told = extent(*shape);
            assert!(seen.iter().zip(told).all(|(a, b)| (a - b).abs() < 0.008), "{shape:?}: {seen:?}, told {told:?}");
            assert!(told.iter().all(|side| side.abs() <= 1.0), "{shape:?} leaves its box: {told:?}");
        }
    }

    #[test]
    fn distances_are_distances() {
        let grid = || (-60..60).flat_map(|y| (-60..60).map(move |x| [x as f32 / 40.0, y as f32 / 40.0]));
        for shape in Shape::ALL {
            for point in grid() {
                let (here, there) = (distance(*shape, point), distance(*shape, [point[0] + 0.01, point[1]]));
                assert!((here - there).abs() < 0.0101, "{shape:?} at {point:?}: {here} then {there}");
            }
        }
    }

    /// The bytes are the same on every machine; whoever changes the drawing changes this on purpose.
    #[test]
    fn pixels_are_pinned() {
        let mut hash = blake3::Hasher::new();
        (0..300).for_each(|index| {
            hash.update(&scene(7, index).render(48));
        });
        assert_eq!(hash.finalize().to_hex().as_str(), PINNED);
    }

    const PINNED: &str = "e1ad7222865934b14dea5e354070231648201c5391ca17f798d85eda3378e1ed";

    #[test]
    fn objects_show_their_colour_and_the_corner_shows_the_background() {
        for index in 0..200 {
            let scene = scene(3, index);
            let pixels = scene.render(96);
            for object in scene.objects.iter().filter(|o| o.texture == Texture::Plain && !matches!(o.shape, Shape::Ring | Shape::Crescent))
            {
                let [x, y] = object.center.map(|at| (at * 96.0) as usize);
                let at = (y * 96 + x) * 3;
                let near = pixels[at..at + 3].iter().zip(object.color.rgb()).all(|(a, b)| a.abs_diff(b) < 24);
                assert!(near, "scene {index}, {object:?}: {:?}", &pixels[at..at + 3]);
            }
            if let Background::Plain { color } = scene.background {
                assert_eq!(pixels[..3], color.rgb());
            }
        }
    }
}
