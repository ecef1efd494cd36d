//! The GPUs of this machine, shared out among several workers that are started here. A worker computes on the first that it sees, so each is shown
//! one of its own.

use std::path::Path;

use ella_proto::config::Device;
use ella_worker::device::{NoDevice, libtorch_folder};
use ella_worker::gpu;

use crate::ui::{Fail, count};

/// The GPUs that CUDA shows a process, by number, UUID or name.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// As [`VISIBLE`] names them, in the order in which workers get them. None: workers see what this process sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gpus(Vec<String>);

impl Gpus {
    /// For the workers of a run, of which each must have one of its own.
    ///
    /// # Errors
    /// There are fewer, and workers would compute on them; or none that one could.
    pub(crate) fn for_run(workers: usize, device: Device) -> Result<Self, Fail> {
        Self::for_job(workers, device).if_usable(workers, device, || gpu::check(&libtorch_folder().unwrap_or_default()).map_err(NoDevice))
    }

    fn if_usable(self, workers: usize, device: Device, usable: impl FnOnce() -> Result<(), NoDevice>) -> Result<Self, Fail> {
        if workers < 2 || device == Device::Cpu || self.0.len() >= workers {
            if device == Device::Cuda {
                // The workers would find the same, but with a run's folder begun already, where no other device is taken any more.
                usable()?;
            }
            return Ok(self);
        }
        // The driver is asked only now: to load it takes a while, and memory for as long as the run lasts.
        too_few(workers, (self.0.len(), here(Path::new("/dev"))), device, usable()).map(|()| Self::default())
    }

    /// For the workers of a job, of which several may share one.
    pub(crate) fn for_job(workers: usize, device: Device) -> Self {
        if workers < 2 || device == Device::Cpu {
            return Self::default();
        }
        Self::among(std::env::var(VISIBLE).ok().as_deref(), here(Path::new("/dev")))
    }

    /// Those of a machine's that [`VISIBLE`] names, or all of them. CUDA reads that list up to the first entry that is no GPU.
    fn among(visible: Option<&str>, here: usize) -> Self {
        let is_gpu = |entry: &&str| !entry.is_empty() && entry.parse().map_or(true, |number: i64| (0..here as i64).contains(&number));
        match visible {
            _ if here == 0 => Self::default(),
            Some(list) => Self(list.split(',').map(str::trim).take_while(is_gpu).map(str::to_owned).collect()),
            None => Self((0..here).map(|number| number.to_string()).collect()),
        }
    }

    /// What the worker of this number, from 0, has in its environment.
    pub(crate) fn of_worker(&self, number: usize) -> Vec<(String, String)> {
        let gpu = number.checked_rem(self.0.len()).map(|at| self.0[at].clone());
        gpu.map(|gpu| (VISIBLE.to_owned(), gpu)).into_iter().collect()
    }
}

/// Whether a run goes without GPUs of its own for each worker: of those that are here, these can be shared out.
fn too_few(workers: usize, (gpus, here): (usize, usize), device: Device, usable: Result<(), NoDevice>) -> Result<(), Fail> {
    match usable {
        // Workers find the same, and compute on the processor.
        Err(_) if device == Device::Auto => Ok(()),
        Err(why) => Err(Fail::lasting(format_args!("workers.count = {workers}: {why}"))),
        // Without device files, as under Windows, they cannot be counted here.
        Ok(()) if here == 0 => Ok(()),
        Ok(()) => Err(Fail::lasting(format_args!(
            "workers.count = {workers}, but there {} here for them ({VISIBLE} may hide others), and each needs one of its own: lower workers.count, or set \
             workers.device = \"cpu\"",
            if gpus == 1 { "is 1 GPU".to_owned() } else { format!("are {}", count(gpus, "GPU")) }
        ))),
    }
}

/// How many GPUs a machine, or a container, has: each has a file of its number in /dev.
fn here(folder: &Path) -> usize {
    let is_gpu = |name: &str| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter(|file| file.file_name().to_str().is_some_and(is_gpu)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(gpus: &Gpus, workers: usize) -> Vec<String> {
        (0..workers).flat_map(|number| gpus.of_worker(number)).map(|(name, gpu)| format!("{name}={gpu}")).collect()
    }

    #[test]
    fn each_worker_is_shown_the_gpu_of_its_number() {
        let of = |visible, here| shown(&Gpus::among(visible, here), 2);
        assert_eq!(of(None, 4), ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]);
        assert_eq!(of(Some("3, 1"), 4), ["CUDA_VISIBLE_DEVICES=3", "CUDA_VISIBLE_DEVICES=1"]);
        let named = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-5a1b2c3d-0000-1111-2222-333344445555";
        assert_eq!(of(Some(named), 1).concat(), named.split(',').map(|gpu| format!("CUDA_VISIBLE_DEVICES={gpu}")).collect::<String>());
        // A job's workers share those that there are.
        assert_eq!(of(Some("2"), 4), ["CUDA_VISIBLE_DEVICES=2", "CUDA_VISIBLE_DEVICES=2"]);
        // No GPU here, or none that this process is to see.
        for (visible, here) in [(None, 0), (Some("0,1"), 0), (Some(""), 2), (Some("-1"), 2), (Some("2"), 2)] {
            assert!(of(visible, here).is_empty(), "{visible:?}");
        }
        assert_eq!(Gpus::among(Some("1,-1,0"), 2), Gpus(vec!["1".to_owned()]));
    }

    #[test]
    fn one_worker_and_those_on_the_processor_see_what_this_process_sees() {
        for (workers, device) in [(1, Device::Auto), (1, Device::Cuda), (2, Device::Cpu)] {
            assert_eq!(Gpus::for_job(workers, device).if_usable(workers, device, || Ok(())).unwrap(), Gpus::default());
        }
    }

    /// One worker, or as many as there are GPUs.
    #[test]
    fn workers_without_the_gpus_that_they_are_to_have_are_told_before_anything_is_begun() {
        let nothing = || Err(NoDevice(gpu::Unusable::Nothing));
        let two = Gpus(vec!["0".to_owned(), "1".to_owned()]);
        for (gpus, workers) in [(Gpus::default(), 1), (two, 2)] {
            let fail = gpus.clone().if_usable(workers, Device::Cuda, nothing).unwrap_err();
            assert_eq!(fail.code, crate::ui::NO_RETRY);
            assert!(fail.message.starts_with("the device \"cuda\"") && fail.message.ends_with("or use \"cpu\""), "{}", fail.message);
            // They compute on the processor then.
            assert_eq!(gpus.clone().if_usable(workers, Device::Auto, nothing).unwrap(), gpus);
        }
    }

    #[test]
    fn a_run_of_more_workers_than_gpus_is_told_so() {
        let nothing = || Err(NoDevice(gpu::Unusable::Nothing));
        let said = |gpus, device, usable| too_few(2, gpus, device, usable).map_err(|fail| fail.message);
        for device in [Device::Auto, Device::Cuda] {
            let text = said((1, 1), device, Ok(())).unwrap_err();
            assert!(text.starts_with("workers.count = 2, but there is 1 GPU here"), "{text}");
        }
        let hidden = said((0, 4), Device::Cuda, Ok(())).unwrap_err();
        assert!(hidden.contains("there are 0 GPUs here"), "{hidden}");
        let none = said((0, 0), Device::Cuda, nothing()).unwrap_err();
        assert!(none.starts_with("workers.count = 2: the device \"cuda\"") && none.contains("no NVIDIA device"), "{none}");
        assert_eq!(said((0, 0), Device::Auto, nothing()), Ok(()));
        assert_eq!(said((0, 0), Device::Cuda, Ok(())), Ok(()));
    }

    #[test]
    fn gpus_are_counted_by_their_device_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-caps", "nvidia", "null"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!((here(folder.path()), here(&folder.path().join("none"))), (2, 0));
    }
}
