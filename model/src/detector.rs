//! What lies in the cells of a picture: a small classifier, by which pictures of the built-in scenes are scored.
//!
//! A picture is cut into cells, as many across as down, and each cell is looked at alone, so that what the network knows of one place it knows of all; only the
//! background is told from all of them together.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, GroupNorm, Linear, silu};
use crate::params::Params;
use crate::part::Part;

/// A cell's side in pixels, to which pictures are scaled.
const CELL: i64 = 32;

/// What a detector can find, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetectorConfig {
    /// Names of the cells, row by row.
    pub places: Vec<String>,
    /// Outlines.
    pub shapes: Vec<String>,
    /// Colours of objects.
    pub colors: Vec<String>,
    /// Sizes.
    pub sizes: Vec<String>,
    /// What covers objects.
    pub textures: Vec<String>,
    /// Colours of backgrounds.
    pub backdrops: Vec<String>,
    /// Channels of its first layer; every further one has twice as many.
    pub channels: i64,
}

impl DetectorConfig {
    /// Reads every field of `config.json`, and refuses those it does not know.
    pub fn read(c: ConfigFile) -> Result<Self> {
        let words = |field: &str| {
            let rule = "a list of words";
            let found: Vec<String> = c.required(field, rule)?;
            if found.is_empty() { Err(c.refuse(field, rule)) } else { Ok(found) }
        };
        let config = Self {
            places: words("places")?,
            shapes: words("shapes")?,
            colors: words("colors")?,
            sizes: words("sizes")?,
            textures: words("textures")?,
            backdrops: words("backdrops")?,
            channels: c.size("channels")?,
        };
        if config.grid().pow(2) != config.places.len() as i64 {
            return Err(c.refuse("places", "a square number of them"));
        }
        if config.channels % GROUPS != 0 {
            return Err(c.refuse("channels", "a multiple of 8"));
        }
        c.finish(&[])?;
        Ok(config)
    }

    /// Cells a side.
    fn grid(&self) -> i64 {
        self.places.len().isqrt() as i64
    }

    /// The widths of a cell's logits, in the order of [`Found::cells`].
    pub fn widths(&self) -> [i64; 4] {
        [self.shapes.len() + 1, self.colors.len(), self.sizes.len(), self.textures.len()].map(|width| width as i64)
    }
}

const GROUPS: i64 = 8;

/// Logits of what is seen.
#[derive(Debug)]
pub struct Found {
    /// `[B, places, K]` each: nothing or an outline, and of what has one the colour, the size, and what covers it.
    pub cells: [Tensor; 4],
    /// `[B, K]`: the background's colour.
    pub backdrop: Tensor,
}

/// The classifier.
#[derive(Debug)]
pub struct Detector {
    config: DetectorConfig,
    layers: Vec<(Conv2d, GroupNorm)>,
    hidden: Linear,
    cell: Linear,
    backdrop: Linear,
}

impl Detector {
    /// Builds the network from any source of parameters.
    pub fn new(config: &DetectorConfig, p: &Params) -> Result<Self> {
        let (first, width) = (config.channels, 4 * config.channels);
        let layer = |(n, (input, output, stride)): (usize, (i64, i64, i64))| {
            let conv = Conv2d::strided(&p.at("conv").at(n), (input, output), 3, (stride, 1))?;
            Ok((conv, GroupNorm::new(&p.at("norm").at(n), output, GROUPS, 1e-5)?))
        };
        let channels = [(3, first, 1), (first, 2 * first, 2), (2 * first, 2 * first, 1), (2 * first, width, 2), (width, width, 2)];
        let side = CELL / 8;
        Ok(Self {
            layers: channels.into_iter().enumerate().map(layer).collect::<Result<_>>()?,
            hidden: Linear::new(&p.at("hidden"), width * side * side, width)?,
            cell: Linear::new(&p.at("cell"), width, config.widths().iter().sum())?,
            backdrop: Linear::new(&p.at("backdrop"), width, config.backdrops.len() as i64)?,
            config: config.clone(),
        })
    }

    /// Loads the folder `dir` (`config.json` and weights), computing in float32.
    ///
    /// # Errors
    /// A file is missing or damaged, the configuration unsupported, or tensors are missing, misshapen or left over.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        let Part { config, weights } = Part::open(dir)?;
        let p = Params::from_weights(weights, Kind::Float, device);
        let net = Self::new(&DetectorConfig::read(config)?, &p)?;
        p.finish(&[])?;
        Ok(net)
    }

    /// What it can find.
    pub fn config(&self) -> &DetectorConfig {
        &self.config
    }

    /// Looks at pictures `[B, 3, H, W]` in −1…1, of any size.
    ///
    /// # Errors
    /// They have another shape.
    pub fn forward(&self, pictures: &Tensor) -> Result<Found> {
        let batch = match pictures.size()[..] {
            [batch, 3, ..] if pictures.dim() == 4 => batch,
            _ => return Err(ModelError::argument("pictures", "[B, 3, H, W]", format!("{:?}", pictures.size()))),
        };
        let grid = self.config.grid();
        let side = grid * CELL;
        let scaled = pictures.f_to_kind(Kind::Float)?.f_upsample_bilinear2d([side, side], false, None, None)?;
        // [B, 3, grid, CELL, grid, CELL] to [B · grid², 3, CELL, CELL].
        let cells = scaled.f_view([batch, 3, grid, CELL, grid, CELL])?.f_permute([0, 2, 4, 1, 3, 5])?;
        let mut x = cells.f_reshape([batch * grid * grid, 3, CELL, CELL])?;
        for (conv, norm) in &self.layers {
            x = silu(&norm.forward(&conv.forward(&x)?)?)?;
        }
        let x = silu(&self.hidden.forward(&x.f_flatten(1, -1)?)?)?.f_view([batch, grid * grid, -1])?;
        let backdrop = self.backdrop.forward(&x.f_mean_dim(1i64, false, Kind::Float)?)?;
        let cells = self.cell.forward(&x)?.f_split_with_sizes(self.config.widths(), -1)?;
        let cells = cells.try_into().map_err(|_| ModelError::argument("logits", "four parts", "others"))?;
        Ok(Found { cells, backdrop })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, Value, json};

    fn config(change: Value) -> Result<DetectorConfig> {
        let mut fields: Map<String, Value> = serde_json::from_value(json!({
            "places": ["a", "b", "c", "d"], "shapes": ["circle", "star"], "colors": ["red", "blue", "green"], "sizes": ["large"], "textures": ["plain", "dotted"],
            "backdrops": ["navy", "mint"], "channels": 8,
        }))
        .unwrap();
        fields.extend(change.as_object().unwrap().clone());
        DetectorConfig::read(ConfigFile::from_map(Path::new("config.json"), fields))
    }

    fn random() -> Detector {
        Detector::new(&config(json!({})).unwrap(), &Params::random(1, Kind::Float, Device::Cpu)).unwrap()
    }

    #[test]
    fn fields_that_it_does_not_know_are_refused_by_name() {
        for (field, change) in [
            ("places", json!({"places": ["a", "b", "c"]})),
            ("shapes", json!({"shapes": []})),
            ("colors", json!({"colors": "red"})),
            ("channels", json!({"channels": 12})),
            ("depth", json!({"depth": 3})),
        ] {
            assert!(matches!(config(change), Err(ModelError::Config { field: f, .. }) if f == field), "{field}");
        }
    }

    #[test]
    fn a_cell_is_told_by_its_own_pixels() {
        let detector = random();
        let picture = Tensor::arange(3 * 48 * 48, (Kind::Float, Device::Cpu)).sin().reshape([1, 3, 48, 48]);
        let found = detector.forward(&picture).unwrap();
        let sizes: Vec<Vec<i64>> = found.cells.iter().chain([&found.backdrop]).map(Tensor::size).collect();
        assert_eq!(sizes, [vec![1, 4, 3], vec![1, 4, 3], vec![1, 4, 1], vec![1, 4, 2], vec![1, 2]]);
        // Another cell in the upper left: pixels 0 to 23, of which its neighbours may see the last by interpolation.
        let other = picture.copy();
        let _ = other.narrow(2, 0, 22).narrow(3, 0, 22).fill_(0.5);
        let changed = detector.forward(&other).unwrap();
        let differs = |cell: i64| found.cells[0].select(1, cell).allclose(&changed.cells[0].select(1, cell), 0.0, 1e-6, false);
        assert_eq!((0..4).filter(|cell| !differs(*cell)).collect::<Vec<_>>(), [0]);
        assert!(!found.backdrop.allclose(&changed.backdrop, 0.0, 1e-6, false));
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let grey = Tensor::zeros([1, 1, 48, 48], (Kind::Float, Device::Cpu));
        assert!(matches!(random().forward(&grey), Err(ModelError::Input { what, .. }) if what == "pictures"));
    }
}
