//! The few calls of the CUDA driver that a communicator needs around it: which GPU this is, making it current, a stream of its own, and events
//! that order streams and tell how long something took.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::sys::{self, Cuda};

/// A stream on which work is ordered. It is borrowed: whoever made it keeps it alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(sys::Stream);

impl Stream {
    /// The legacy default stream, on which torch works unless told otherwise.
    pub const DEFAULT: Self = Self(std::ptr::null_mut());

    /// Borrows a stream that another library made.
    ///
    /// # Safety
    /// `raw` is a `CUstream` (or `cudaStream_t`) of the device that it is used with, and outlives every use.
    pub unsafe fn from_raw(raw: *mut c_void) -> Self {
        Self(raw)
    }

    pub(crate) fn raw(self) -> sys::Stream {
        self.0
    }
}

/// The loaded driver. Cheap to clone; never unloaded.
#[derive(Clone)]
pub struct Driver(Arc<Cuda>);

impl Driver {
    /// Loads and initialises the driver.
    ///
    /// # Errors
    /// [`Error::Absent`] on a machine without an NVIDIA driver; [`Error::Cuda`] on one whose driver does not start.
    pub fn load() -> Result<Self, Error> {
        let opened = std::mem::ManuallyDrop::new(sys::open(Cuda::LIBRARY, &[PathBuf::from(Cuda::LIBRARY)])?);
        let driver = Self(Arc::new(Cuda::load(&opened)?));
        // SAFETY: takes no pointer; may be called any number of times.
        driver.check("cuInit", unsafe { (driver.0.init)(0) })?;
        Ok(driver)
    }

    /// The newest CUDA that this driver can run, as (major, minor).
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn version(&self) -> Result<(u32, u32), Error> {
        let mut code: c_int = 0;
        // SAFETY: the pointer is to a live integer, which the call fills.
        self.check("cuDriverGetVersion", unsafe { (self.0.driver_version)(&raw mut code) })?;
        let code = u32::try_from(code).unwrap_or(0);
        Ok((code / 1000, code % 1000 / 10))
    }

    /// The number of GPUs that this process may use.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn device_count(&self) -> Result<u32, Error> {
        let mut count: c_int = 0;
        // SAFETY: the pointer is to a live integer, which the call fills.
        self.check("cuDeviceGetCount", unsafe { (self.0.device_count)(&raw mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The GPU of this number, in the order that torch uses too (`CUDA_VISIBLE_DEVICES` holds for both).
    ///
    /// # Errors
    /// [`Error::Cuda`], for instance where there are not so many.
    pub fn device(&self, ordinal: u32) -> Result<Device, Error> {
        let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        let (mut id, mut uuid, mut name, mut context) = (0, [0; 16], [0; 256], std::ptr::null_mut());
        // SAFETY: each pointer is to a live value of the type and length that the call fills; the driver has been initialised.
        unsafe {
            self.check("cuDeviceGet", (self.0.device_get)(&raw mut id, index))?;
            self.check("cuDeviceGetUuid", (self.0.device_uuid)(&raw mut uuid, id))?;
            self.check("cuDeviceGetName", (self.0.device_name)(name.as_mut_ptr(), 255, id))?;
            self.check("cuDevicePrimaryCtxRetain", (self.0.primary_retain)(&raw mut context, id))?;
        }
        Ok(Device { driver: self.clone(), id, context: Context(context), uuid, name: sys::text(name.as_ptr()) })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        if code == sys::SUCCESS {
            return Ok(());
        }
        let mut chars = std::ptr::null();
        // SAFETY: any code may be asked for; the pointer is to a live pointer, which the call fills or leaves null.
        unsafe { (self.0.error_string)(code, &raw mut chars) };
        Err(Error::Cuda { call, code, text: sys::text(chars) })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Driver").field(&Cuda::LIBRARY).finish()
    }
}

/// A device's primary context, the one that torch uses too. Kept for the life of the process.
#[derive(Clone, Copy, Debug)]
struct Context(*mut c_void);

// SAFETY: a context is a handle into the driver, which takes it from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; the handle itself is never written.
unsafe impl Sync for Context {}

/// One GPU.
#[derive(Clone, Debug)]
pub struct Device {
    driver: Driver,
    id: c_int,
    context: Context,
    uuid: [u8; 16],
    name: String,
}

impl Device {
    /// The bytes that tell this GPU from every other (a MIG slice has its own).
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability, as (9, 0), and its number of multiprocessors: libraries choose their kernels by both.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn architecture(&self) -> Result<((c_int, c_int), c_int), Error> {
        let mut found = [0; 3];
        for (value, attribute) in found.iter_mut().zip([sys::CAPABILITY_MAJOR, sys::CAPABILITY_MINOR, sys::MULTIPROCESSORS]) {
            // SAFETY: the pointer is to a live integer, which the call fills; the driver gave the device's number.
            self.driver.check("cuDeviceGetAttribute", unsafe { (self.driver.0.device_attribute)(value, attribute, self.id) })?;
        }
        let [major, minor, multiprocessors] = found;
        Ok(((major, minor), multiprocessors))
    }

    /// Its memory in bytes: what is free now, of how much. The device becomes the calling thread's current one.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to live integers, which the call fills.
        self.driver.check("cuMemGetInfo", unsafe { (self.driver.0.memory)(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    /// Makes this GPU the calling thread's current one, for the driver, NCCL and torch alike.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn make_current(&self) -> Result<(), Error> {
        // SAFETY: the context was retained when this value was made, and is never released.
        self.driver.check("cuCtxSetCurrent", unsafe { (self.driver.0.set_current)(self.context.0) })
    }

    /// A new stream of this GPU whose work goes before that of others, where some of it must wait. No other stream waits for it, the legacy default
    /// stream neither: use events. The device becomes the calling thread's current one.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn urgent_stream(&self) -> Result<OwnedStream, Error> {
        self.make_current()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the pointers are to live integers, which the call fills; a context is current.
        let code = unsafe { (self.driver.0.stream_priorities)(&raw mut least, &raw mut greatest) };
        self.driver.check("cuCtxGetStreamPriorityRange", code)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a live pointer, which the call fills.
        let code = unsafe { (self.driver.0.stream_create)(&raw mut raw, sys::STREAM_NON_BLOCKING, greatest) };
        self.driver.check("cuStreamCreateWithPriority", code)?;
        Ok(OwnedStream { device: self.clone(), stream: Stream(raw) })
    }

    /// Has what is put on `stream` from now on wait for `event`, on the device: the calling thread does not wait. The device must be current.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn wait(&self, stream: Stream, event: &Event) -> Result<(), Error> {
        // SAFETY: both are alive, the stream by `Stream`'s contract. The driver takes the event's present state: it may be dropped afterwards.
        self.driver.check("cuStreamWaitEvent", unsafe { (self.driver.0.stream_wait)(stream.raw(), event.raw, 0) })
    }

    /// Marks the end of all work on `stream` so far. The device must be current.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn record(&self, stream: Stream) -> Result<Event, Error> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a live pointer, which the call fills.
        self.driver.check("cuEventCreate", unsafe { (self.driver.0.event_create)(&raw mut raw, sys::EVENT_TIMED) })?;
        let event = Event { driver: self.driver.clone(), raw };
        // SAFETY: the event was just made, and the stream is alive by `Stream`'s contract.
        self.driver.check("cuEventRecord", unsafe { (self.driver.0.event_record)(raw, stream.raw()) })?;
        Ok(event)
    }
}

/// A stream that [`Device::urgent_stream`] made, and that goes when this is dropped; the driver lets its work finish first.
#[derive(Debug)]
pub struct OwnedStream {
    device: Device,
    stream: Stream,
}

// SAFETY: a stream is a handle into the driver, which takes it from any thread.
unsafe impl Send for OwnedStream {}

impl OwnedStream {
    /// The stream, for as long as this lives.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        // It belongs to the device's context, which need not be this thread's.
        if self.device.make_current().is_ok() {
            // SAFETY: the stream is alive, and this is its last use.
            unsafe { (self.device.driver.0.stream_destroy)(self.stream.raw()) };
        }
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    driver: Driver,
    raw: *mut c_void,
}

// SAFETY: an event is a handle into the driver, which takes it from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Whether all work before it is done; does not wait.
    ///
    /// # Errors
    /// [`Error::Cuda`] also for a failure of any earlier work on the device.
    pub fn is_done(&self) -> Result<bool, Error> {
        // SAFETY: the event is alive until `drop`.
        match unsafe { (self.driver.0.event_query)(self.raw) } {
            sys::NOT_READY => Ok(false),
            code => self.driver.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// The time on the device from `earlier` to this one, in steps of about half a microsecond. Both must be done.
    ///
    /// # Errors
    /// [`Error::Cuda`] also when one of them is not done.
    pub fn since(&self, earlier: &Self) -> Result<Duration, Error> {
        let mut milliseconds = 0_f32;
        // SAFETY: both events are alive until `drop`; the pointer is to a live float, which the call fills.
        let code = unsafe { (self.driver.0.event_elapsed)(&raw mut milliseconds, earlier.raw, self.raw) };
        self.driver.check("cuEventElapsedTime", code)?;
        // Of streams that run beside each other, a hair below zero may come out.
        Ok(Duration::try_from_secs_f32(milliseconds / 1000.0).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is alive, and this is its last use. The driver keeps it until its work is done.
        unsafe { (self.driver.0.event_destroy)(self.raw) };
    }
}
