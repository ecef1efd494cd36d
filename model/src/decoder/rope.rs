//! Rotary positions: pairs of a head's channels turned by an angle that grows with the position.
//!
//! Follows transformers' `LlamaRotaryEmbedding` and `modeling_rope_utils.py`
//! (<https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py>). Letters as in the module above.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::Result;

/// How fast channels turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The slowest channel's wavelength is about 2π times this.
    pub theta: f64,
    /// How frequencies were changed to stretch the positions.
    pub scaling: Scaling,
}

/// How frequencies are changed after training on shorter texts.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low ones divided by a factor, high ones kept, and a smooth change between (LLaMA 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// A wavelength above `context` / `low` is low.
        low: f64,
        /// A wavelength below `context` / `high` is high.
        high: f64,
        /// The longest text before.
        context: f64,
    },
}

/// Cosine and sine of every position's angles, `[S, K]` each.
pub(super) type Rotation = (Tensor, Tensor);

impl Rope {
    /// Reads transformers 5's `rope_parameters`, or `rope_theta` and `rope_scaling` of older configurations.
    pub(super) fn read(c: &ConfigFile, max_positions: i64) -> Result<Self> {
        let outer: Option<f64> = c.get("rope_theta", POSITIVE)?;
        if outer.is_some_and(|theta| theta <= 0.0) {
            return Err(c.refuse("rope_theta", POSITIVE));
        }
        c.only("partial_rotary_factor", &[json!(1)])?;
        let field = match (c.value("rope_scaling"), c.value("rope_parameters")) {
            (Some(_), Some(_)) => return Err(c.refuse("rope_scaling", "absent where rope_parameters is there")),
            (Some(_), None) => "rope_scaling",
            (None, _) => "rope_parameters",
        };
        let fields: Map<String, Value> = c.optional(field, "an object", Map::new())?;
        // Under their full names, as errors give them.
        let fields = fields.into_iter().map(|(key, value)| (format!("{field}.{key}"), value)).collect();
        let inner = Inner { file: ConfigFile::from_map(c.file(), fields), field };
        let theta = inner.number("rope_theta", outer.or(Some(10_000.0)))?;
        let scaling = inner.scaling(max_positions)?;
        inner.file.only(&inner.name("partial_rotary_factor"), &[json!(1)])?;
        inner.file.finish(&[])?;
        Ok(Rope { theta, scaling })
    }

    /// The rotation of `s` positions of heads of `width` channels, computed in float32 and given in `kind`.
    pub(super) fn rotation(&self, s: i64, width: i64, (kind, device): (Kind, Device)) -> Result<Rotation> {
        let places = Tensor::f_arange(s, (Kind::Float, device))?.f_unsqueeze(1)?;
        let angles = places.f_mul(&self.frequencies(width, device)?.f_unsqueeze(0)?)?; // [S, K / 2]
        let angles = Tensor::f_cat(&[&angles, &angles], 1)?;
        Ok((angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?))
    }

    /// `[K / 2]` float32, step by step as transformers does it: far positions multiply the last bit.
    fn frequencies(&self, width: i64, device: Device) -> Result<Tensor> {
        let exponents = Tensor::f_arange_start_step(0, width, 2, (Kind::Float, device))?.f_div_scalar(width)?;
        let plain = Tensor::f_pow_scalar(self.theta, &exponents)?.f_reciprocal()?;
        match self.scaling {
            Scaling::None => Ok(plain),
            Scaling::Linear { factor } => Ok(plain.f_div_scalar(factor)?),
            Scaling::Llama3 { factor, low, high, context } => {
                let wavelengths = plain.f_reciprocal()?.f_mul_scalar(TAU)?;
                let slowed = plain.f_div_scalar(factor)?;
                // 1 where the wavelength is high's limit, 0 where it is low's.
                let share = wavelengths.f_reciprocal()?.f_mul_scalar(context)?.f_sub_scalar(low)?.f_div_scalar(high - low)?;
                let share = share.f_clamp(0.0, 1.0)?;
                let kept = plain.f_mul(&share)?;
                Ok(slowed.f_mul(&share.f_neg()?.f_add_scalar(1)?)?.f_add(&kept)?)
            }
        }
    }
}

const POSITIVE: &str = "a number above 0";

/// The object of rotary settings inside a configuration.
struct Inner {
    file: ConfigFile,
    field: &'static str,
}

impl Inner {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.field)
    }

    /// A positive number, which must be there unless it has a default.
    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let name = self.name(key);
        let found: Option<f64> = self.file.get(&name, POSITIVE)?;
        found.or(default).filter(|number| *number > 0.0 && number.is_finite()).ok_or_else(|| self.file.refuse(&name, POSITIVE))
    }

    fn scaling(&self, max_positions: i64) -> Result<Scaling> {
        let rule = "default, linear or llama3";
        // The older name counts where the newer one is absent.
        let older: Option<String> = self.file.get(&self.name("type"), rule)?;
        let newer: Option<String> = self.file.get(&self.name("rope_type"), rule)?;
        let key = if newer.is_some() { "rope_type" } else { "type" };
        match newer.or(older).as_deref() {
            None | Some("default") => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear { factor: self.number("factor", None)? }),
            Some("llama3") => {
                let (low, high) = (self.number("low_freq_factor", None)?, self.number("high_freq_factor", None)?);
                if high <= low {
                    return Err(self.file.refuse(&self.name("high_freq_factor"), "above low_freq_factor"));
                }
                let context = self.number("original_max_position_embeddings", Some(max_positions as f64))?;
                Ok(Scaling::Llama3 { factor: self.number("factor", None)?, low, high, context })
            }
            Some(_) => Err(self.file.refuse(&self.name(key), rule)),
        }
    }
}

/// Turns the pairs of channels (n, n + K / 2) of `x` `[B, heads, S, K]`.
pub(super) fn rotate(x: &Tensor, (cos, sin): &Rotation) -> Result<Tensor> {
    let half = cos.size().last().copied().unwrap_or_default() / 2;
    let (a, b) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
    let turned = Tensor::f_cat(&[b.f_neg()?, a], -1)?;
    Ok(x.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?)
}
