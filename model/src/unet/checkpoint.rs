//! Gradient checkpointing: the text's gradient in the memory of one block's activations, for the price of a second forward pass.
//!
//! The forward pass keeps only what goes into each block. The gradient then comes back block by block: each runs again, now with a graph,
//! and hands on the gradient of what went in. Blocks before the first that takes the text are left out.

use tch::{Kind, Tensor};

use super::blocks::{Condition, DownBlock, MidBlock, UpBlock};
use super::{Added, UNet};
use crate::error::Result;
use crate::layers::inner_product;

/// A part of the network that is run again as a whole.
#[derive(Clone, Copy, Debug)]
enum Segment<'a> {
    Down(&'a DownBlock),
    Mid(&'a MidBlock),
    Up(&'a UpBlock),
    Last(&'a UNet),
}

impl Segment<'_> {
    /// The feature map after it. Only the way down adds `skips`, at the end, and only the way up takes them, off the end.
    fn run(self, x: Tensor, c: Condition, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        match self {
            Segment::Down(block) => block.forward(x, c, skips),
            Segment::Mid(block) => block.forward(&x, c),
            Segment::Up(block) => block.forward(x, c, skips),
            Segment::Last(unet) => unet.finish(&x),
        }
    }

    /// Whether it takes the text. The middle always does: those after it are not asked.
    fn attends(self) -> bool {
        match self {
            Segment::Down(block) => block.attends(),
            Segment::Mid(_) | Segment::Up(_) | Segment::Last(_) => true,
        }
    }
}

/// What goes into a segment, or comes out of it, or the gradient of that.
#[derive(Debug)]
struct State {
    x: Tensor,
    skips: Vec<Tensor>,
}

/// A prediction, and what its gradients are made from.
#[derive(Debug)]
pub struct Checkpointed<'a> {
    segments: Vec<Segment<'a>>,
    /// What goes into each segment.
    states: Vec<State>,
    prediction: Tensor,
    text: Tensor,
    text_kind: Kind,
    time: Tensor,
    /// The pooled text, and the time embedding with its graph from there, where the gradient of the pooled text is wanted.
    pooled: Option<(Tensor, Tensor)>,
}

/// The gradients of Σ prediction · `grad_prediction`, each in the kind of its tensor.
#[derive(Debug)]
pub struct Gradients {
    /// Of the text features, [B, L, D].
    pub hidden_states: Tensor,
    /// Of the pooled text [B, P], if it requires gradients.
    pub text_embeds: Option<Tensor>,
}

impl UNet {
    /// [`UNet::forward_added`], keeping no graph but what [`Checkpointed::gradients`] needs; the inputs' graphs end here.
    ///
    /// # Errors
    /// As there.
    pub fn forward_checkpointed(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        hidden_states: &Tensor,
        added: Option<&Added>,
    ) -> Result<Checkpointed<'_>> {
        let added = added.map(detached).transpose()?;
        let pooled = added.as_ref().map(|added| &added.text_embeds).filter(|embeds| embeds.requires_grad());
        let start = self.start(&sample.f_detach()?, timesteps, &hidden_states.f_detach()?, added.as_ref())?;
        let time = start.time.f_detach()?.f_set_requires_grad(pooled.is_some())?;
        let text = start.text.f_detach()?.f_set_requires_grad(true)?;
        let pooled = pooled.map(|embeds| (embeds.shallow_clone(), start.time));

        let mut segments: Vec<Segment> = self.down_blocks.iter().map(Segment::Down).collect();
        segments.push(Segment::Mid(&self.mid_block));
        segments.extend(self.up_blocks.iter().map(Segment::Up));
        segments.push(Segment::Last(self));
        let (mut x, mut skips) = (start.x.shallow_clone(), vec![start.x]);
        let mut states = Vec::with_capacity(segments.len());
        let c = Condition { time: &time, text: &text };
        for segment in &segments {
            states.push(State { x: x.shallow_clone(), skips: skips.iter().map(Tensor::shallow_clone).collect() });
            x = tch::no_grad(|| segment.run(x, c, &mut skips))?;
        }
        Ok(Checkpointed { segments, states, prediction: x, text, text_kind: hidden_states.kind(), time, pooled })
    }
}

/// The same conditions at the start of a graph, which is made if theirs was to be.
fn detached(added: &Added) -> Result<Added> {
    let wanted = added.text_embeds.requires_grad();
    let text_embeds = added.text_embeds.f_detach()?.f_set_requires_grad(wanted)?;
    Ok(Added { text_embeds, time_ids: added.time_ids.shallow_clone() })
}

impl Checkpointed<'_> {
    /// The prediction, [B, Cout, H, W] in the network's kind, without a graph.
    pub fn prediction(&self) -> &Tensor {
        &self.prediction
    }

    /// The gradients for a gradient of the prediction, of its shape. They are added up over blocks in float32.
    ///
    /// # Errors
    /// The shape is another.
    pub fn gradients(self, grad_prediction: &Tensor) -> Result<Gradients> {
        let Self { segments, states, prediction, text, text_kind, time, pooled } = self;
        if grad_prediction.size() != prediction.size() {
            return Err(super::misshapen("grad_prediction", format!("{:?}", prediction.size()), grad_prediction));
        }
        // The pooled text goes into every block, by the time embedding.
        let first = if pooled.is_some() { 0 } else { segments.iter().take_while(|segment| !segment.attends()).count() };
        let mut sums = Sums { text: zeros(&text)?, time: zeros(&time)? };
        let mut grad = State { x: grad_prediction.shallow_clone(), skips: Vec::new() };
        let c = Condition { time: &time, text: &text };
        // From behind, each state let go when its segment is done.
        for (index, (segment, state)) in segments.into_iter().zip(states).enumerate().skip(first).rev() {
            grad = backward(segment, (state, index > first), c, grad, &mut sums)?;
        }
        let by_pooled = |(embeds, time): (Tensor, Tensor)| -> Result<Tensor> {
            let root = inner_product(&time, &sums.time)?;
            Ok(Tensor::f_run_backward(&[root], &[embeds], false, false)?.swap_remove(0))
        };
        Ok(Gradients { hidden_states: sums.text.f_to_kind(text_kind)?, text_embeds: pooled.map(by_pooled).transpose()? })
    }
}

/// The gradients of the conditions so far, in float32.
struct Sums {
    text: Tensor,
    time: Tensor,
}

fn zeros(like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_zeros(like.size(), (Kind::Float, like.device()))?)
}

/// From the gradient of what comes out of a segment to that of what goes in, which is `state`; and the conditions' to `sums`. Where the
/// gradient is not to go on, `through` is false and what is returned means nothing.
fn backward(segment: Segment, (state, through): (State, bool), c: Condition, mut grad: State, sums: &mut Sums) -> Result<State> {
    let leaf = |tensor: &Tensor| tensor.f_detach()?.f_set_requires_grad(through);
    let x = leaf(&state.x)?;
    let skips: Vec<Tensor> = state.skips.iter().map(leaf).collect::<std::result::Result<_, _>>()?;
    let mut after = skips.iter().map(Tensor::shallow_clone).collect();
    let y = segment.run(x.shallow_clone(), c, &mut after)?;

    // Skips that were there before and still are have nothing to do with this segment.
    let kept = skips.len().min(after.len());
    let mut root = inner_product(&y, &grad.x)?;
    for (skip, grad) in after.iter().zip(&grad.skips).skip(kept) {
        root = root.f_add(&inner_product(skip, grad)?)?;
    }
    let conditions = [(c.text, &mut sums.text), (c.time, &mut sums.time)].into_iter().filter(|(leaf, _)| leaf.requires_grad());
    let (mut leaves, conditions): (Vec<&Tensor>, Vec<&mut Tensor>) = conditions.unzip();
    if through {
        leaves.push(&x);
        leaves.extend(&skips[kept..]);
    }
    let mut found = Tensor::f_run_backward(&[root], &leaves, false, false)?.into_iter();
    for (sum, found) in conditions.into_iter().zip(&mut found) {
        // Undefined is what this segment does not depend on.
        if found.defined() {
            let _ = sum.f_add_(&found.f_to_kind(Kind::Float)?)?;
        }
    }
    grad.skips.truncate(kept);
    if let Some(by_x) = found.next() {
        grad.x = by_x;
        grad.skips.extend(found);
    }
    Ok(grad)
}
