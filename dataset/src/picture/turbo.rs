//! libjpeg-turbo behind a safe face: its TurboJPEG interface, which keeps libjpeg's long jumps on the C side.

use std::ffi::{c_int, c_ulong, c_void};
use std::fmt;
use std::ptr::NonNull;

use turbojpeg_sys as tj;

use super::frame::Part;

/// What a decoder writes for a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channels {
    Rgb,
    Cmyk,
}

impl Channels {
    /// Bytes a pixel.
    pub(super) fn count(self) -> usize {
        match self {
            Channels::Rgb => 3,
            Channels::Cmyk => 4,
        }
    }

    fn format(self) -> c_int {
        match self {
            Channels::Rgb => tj::TJPF_TJPF_RGB,
            Channels::Cmyk => tj::TJPF_TJPF_CMYK,
        }
    }
}

/// How far chroma is subsampled, as far as decoding in parts must know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sampling {
    /// Width of the unit that a part's left edge must be a multiple of, pixels before shrinking.
    pub(super) unit: u32,
    /// Coefficients for every pixel, of all components.
    pub(super) coefficients: f64,
}

/// What a JPEG's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) size: (u32, u32),
    pub(super) channels: Channels,
    /// None: an unusual one, which can only be decoded whole.
    pub(super) sampling: Option<Sampling>,
    pub(super) progressive: bool,
    /// 8-bit and lossy, as all but medical pictures are.
    pub(super) usual: bool,
}

/// A TurboJPEG instance.
struct Handle(NonNull<c_void>);

// SAFETY: an instance is memory of its own, bound to no thread; `&mut` keeps it to one thread at a time.
unsafe impl Send for Handle {}

impl Handle {
    fn new(kind: u32) -> Option<Handle> {
        // SAFETY: takes any number, and gives null for a wrong one or where there is no memory.
        NonNull::new(unsafe { tj::tj3Init(kind as c_int) }).map(Handle)
    }

    fn set(&mut self, parameter: u32, value: c_int) -> Option<()> {
        // SAFETY: the instance is alive; unknown parameters and values are reported.
        (unsafe { tj::tj3Set(self.0.as_ptr(), parameter as c_int, value) } == 0).then_some(())
    }

    fn get(&mut self, parameter: u32) -> c_int {
        // SAFETY: the instance is alive; unknown parameters are reported.
        unsafe { tj::tj3Get(self.0.as_ptr(), parameter as c_int) }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by tj3Init, and destroyed once.
        unsafe { tj::tj3Destroy(self.0.as_ptr()) }
    }
}

/// A JPEG decoder, to be used again and again. It refuses what libjpeg would only warn of: data that is missing or corrupt.
pub(super) struct Decoder(Handle);

impl Decoder {
    /// One whose progressive pictures may have `most_scans` scans and `megabytes` of coefficients. None: no memory.
    pub(super) fn new(most_scans: u16, megabytes: u16) -> Option<Decoder> {
        let mut handle = Handle::new(tj::TJINIT_TJINIT_DECOMPRESS)?;
        handle.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 1)?;
        handle.set(tj::TJPARAM_TJPARAM_SCANLIMIT, most_scans.into())?;
        handle.set(tj::TJPARAM_TJPARAM_MAXMEMORY, megabytes.into())?;
        Some(Decoder(handle))
    }

    /// Reads a header. None: it is broken.
    pub(super) fn open<'a>(&'a mut self, bytes: &'a [u8]) -> Option<Opened<'a>> {
        let length = c_ulong::try_from(bytes.len()).ok()?;
        // SAFETY: the instance is alive, and reads `length` bytes of `bytes`.
        let status = unsafe { tj::tj3DecompressHeader(self.0.0.as_ptr(), bytes.as_ptr(), length) };
        let mut get = |parameter| u32::try_from(self.0.get(parameter)).ok();
        let size = (get(tj::TJPARAM_TJPARAM_JPEGWIDTH)?, get(tj::TJPARAM_TJPARAM_JPEGHEIGHT)?);
        let colours = get(tj::TJPARAM_TJPARAM_COLORSPACE)?;
        let cmyk = colours == tj::TJCS_TJCS_CMYK || colours == tj::TJCS_TJCS_YCCK;
        let header = Header {
            size,
            channels: if cmyk { Channels::Cmyk } else { Channels::Rgb },
            sampling: sampling(self.0.get(tj::TJPARAM_TJPARAM_SUBSAMP), cmyk),
            progressive: self.0.get(tj::TJPARAM_TJPARAM_PROGRESSIVE) == 1,
            usual: self.0.get(tj::TJPARAM_TJPARAM_PRECISION) == 8 && self.0.get(tj::TJPARAM_TJPARAM_LOSSLESS) == 0,
        };
        (status == 0 && size.0 > 0 && size.1 > 0).then_some(Opened { decoder: self, bytes, header })
    }
}

fn sampling(kind: c_int, cmyk: bool) -> Option<Sampling> {
    let (unit, coefficients) = match kind {
        tj::TJSAMP_TJSAMP_444 => (8, 3.0),
        tj::TJSAMP_TJSAMP_422 | tj::TJSAMP_TJSAMP_440 => (16, 2.0),
        tj::TJSAMP_TJSAMP_420 => (16, 1.5),
        tj::TJSAMP_TJSAMP_411 | tj::TJSAMP_TJSAMP_441 => (32, 1.5),
        tj::TJSAMP_TJSAMP_GRAY => (8, 1.0),
        _ => return None,
    };
    Some(Sampling { unit, coefficients: coefficients + if cmyk { 1.0 } else { 0.0 } })
}

/// A JPEG whose header has been read.
pub(super) struct Opened<'a> {
    decoder: &'a mut Decoder,
    bytes: &'a [u8],
    /// What it says.
    pub(super) header: Header,
}

impl Opened<'_> {
    /// Decodes a part (shrunk by 1, 2, 4 or 8) into `out`, which is resized to its pixels. All data is read, also what lies beyond the
    /// part, so that no broken picture passes. None: it is broken, or the part is not one that can be decoded.
    pub(super) fn decode(&mut self, part: &Part, out: &mut Vec<u8>) -> Option<()> {
        let whole = Part::whole(self.header.size, part.shrink);
        let inside = |first: u32, length: u32, all: u32| length > 0 && first.checked_add(length).is_some_and(|end| end <= all);
        if !inside(part.left, part.width, whole.width) || !inside(part.top, part.height, whole.height) {
            return None;
        }
        let region = if *part == whole { [0; 4] } else { [part.left, part.top, part.width, part.height] };
        let [x, y, w, h] = region.map(|pixels| pixels as c_int);
        let channels = self.header.channels;
        let pitch = part.width as usize * channels.count();
        out.resize(pitch * part.height as usize, 0);
        let (pitch, length) = (c_int::try_from(pitch).ok()?, c_ulong::try_from(self.bytes.len()).ok()?);
        let handle = self.decoder.0.0.as_ptr();
        let (num, denom) = (1, part.shrink as c_int);
        // SAFETY: the instance is alive. The region of the picture before goes first, then factor and region are set and checked against
        // the header of these same bytes. With that region the decoder writes `part.height` rows of `part.width` pixels, `pitch` bytes
        // apart, and without one all rows of the shrunk picture, whose size `whole` is: in both cases what `out` has room for.
        let status = unsafe {
            tj::tj3SetCroppingRegion(handle, tj::tjregion { x: 0, y: 0, w: 0, h: 0 })
                | tj::tj3SetScalingFactor(handle, tj::tjscalingfactor { num, denom })
                | tj::tj3SetCroppingRegion(handle, tj::tjregion { x, y, w, h })
        };
        if status != 0 {
            return None;
        }
        // SAFETY: as above.
        let status = unsafe { tj::tj3Decompress8(handle, self.bytes.as_ptr(), length, out.as_mut_ptr(), pitch, channels.format()) };
        (status == 0).then_some(())
    }
}

/// A JPEG encoder, to be used again and again.
pub(super) struct Encoder(Handle);

impl Encoder {
    /// One that subsamples chroma 4:2:0. None: no memory.
    pub(super) fn new() -> Option<Encoder> {
        let mut handle = Handle::new(tj::TJINIT_TJINIT_COMPRESS)?;
        handle.set(tj::TJPARAM_TJPARAM_SUBSAMP, tj::TJSAMP_TJSAMP_420)?;
        handle.set(tj::TJPARAM_TJPARAM_NOREALLOC, 1)?;
        Some(Encoder(handle))
    }

    /// Encodes RGB pixels (`[height, width, 3]`) into `room`, and says how many bytes of it they took. None: not of that length, too
    /// large for a JPEG, or not a quality of 1 to 100.
    pub(super) fn encode(&mut self, rgb: &[u8], (width, height): (u32, u32), quality: u8, room: &mut Vec<u8>) -> Option<usize> {
        if rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            return None;
        }
        self.0.set(tj::TJPARAM_TJPARAM_QUALITY, quality.into())?;
        let (width, height) = (c_int::try_from(width).ok()?, c_int::try_from(height).ok()?);
        // SAFETY: arithmetic; 0 stands for an error.
        let most = unsafe { tj::tj3JPEGBufSize(width, height, tj::TJSAMP_TJSAMP_420) };
        let most = (most > 0).then_some(most)?;
        room.resize(usize::try_from(most).ok()?, 0);
        let (mut to, mut length) = (room.as_mut_ptr(), most);
        // SAFETY: the instance is alive and reads `width × height × 3` bytes of `rgb`, which has them. It writes to `room`, which is as
        // large as the library asks for at this size, and which it may not reallocate (NOREALLOC).
        let status =
            unsafe { tj::tj3Compress8(self.0.0.as_ptr(), rgb.as_ptr(), width, 0, height, tj::TJPF_TJPF_RGB, &mut to, &mut length) };
        (status == 0).then_some(usize::try_from(length).ok()?)
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoder")
    }
}
