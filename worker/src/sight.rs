//! What is in a picture of the built-in scenes: a detector's answers as the scenes' own words, and how far they can be trusted.

use std::path::{Path, PathBuf};

use ella_dataset::scenes::{Backdrop, Background, Color, Direction, Look, Place, Scene, Shape, Sight, Size, Suite, Texture};
use ella_model::ModelError;
use ella_model::detector::{Detector, DetectorConfig};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

/// Pictures looked at together: so few that what is made of them is not given back to the system and taken anew for each layer.
const TOGETHER: i64 = 32;

/// Why nothing is seen.
#[derive(Debug, thiserror::Error)]
pub enum SightError {
    /// The detector's own.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// It knows a word that the scenes do not.
    #[error("{}: its configuration names the {kind} {word:?}, which no scene has; use the detector in mini/detector, or one that the example miniature trained", path.display())]
    Word {
        /// The detector's folder.
        path: PathBuf,
        /// What it is a word for.
        kind: &'static str,
        /// The word.
        word: String,
    },
}

impl From<tch::TchError> for SightError {
    fn from(error: tch::TchError) -> Self {
        Self::Model(error.into())
    }
}

/// A detector that speaks the scenes' words.
#[derive(Debug)]
pub struct Eyes {
    detector: Detector,
    /// Of its cells.
    places: Vec<Place>,
    shapes: Vec<Shape>,
    colors: Vec<Color>,
    sizes: Vec<Size>,
    textures: Vec<Texture>,
    backdrops: Vec<Backdrop>,
    device: Device,
}

impl Eyes {
    /// Loads the detector in `folder`.
    ///
    /// # Errors
    /// Its files are not there or not sound, or it knows other words.
    pub fn load(folder: &Path, device: Device) -> Result<Self, SightError> {
        let detector = Detector::load(folder, device)?;
        let DetectorConfig { places, shapes, colors, sizes, textures, backdrops, .. } = detector.config();
        fn known<T>(folder: &Path, kind: &'static str, words: &[String], named: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, SightError> {
            let unknown = |word: &String| SightError::Word { path: folder.into(), kind, word: word.clone() };
            words.iter().map(|word| named(word).ok_or_else(|| unknown(word))).collect()
        }
        Ok(Self {
            places: known(folder, "place", places, Place::named)?,
            shapes: known(folder, "shape", shapes, Shape::named)?,
            colors: known(folder, "colour", colors, Color::named)?,
            sizes: known(folder, "size", sizes, Size::named)?,
            textures: known(folder, "texture", textures, Texture::named)?,
            backdrops: known(folder, "background", backdrops, Backdrop::named)?,
            detector,
            device,
        })
    }

    /// What is in each of the pictures `[B, 3, H, W]` in −1…1.
    ///
    /// # Errors
    /// They have another shape.
    pub fn look(&self, pictures: &Tensor) -> Result<Vec<Sight>, SightError> {
        let mut sights = Vec::new();
        for part in pictures.f_split(TOGETHER, 0)? {
            let found = tch::no_grad(|| self.detector.forward(&part.f_to_device(self.device)?))?;
            let best =
                |logits: &Tensor| -> Result<Vec<i64>, tch::TchError> { Vec::try_from(logits.f_argmax(-1, false)?.f_flatten(0, -1)?) };
            let [shapes, colors, sizes, textures] = &found.cells;
            let (shapes, colors, sizes, textures) = (best(shapes)?, best(colors)?, best(sizes)?, best(textures)?);
            let backdrops = best(&found.backdrop)?;
            let look = |at: usize| {
                let of = |answers: &[i64]| usize::try_from(answers[at]).ok();
                Some(Look {
                    shape: *self.shapes.get(of(&shapes)?.checked_sub(1)?)?,
                    color: *self.colors.get(of(&colors)?)?,
                    size: *self.sizes.get(of(&sizes)?)?,
                    texture: *self.textures.get(of(&textures)?)?,
                })
            };
            let cell = |row: usize, place: Place| {
                let own = self.places.iter().position(|known| *known == place)?;
                look(row * self.places.len() + own)
            };
            sights.extend(backdrops.into_iter().enumerate().map(|(row, backdrop)| Sight {
                backdrop: usize::try_from(backdrop).ok().and_then(|at| self.backdrops.get(at)).copied(),
                cells: Place::all().map(|place| cell(row, place)).collect(),
            }));
        }
        Ok(sights)
    }

    /// How much of pictures whose truth is known it finds, in each [`Style`]: of the scenes of `suite`, rendered at `side` pixels.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn accuracy(&self, suite: &Suite, side: u32) -> Result<Vec<Accuracy>, SightError> {
        let of = |style: Style| {
            let scenes: Vec<Scene> = suite.scenes().map(|(_, scene)| style.scene(scene)).collect();
            let pictures = style.change(&rendered(&scenes, side)?, suite.seed as i64)?;
            Ok(Accuracy::of(style, &self.places, &scenes, &self.look(&pictures)?))
        };
        Style::ALL.into_iter().map(of).collect()
    }
}

/// Pictures of scenes, `[B, 3, side, side]` in −1…1.
///
/// # Errors
/// libtorch's own.
pub fn rendered(scenes: &[Scene], side: u32) -> Result<Tensor, tch::TchError> {
    let bytes: Vec<u8> = scenes.iter().flat_map(|scene| scene.render(side)).collect();
    from_bytes(&bytes, (scenes.len() as i64, i64::from(side), i64::from(side)))
}

/// Pictures of 3 bytes a pixel, `[B, 3, H, W]` in −1…1.
///
/// # Errors
/// They are not so many bytes.
pub fn from_bytes(bytes: &[u8], (count, height, width): (i64, i64, i64)) -> Result<Tensor, tch::TchError> {
    let pixels = Tensor::f_from_slice(bytes)?.f_view([count, height, width, 3])?.f_permute([0, 3, 1, 2])?;
    pixels.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)
}

/// How pictures look by which a detector is tried. It was trained on plain ones, on what the VAE makes of them, and on grain; the others it has never seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// As they are rendered.
    Rendered,
    /// With coarse grain.
    Grainy,
    /// Each pixel is the mean of nine.
    Blurred,
    /// Paler, as if seen through mist.
    Misty,
    /// In warm light: less blue.
    Warm,
    /// On a background that fades into white from left to right.
    Faded,
}

impl Style {
    /// Every one.
    pub const ALL: [Self; 6] = [Self::Rendered, Self::Grainy, Self::Blurred, Self::Misty, Self::Warm, Self::Faded];

    /// The scene to render.
    fn scene(self, mut scene: Scene) -> Scene {
        if let (Self::Faded, Background::Plain { color }) = (self, scene.background)
            && color != Backdrop::Navy
        {
            scene.background = Background::Gradient { from: color, to: Backdrop::White, direction: Direction::Right };
        }
        scene
    }

    /// The pictures, changed.
    fn change(self, pictures: &Tensor, seed: i64) -> Result<Tensor, tch::TchError> {
        match self {
            Self::Rendered | Self::Faded => Ok(pictures.shallow_clone()),
            Self::Grainy => {
                tch::manual_seed(seed);
                pictures.f_add(&pictures.f_randn_like()?.f_mul_scalar(0.15)?)
            }
            Self::Blurred => pictures.f_avg_pool2d([3, 3], [1, 1], [1, 1], false, false, None::<i64>),
            Self::Misty => pictures.f_mul_scalar(0.8)?.f_add_scalar(0.1),
            Self::Warm => {
                let light = Tensor::f_from_slice(&[1.0f32, 0.97, 0.85])?.f_view([1, 3, 1, 1])?.f_to_device(pictures.device())?;
                pictures.f_add_scalar(1.0)?.f_mul(&light)?.f_sub_scalar(1.0)
            }
        }
    }
}

/// How much of some pictures was found.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Accuracy {
    /// How they look.
    pub style: Style,
    /// Cells of which all was right: empty, or an object with its outline, colour, size and texture.
    pub cells: f64,
    /// Objects of which all was right.
    pub objects: f64,
    /// Questions about the scenes that were answered rightly: all with yes.
    pub questions: f64,
    /// How many pictures.
    pub pictures: usize,
}

impl Accuracy {
    fn of(style: Style, places: &[Place], scenes: &[Scene], sights: &[Sight]) -> Self {
        let (mut cells, mut objects, mut questions) = (Share::default(), Share::default(), Share::default());
        for (scene, sight) in scenes.iter().zip(sights) {
            let truth = scene.sight();
            for place in places {
                let right = truth.at(*place) == sight.at(*place);
                cells.add(right);
                if truth.at(*place).is_some() {
                    objects.add(right);
                }
            }
            scene.questions().iter().for_each(|question| questions.add(question.is_so(sight)));
        }
        Self { style, cells: cells.share(), objects: objects.share(), questions: questions.share(), pictures: scenes.len() }
    }
}

#[derive(Default)]
struct Share(u64, u64);

impl Share {
    fn add(&mut self, right: bool) {
        self.0 += u64::from(right);
        self.1 += 1;
    }

    fn share(&self) -> f64 {
        self.0 as f64 / self.1.max(1) as f64
    }
}
