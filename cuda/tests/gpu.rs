//! Streams, events, graphs, memory and the profiler on a GPU; where there is none, each says that it was skipped.

mod common;

use common::{alone, gpu};
use ella_cuda::graph::Recording;
use ella_cuda::stream::{Priority, Stream};
use ella_cuda::{Error, memory, profile};
use tch::{Device, Kind, Tensor};

const MANY: i64 = 1 << 26;

fn floats(count: i64, value: f64, device: Device) -> Tensor {
    Tensor::full([count], value, (Kind::Float, device))
}

#[test]
fn work_on_one_stream_waits_for_an_event_of_another() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let [low, high] = [Priority::Low, Priority::High].map(|priority| Stream::new(device, priority).unwrap());
    assert_ne!(low, high);
    let made = {
        let _on = low.enter().unwrap();
        assert_eq!(Stream::current(device).unwrap(), low);
        (0..50).fold(floats(MANY, 0.0, device), |sum, _| sum + 1.0)
    };
    assert_ne!(Stream::current(device).unwrap(), low);
    let event = low.record().unwrap();
    let sum = {
        let _on = high.enter().unwrap();
        high.wait(&event).unwrap();
        high.keep(&made).unwrap();
        &made * 2.0
    };
    high.synchronize().unwrap();
    assert!(event.is_done().unwrap());
    event.synchronize().unwrap();
    assert_eq!(sum.min().double_value(&[]), 100.0);
    assert!(high.keep(&Tensor::ones([1], (Kind::Float, Device::Cpu))).is_err());
}

/// Two graphs in one memory, as the parts of a step: the second goes on from what the first left, backward passes included.
#[test]
fn graphs_compute_again_from_new_numbers() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let stream = Stream::new(device, Priority::Normal).unwrap();
    let _on = stream.enter().unwrap();
    let (x, weight) = (floats(1000, 3.0, device), floats(1000, 2.0, device).set_requires_grad(true));
    let work = |x: &Tensor| ((x * &weight).square(), (x * &weight).sum(Kind::Float));
    // What libraries set up at first use.
    let (_, warm) = work(&x);
    let _ = Tensor::run_backward(&[warm], &[&weight], false, false);
    stream.synchronize().unwrap();

    let recording = Recording::begin(None).unwrap();
    let (squares, sum) = work(&x);
    let first = recording.end().unwrap();
    let recording = Recording::begin(Some(&first)).unwrap();
    let gradient = Tensor::run_backward(&[&sum], &[&weight], false, false).remove(0);
    let second = recording.end().unwrap();
    for value in [3.0, 5.0, 7.0] {
        let mut x = x.shallow_clone();
        let _ = x.fill_(value);
        first.replay().unwrap();
        second.replay().unwrap();
        assert_eq!(squares.max().double_value(&[]), 4.0 * value * value);
        assert_eq!(gradient.min().double_value(&[]), value);
    }
    // One that is given up leaves the stream as it was.
    drop(Recording::begin(None).unwrap());
    assert_eq!((&x + 1.0).min().double_value(&[]), 8.0);
}

/// What waits for the device inside a recording spoils it; neither the allocator nor the next recording is hurt by that.
#[test]
fn a_recording_that_fails_leaves_everything_usable() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let stream = Stream::new(device, Priority::Normal).unwrap();
    let _on = stream.enter().unwrap();
    let x = floats(1000, 1.0, device);
    let _ = (&x + 1.0).sum(Kind::Float).double_value(&[]);
    let recording = Recording::begin(None).unwrap();
    let y = &x + 1.0;
    assert!(y.f_double_value(&[0]).is_err());
    assert!(recording.end().is_err());
    drop(y);
    memory::empty_cache().unwrap();
    let y = floats(MANY, 2.0, device);
    assert_eq!(y.max().double_value(&[]), 2.0);
    let recording = Recording::begin(None).unwrap();
    let z = &x + 2.0;
    let graph = recording.end().unwrap();
    graph.replay().unwrap();
    assert_eq!(z.max().double_value(&[]), 3.0);
}

#[test]
fn memory_is_counted_and_bounded() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    memory::reset_peak(device).unwrap();
    let before = memory::counters(device).unwrap();
    let tensor = floats(MANY, 0.0, device);
    let during = memory::counters(device).unwrap();
    // Other tests of this process run beside this one.
    assert!(during.allocated + (1 << 30) >= before.allocated + 4 * MANY as u64 && during.peak_allocated >= 4 * MANY as u64);
    drop(tensor);
    memory::empty_cache().unwrap();
    memory::limit(device, during.reserved + (1 << 30)).unwrap();
    let error = Tensor::f_zeros([1 << 31], (Kind::Float, device)).unwrap_err().to_string();
    memory::limit(device, u64::MAX).unwrap();
    assert!(error.contains("out of memory"), "{error}");
}

#[test]
fn kernels_are_seen_by_name() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let a = Tensor::ones([512, 512], (Kind::BFloat16, device));
    let ((), events) = profile::profile(|| {
        let _ = a.matmul(&a).sum(Kind::Float).double_value(&[]);
        Ok::<_, Error>(())
    })
    .unwrap();
    assert!(events.iter().any(|event| event.on_device && event.duration_us > 0.0), "{events:?}");
}
