//! Large pictures in bounded memory: one at a time, and each in tiles that overlap and are blended into each other.
//!
//! diffusers 0.42, `models/autoencoders/autoencoder_kl.py`: `enable_slicing`, and `enable_tiling` with `_tiled_encode`, `tiled_decode`,
//! `blend_v` and `blend_h`. A tile is as large as the pictures that the network was trained on, and overlaps the next by a quarter.

use tch::{Kind, Tensor};

use super::{Vae, VaeConfig};
use crate::error::{ModelError, Result};

/// Above so many pixels [`Vae::decode_each`] works in tiles. Here one of SD's widest feature maps takes 2 GiB in float32.
const LARGE: i64 = 1 << 21;

impl Vae {
    /// [`Vae::encode`] one picture at a time; those larger than the configuration's `sample_size` in tiles. Every tile has its own group
    /// norms and attention, so values differ a little from those of the whole.
    ///
    /// # Errors
    /// The picture does not fit, or the last tile is less than a latent's pixel; `sample_size` does not divide into tiles.
    pub fn encode_tiled(&self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check("image", image, self.config.in_channels)?;
        let tiles = Tiles::of(&self.config)?.encoding();
        let moments = each(image, |one| {
            if !tiles.exceeded_by(one)? {
                return self.moments(one);
            }
            let (f, stride) = (self.config.downscale(), tiles.stride);
            if one.size().iter().skip(2).any(|n| (n - 1) % stride + 1 < f) {
                let rule = format!("of a height and width that leave 0 or at least {f} when divided by {stride}, to be tiled");
                return Err(ModelError::argument("image", rule, format!("{:?}", one.size())));
            }
            tiles.run(one, |tile| self.moments(tile))
        })?;
        self.split(&moments)
    }

    /// [`Vae::decode`] one picture at a time; those larger than the configuration's `sample_size` in tiles. Every tile has its own group
    /// norms and attention, so values differ a little from those of the whole.
    ///
    /// # Errors
    /// The latent does not fit; `sample_size` does not divide into tiles.
    pub fn decode_tiled(&self, latent: &Tensor) -> Result<Tensor> {
        self.check("latent", latent, self.config.latent_channels)?;
        let tiles = Tiles::of(&self.config)?.decoding();
        each(latent, |one| if tiles.exceeded_by(one)? { tiles.run(one, |tile| self.picture(tile)) } else { self.picture(one) })
    }

    /// [`Vae::decode`] one picture at a time; in tiles only where a picture has more than two million pixels.
    ///
    /// # Errors
    /// As of [`Vae::decode_tiled`].
    pub fn decode_each(&self, latent: &Tensor) -> Result<Tensor> {
        self.check("latent", latent, self.config.latent_channels)?;
        let pixels = latent.size().iter().skip(2).map(|n| n * self.config.downscale()).product::<i64>();
        if pixels > LARGE { self.decode_tiled(latent) } else { each(latent, |one| self.picture(one)) }
    }
}

/// What `run` makes of each picture [1, C, H, W] of a batch.
fn each(batch: &Tensor, run: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let ones: Vec<Tensor> = (0..batch.size4()?.0).map(|i| run(&batch.f_narrow(0, i, 1)?)).collect::<Result<_>>()?;
    Ok(Tensor::f_cat(&ones, 0)?)
}

/// The side of a tile, as latent and as picture.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    latent: i64,
    picture: i64,
}

impl Tiles {
    fn of(config: &VaeConfig) -> Result<Self> {
        let (picture, f) = (config.sample_size, config.downscale());
        if picture % (4 * f) == 0 {
            return Ok(Tiles { latent: picture / f, picture });
        }
        let what = format!("tiling by a VAE whose config.json has a sample_size of {picture}, not a multiple of {},", 4 * f);
        Err(ModelError::Unsupported { what, instead: "leave tiling out".into() })
    }

    fn encoding(self) -> Grid {
        Grid::new(self.picture, self.latent)
    }

    fn decoding(self) -> Grid {
        Grid::new(self.latent, self.picture)
    }
}

/// How tiles of a network's input lie, and what is taken of its outputs.
#[derive(Clone, Copy, Debug)]
struct Grid {
    /// Side of the input's tiles.
    tile: i64,
    /// From one to the next.
    stride: i64,
    /// Rows or columns of the output that are blended with those of the tile before.
    blend: i64,
    /// Rows or columns of the output that are kept: the rest is in the next tile.
    keep: i64,
}

impl Grid {
    fn new(input: i64, output: i64) -> Self {
        let blend = output / 4;
        Grid { tile: input, stride: input - input / 4, blend, keep: output - blend }
    }

    fn exceeded_by(&self, x: &Tensor) -> Result<bool> {
        let (_, _, h, w) = x.size4()?;
        Ok(h > self.tile || w > self.tile)
    }

    /// `x` [B, C, H, W] through the network tile by tile.
    fn run(&self, x: &Tensor, network: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        let mut rows = Vec::new();
        let mut above: Vec<Tensor> = Vec::new();
        for top in starts(h, self.stride) {
            let band = x.f_narrow(2, top, self.tile.min(h - top))?;
            let mut row: Vec<Tensor> = Vec::new();
            for (column, left) in starts(w, self.stride).enumerate() {
                let mut y = network(&band.f_narrow(3, left, self.tile.min(w - left))?)?;
                if let Some(above) = above.get(column) {
                    y = blended(above, &y, 2, self.blend)?;
                }
                if let Some(left) = row.last() {
                    y = blended(left, &y, 3, self.blend)?;
                }
                row.push(y);
            }
            let kept: Vec<Tensor> = row.iter().map(|y| self.kept(y)).collect::<Result<_>>()?;
            rows.push(Tensor::f_cat(&kept, 3)?);
            above = row;
        }
        Ok(Tensor::f_cat(&rows, 2)?)
    }

    fn kept(&self, y: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = y.size4()?;
        Ok(y.f_narrow(2, 0, self.keep.min(h))?.f_narrow(3, 0, self.keep.min(w))?)
    }
}

fn starts(length: i64, stride: i64) -> impl Iterator<Item = i64> {
    (0..length).step_by(stride as usize)
}

/// `y`, its first `extent` rows (axis 2) or columns (axis 3) faded in from the last ones of the tile before.
fn blended(before: &Tensor, y: &Tensor, axis: i64, extent: i64) -> Result<Tensor> {
    let length = |x: &Tensor| x.size4().map(|(_, _, h, w)| if axis == 2 { h } else { w });
    let (old, new) = (length(before)?, length(y)?);
    let n = extent.min(old).min(new);
    let weight = Tensor::f_arange(n, (Kind::Float, y.device()))?.f_div_scalar(n as f64)?;
    let weight = if axis == 2 { weight.f_unsqueeze(1)? } else { weight };
    let (old, first) = (before.f_narrow(axis, old - n, n)?, y.f_narrow(axis, 0, n)?);
    let mixed = old.f_add(&first.f_sub(&old)?.f_mul(&weight)?)?.f_to_kind(y.kind())?;
    Ok(Tensor::f_cat(&[mixed, y.f_narrow(axis, n, new - n)?], axis)?)
}
