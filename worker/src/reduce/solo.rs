//! A world of one: every sum is already there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use half::bf16;

use tch::Tensor;

use super::{AbortHandle, Collective, CollectiveError, Result, tensor};

/// The only rank there is.
#[derive(Debug, Default)]
pub struct Solo {
    aborted: Arc<AtomicBool>,
}

impl Solo {
    fn done(&self) -> Result<()> {
        if self.aborted.load(Ordering::Acquire) { Err(CollectiveError::Aborted) } else { Ok(()) }
    }
}

impl Collective for Solo {
    fn rank(&self) -> u32 {
        0
    }

    fn world(&self) -> u32 {
        1
    }

    fn sum_i64(&mut self, _: &mut [i64]) -> Result<()> {
        self.done()
    }

    fn sum_f32(&mut self, _: &mut [f32]) -> Result<()> {
        self.done()
    }

    fn sum_bf16(&mut self, _: &mut [bf16]) -> Result<()> {
        self.done()
    }

    fn broadcast(&mut self, root: u32, _: &mut [u8]) -> Result<()> {
        if root > 0 {
            return Err(CollectiveError::Rank { rank: root, world: 1 });
        }
        self.done()
    }

    // Wherever it lies: a GPU's is not moved.
    fn sum_tensor(&mut self, tensor: &mut Tensor) -> Result<()> {
        tensor::check_sum(tensor)?;
        self.done()
    }

    fn broadcast_tensor(&mut self, root: u32, _: &mut Tensor) -> Result<()> {
        self.broadcast(root, &mut [])
    }

    fn barrier(&mut self) -> Result<()> {
        self.done()
    }

    fn set_timeout(&mut self, _: Duration) {}

    fn abort_handle(&self) -> AbortHandle {
        let aborted = Arc::clone(&self.aborted);
        AbortHandle::new(move || {
            aborted.store(true, Ordering::Release);
            Ok(())
        })
    }
}
