//! With a real NCCL, where the machine has one: `NCCL_RS_TEST_DIR` names a folder with `libnccl.so.2`, else the system is searched.
//! What needs a GPU says that it was skipped where there is none.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nccl_rs::cuda::{Driver, Stream};
use nccl_rs::{Buffer, Communicator, Dtype, Error, Library};

const SOON: Duration = Duration::from_secs(30);

fn library() -> Option<Library> {
    let search: Vec<PathBuf> = std::env::var_os("NCCL_RS_TEST_DIR").map(PathBuf::from).into_iter().collect();
    match Library::load(&search) {
        Ok(library) => Some(library),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn driver() -> Option<Driver> {
    let driver = Driver::load().and_then(|driver| driver.device_count().map(|n| (driver, n)));
    match driver {
        Ok((driver, 1..)) => Some(driver),
        Ok(_) => {
            eprintln!("skipped: no GPU");
            None
        }
        Err(error) => {
            eprintln!("skipped: no GPU: {error}");
            None
        }
    }
}

#[test]
fn tells_its_version_and_makes_different_ids() {
    let Some(library) = library() else { return };
    let version = library.version().expect("a loaded library has a version");
    eprintln!("NCCL {version}");
    assert_eq!(version.major, 2);
    let [a, b] = [library.unique_id(), library.unique_id()].map(|id| id.expect("a network interface"));
    assert_ne!(a, b);
}

#[test]
fn a_gpu_tells_its_architecture() {
    let Some(driver) = driver() else { return };
    let ((major, minor), multiprocessors) = driver.device(0).unwrap().architecture().unwrap();
    assert!((5..100).contains(&major) && (0..10).contains(&minor) && (1..10_000).contains(&multiprocessors));
}

#[test]
fn a_rank_outside_the_world_is_refused_before_nccl_sees_it() {
    let Some(library) = library() else { return };
    let id = nccl_rs::UniqueId([0; 128]);
    for place in [(1, 1), (0, 0), (0, u32::MAX)] {
        let refused = Communicator::init(&library, &id, place, SOON);
        assert!(matches!(refused, Err(Error::BadRank { .. })), "{place:?}");
    }
}

#[test]
fn without_a_gpu_init_fails_in_nccls_own_words() {
    let Some(library) = library() else { return };
    if driver().is_some() {
        return;
    }
    let id = library.unique_id().expect("a network interface");
    match Communicator::init(&library, &id, (0, 1), SOON) {
        Err(Error::Nccl { call, code, text, detail }) => {
            eprintln!("{call}: {code}: {text}; {detail}");
            assert!(!text.is_empty() && !detail.is_empty());
        }
        other => panic!("expected NCCL's error, found {other:?}"),
    }
}

#[test]
fn an_absent_driver_is_a_typed_error() {
    match Driver::load() {
        Ok(driver) => assert!(driver.device_count().is_ok()),
        Err(Error::Absent { library, .. }) => assert_eq!(library, "libcuda.so.1"),
        Err(other) => assert!(matches!(other, Error::Cuda { .. } | Error::Symbol { .. }), "{other}"),
    }
}

#[test]
fn a_world_of_one_reduces_waits_and_closes() {
    let (Some(library), Some(driver)) = (library(), driver()) else { return };
    let device = driver.device(0).expect("the first GPU");
    device.make_current().expect("it can be used");
    let id = library.unique_id().expect("a network interface");
    let comm = Communicator::init(&library, &id, (0, 1), SOON).expect("one rank");
    let nothing = Buffer { ptr: std::ptr::null_mut(), count: 0, dtype: Dtype::F32 };
    // SAFETY: no element is read or written.
    unsafe { comm.all_reduce(nothing, Stream::DEFAULT, Instant::now() + SOON) }.expect("nothing to do");
    let event = device.record(Stream::DEFAULT).expect("the device is current");
    comm.wait(&event, Instant::now() + SOON).expect("done at once");
}

/// What a collective does on a stream of its own: it waits for another stream by an event, and its time is known afterwards.
#[test]
fn a_stream_of_its_own_is_ordered_by_events_and_timed() {
    let Some(driver) = driver() else { return };
    let device = driver.device(0).expect("the first GPU");
    let own = device.urgent_stream().expect("a stream");
    let before = device.record(Stream::DEFAULT).expect("the device is current");
    device.wait(own.stream(), &before).expect("both are alive");
    let [from, to] = [(); 2].map(|()| device.record(own.stream()).expect("the device is current"));
    drop(before);
    let begun = Instant::now();
    while !to.is_done().expect("no error") {
        assert!(begun.elapsed() < SOON);
    }
    assert!(to.since(&from).expect("both are done") < SOON);
}

#[test]
fn a_missing_rank_ends_init_at_its_deadline() {
    let (Some(library), Some(driver)) = (library(), driver()) else { return };
    driver.device(0).and_then(|device| device.make_current()).expect("the first GPU");
    let id = library.unique_id().expect("a network interface");
    let alone = Communicator::init(&library, &id, (0, 2), Duration::from_millis(300));
    assert!(matches!(alone, Err(Error::Timeout { .. })), "{alone:?}");
}

#[test]
fn after_an_abort_every_call_says_so() {
    let (Some(library), Some(driver)) = (library(), driver()) else { return };
    let device = driver.device(0).expect("the first GPU");
    device.make_current().expect("it can be used");
    let id = library.unique_id().expect("a network interface");
    let comm = Communicator::init(&library, &id, (0, 1), SOON).expect("one rank");
    let handle = comm.abort_handle();
    std::thread::spawn(move || handle.abort(SOON)).join().expect("no panic").expect("aborted");
    let event = device.record(Stream::DEFAULT).expect("the device is current");
    assert!(matches!(comm.wait(&event, Instant::now() + SOON), Err(Error::Aborted { .. })));
    comm.abort_handle().abort(SOON).expect("harmless when repeated");
}
