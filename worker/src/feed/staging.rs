//! Host memory in which a lane's rows are assembled, each copied there once, before they go to the device.

use super::FeedError;
use crate::device::bytes_of;
use tch::{Device, Kind, Tensor};

/// Where a lane's rows are assembled. For a GPU the memory is pinned, which the GPU reads by itself and faster, and used again and again.
#[derive(Debug)]
pub(super) struct Staging {
    device: Device,
    /// Bytes, as many as the largest batch so far.
    pinned: Option<Tensor>,
}

impl Staging {
    pub(super) fn new(device: Device) -> Self {
        Self { device, pinned: None }
    }

    /// A tensor on the device whose bytes are written by `fill`, all of them.
    pub(super) fn assemble(
        &mut self,
        shape: &[i64],
        kind: Kind,
        fill: impl FnOnce(&mut [u8]) -> Result<(), FeedError>,
    ) -> Result<Tensor, FeedError> {
        if !self.device.is_cuda() {
            let mut tensor = Tensor::f_zeros(shape, (kind, Device::Cpu))?;
            fill(bytes_of(&mut tensor, kind))?;
            return Ok(tensor);
        }
        let length = shape.iter().product::<i64>() * kind.elt_size_in_bytes() as i64;
        let mut part = self.pinned(length)?.f_narrow(0, 0, length)?;
        fill(bytes_of(&mut part, Kind::Uint8))?;
        // Returns when the copy is done: the memory may be written again.
        Ok(part.f_view_dtype(kind)?.f_reshape(shape)?.f_to_device(self.device)?)
    }

    fn pinned(&mut self, length: i64) -> Result<&Tensor, FeedError> {
        let there = self.pinned.take().filter(|pinned| pinned.size()[0] >= length);
        let pinned = match there {
            Some(pinned) => pinned,
            None => Tensor::f_zeros([length], (Kind::Uint8, Device::Cpu))?.f_pin_memory(self.device)?,
        };
        Ok(self.pinned.insert(pinned))
    }
}
