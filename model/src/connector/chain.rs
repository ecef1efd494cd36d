//! A forward pass as a chain of segments, whose gradient is made one segment at a time, the last first: what a segment's parameters get is then
//! known, and can be on its way to other machines, while the segments before it are still at work.
//!
//! Between two segments the graph is cut: the later one begins from a leaf with the same values. What the first segment makes besides, and all blocks
//! look at (the projected text, the time embedding), is a leaf too; what the blocks give back for it is added up, the last block's first.

use tch::Tensor;

use crate::error::{ModelError, Result};
use crate::layers::inner_product;

/// The end of one segment, and the beginning of the next.
#[derive(Debug)]
struct Cut {
    /// With the graph of what made it.
    made: Tensor,
    /// The same values, without.
    leaf: Tensor,
}

impl Cut {
    fn new(made: Tensor) -> Result<Self> {
        let leaf = made.f_detach()?.f_set_requires_grad(true)?;
        Ok(Cut { made, leaf })
    }
}

/// The cuts of a pass, if it is to be cut.
#[derive(Debug)]
pub(super) struct Chain {
    cutting: bool,
    /// What every segment after the first looks at.
    shared: Vec<Cut>,
    /// The end of each segment, in order.
    ends: Vec<Cut>,
}

impl Chain {
    /// Of one graph.
    pub(super) fn whole() -> Self {
        Chain { cutting: false, shared: Vec::new(), ends: Vec::new() }
    }

    /// Of segments.
    pub(super) fn cut() -> Self {
        Chain { cutting: true, ..Chain::whole() }
    }

    /// In the first segment: what all later ones look at, as they see it.
    pub(super) fn share(&mut self, made: Tensor) -> Result<Tensor> {
        if !self.cutting {
            return Ok(made);
        }
        let cut = Cut::new(made)?;
        let leaf = cut.leaf.shallow_clone();
        self.shared.push(cut);
        Ok(leaf)
    }

    /// Ends a segment: what it hands on, as the next sees it.
    pub(super) fn end(&mut self, made: Tensor) -> Result<Tensor> {
        if !self.cutting {
            return Ok(made);
        }
        let cut = Cut::new(made)?;
        let leaf = cut.leaf.shallow_clone();
        self.ends.push(cut);
        Ok(leaf)
    }

    /// The gradients of each segment's parameters, the last segment first. `gradient`: of what the last segment handed on. `parameters`: each
    /// segment's, in order. A segment's graph is gone when its gradients are handed to `done` with its number.
    pub(super) fn backward<E: From<ModelError>>(
        mut self,
        mut gradient: Tensor,
        parameters: &[&[Tensor]],
        mut done: impl FnMut(usize, Vec<Tensor>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut shared: Vec<Option<Tensor>> = self.shared.iter().map(|_| None).collect();
        while let Some(Cut { made, .. }) = self.ends.pop() {
            let own = parameters.get(self.ends.len()).copied().unwrap_or_default();
            let mut gradients = match self.ends.last() {
                Some(before) => {
                    let leaves = own.iter().chain([&before.leaf]).chain(self.shared.iter().map(|cut| &cut.leaf));
                    let mut gradients = backward(&[root(&made, &gradient)?], leaves)?;
                    let rest = gradients.split_off(own.len() + 1);
                    add_up(&mut shared, rest)?;
                    gradients
                }
                None => backward(&self.roots(&made, &gradient, &shared)?, own.iter())?,
            };
            if gradients.len() > own.len()
                && let Some(before) = gradients.pop()
            {
                gradient = before;
            }
            drop(made);
            done(self.ends.len(), gradients)?;
        }
        Ok(())
    }

    /// Where the first segment's gradients begin: at what it handed on, and at what it shared.
    fn roots(&self, made: &Tensor, gradient: &Tensor, shared: &[Option<Tensor>]) -> Result<Vec<Tensor>> {
        let looked_at = self.shared.iter().zip(shared).filter_map(|(cut, gradient)| Some((&cut.made, gradient.as_ref()?)));
        std::iter::once((made, gradient)).chain(looked_at).map(|(made, gradient)| root(made, gradient)).collect()
    }
}

/// A number whose gradient by `made` is `gradient`.
fn root(made: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    inner_product(made, gradient)
}

/// The gradients of the roots' sum by `leaves`.
pub(super) fn backward<'a>(roots: &[Tensor], leaves: impl Iterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
    Ok(Tensor::f_run_backward(roots, &leaves.collect::<Vec<_>>(), false, false)?)
}

fn add_up(sums: &mut [Option<Tensor>], more: Vec<Tensor>) -> Result<()> {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum = Some(match sum.take() {
            Some(sum) => sum.f_add(&more)?,
            None => more,
        });
    }
    Ok(())
}
