//! The connector's linear map: its parameters may be kept in one format and used in another.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::params::{Init, Params};

/// `y = x Wᵀ + b` in the kind of `x`, weights `weight` `[out, in]` and `bias` `[out]`. Parameters of another kind (float32 that is trained, where the
/// connector computes in bfloat16) are cast in the graph, so that their gradients come in their own.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// With PyTorch's initial values.
    pub(super) fn new(p: &Params, input: i64, output: i64) -> Result<Self> {
        Self::with_init(p, input, output, (Init::KaimingUniform, Init::Uniform { bound: (input as f64).powf(-0.5) }))
    }

    /// With chosen initial values for (weight, bias).
    pub(super) fn with_init(p: &Params, input: i64, output: i64, init: (Init, Init)) -> Result<Self> {
        Ok(Linear { weight: p.get("weight", &[output, input], init.0)?, bias: p.get("bias", &[output], init.1)? })
    }

    /// The kind that the parameters are kept in.
    pub(super) fn kind(&self) -> Kind {
        self.weight.kind()
    }

    /// `[.., in]` to `[.., out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, &self.bias)
    }
}

/// The same of parameters that are not a [`Linear`]'s.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let kind = x.f_kind()?;
    Ok(x.f_linear(&weight.f_to_kind(kind)?, Some(bias.f_to_kind(kind)?))?)
}
