//! Host memory in which a lane's rows are assembled, each copied there once, before they go to the device.
//!
//! For a GPU the memory is pinned: the GPU reads it by itself, faster, and while this thread goes on. So it must not be written again before it is
//! read. There are two pieces of it for each kind of input, used by turns: while one is copied the next lane is assembled in the other.

use super::FeedError;
use super::side::{Mark, Side};
use crate::device::bytes_of;
use tch::{Device, Kind, Tensor};

/// What is assembled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// Latents' means and log-variances.
    Moments,
    /// Features of captions.
    Features,
    /// Normal numbers: of the noise, and of the posterior.
    Normals,
    /// Decoded pictures.
    Pictures,
}

const INPUTS: usize = 4;

/// Where a lane's rows are assembled.
#[derive(Debug)]
pub(super) struct Staging {
    device: Device,
    side: Side,
    pairs: [Pair; INPUTS],
}

/// Two pieces of pinned memory, used by turns.
#[derive(Debug, Default)]
struct Pair {
    pieces: [Option<Piece>; 2],
    next: usize,
}

/// Bytes, as many as the largest batch so far, and the end of the last copy from them.
#[derive(Debug)]
struct Piece {
    pinned: Tensor,
    copied: Mark,
}

impl Staging {
    /// Copies go to the feed's stream, which the calling thread is on whenever it assembles.
    pub(super) fn new(device: Device, side: Side) -> Self {
        Self { device, side, pairs: Default::default() }
    }

    /// A tensor on the device whose bytes are written by `fill`, all of them. On a GPU it is there once the feed's stream has come so far.
    pub(super) fn assemble(
        &mut self,
        input: Input,
        (shape, kind): (&[i64], Kind),
        fill: impl FnOnce(&mut [u8]) -> Result<(), FeedError>,
    ) -> Result<Tensor, FeedError> {
        if !self.device.is_cuda() {
            let mut tensor = Tensor::f_zeros(shape, (kind, Device::Cpu))?;
            fill(bytes_of(&mut tensor, kind))?;
            return Ok(tensor);
        }
        let length = shape.iter().product::<i64>() * kind.elt_size_in_bytes() as i64;
        let piece = self.pairs[input as usize].piece(length, self.device)?;
        let mut part = piece.pinned.f_narrow(0, 0, length)?;
        fill(bytes_of(&mut part, Kind::Uint8))?;
        let rows = part.f_view_dtype(kind)?.f_reshape(shape)?.f_to_device_(self.device, kind, true, false)?;
        piece.copied = self.side.mark()?;
        Ok(rows)
    }
}

impl Pair {
    /// The next piece, long enough, from which nothing is copied any more.
    fn piece(&mut self, length: i64, device: Device) -> Result<&mut Piece, FeedError> {
        let place = &mut self.pieces[self.next];
        self.next = 1 - self.next;
        // That copy was begun two lanes ago: it is waited for only if the feed's stream is that far behind.
        if let Some(piece) = place.as_ref() {
            piece.copied.wait()?;
        }
        let there = place.take().filter(|piece| piece.pinned.size()[0] >= length);
        let piece = match there {
            Some(piece) => piece,
            None => Piece {
                pinned: Tensor::f_zeros([length], (Kind::Uint8, Device::Cpu))?.f_internal_pin_memory(device)?,
                copied: Mark::default(),
            },
        };
        Ok(place.insert(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_written_into_a_tensor_of_their_shape() {
        let mut staging = Staging::new(Device::Cpu, Side::new(Device::Cpu).unwrap());
        for input in [Input::Moments, Input::Features, Input::Normals, Input::Pictures] {
            let fill = |bytes: &mut [u8]| {
                bytes.copy_from_slice(bytemuck::cast_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]));
                Ok(())
            };
            let rows = staging.assemble(input, (&[2, 3], Kind::Float), fill).unwrap();
            assert_eq!((rows.size(), rows.double_value(&[1, 2])), (vec![2, 3], 6.0));
        }
        let failed = staging.assemble(Input::Moments, (&[1], Kind::Half), |_| Err(FeedError::Died));
        assert!(matches!(failed, Err(FeedError::Died)));
        assert_eq!(staging.pairs.len(), INPUTS);
    }
}
