//! The GPUs, as the driver tells of them, and whether libtorch can use them.

use ella_worker::gpu::Unusable;
use ella_worker::gpu::fault::Fault;
use nccl_rs::cuda::Driver;
use serde::Serialize;

use super::has_gpu;
use crate::ui::bytes;

#[derive(Debug, Serialize)]
pub(super) struct Gpus {
    /// The newest CUDA that the driver can run.
    driver: Option<String>,
    /// Those that answer.
    pub(super) devices: Vec<Gpu>,
    /// Of the others, what the driver says.
    silent: Vec<String>,
    /// Why a worker would not use them; none if it would.
    unusable: Option<String>,
    /// Of fused operators: which give something else on the first than on the processor, or could not be tried.
    fused: Vec<String>,
    /// Which attention is the fastest on the first; or why that is not known.
    attention: Vec<String>,
    /// Whether that is as it should be on a machine without any.
    #[serde(skip)]
    none_expected: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Gpu {
    /// As CUDA counts them: a worker computes on the first that it is shown.
    pub(super) number: u32,
    pub(super) name: String,
    uuid: String,
    memory_bytes: usize,
    pub(super) free_bytes: usize,
}

impl Gpus {
    pub(super) fn look() -> Self {
        let found = Driver::load().and_then(|driver| {
            let ((major, minor), count) = (driver.version()?, driver.device_count()?);
            // One that is broken is no reason to say nothing of the others.
            Ok((format!("{major}.{minor}"), (0..count).map(|number| Gpu::look(&driver, number)).collect::<Vec<_>>()))
        });
        let why = has_gpu().err();
        let attention = match why {
            None => ella_worker::gpu::of_attention().unwrap_or_else(|error| vec![format!("attention cannot be timed: {error}")]),
            Some(_) => Vec::new(),
        };
        let gpus = Self {
            driver: None,
            devices: Vec::new(),
            silent: Vec::new(),
            unusable: why.as_ref().map(ToString::to_string),
            fused: ella_worker::gpu::of_fused().to_vec(),
            attention,
            none_expected: why == Some(Unusable::Nothing),
        };
        match found {
            Ok((version, looks)) => gpus.of(version, looks),
            Err(nccl_rs::Error::Absent { .. }) => gpus,
            // There is one, and it does not start.
            Err(error) => {
                let unusable = gpus.unusable.clone().or_else(|| Some(error.to_string()));
                Self { driver: Some("broken".to_owned()), unusable, ..gpus }
            }
        }
    }

    fn of(mut self, version: String, looks: Vec<Result<Gpu, String>>) -> Self {
        self.driver = Some(version);
        for look in looks {
            match look {
                Ok(gpu) => self.devices.push(gpu),
                Err(said) => self.silent.push(said),
            }
        }
        self
    }

    pub(super) fn usable(&self) -> bool {
        !self.devices.is_empty() && self.unusable.is_none()
    }

    /// What keeps a machine that is meant to have a GPU from using it, or one of them.
    pub(super) fn wrong(&self) -> Vec<String> {
        self.silent.iter().cloned().chain(self.unusable.clone().filter(|_| !self.none_expected)).collect()
    }

    pub(super) fn text(&self) -> String {
        let Some(driver) = &self.driver else {
            return format!("gpu       none: {}\n", self.unusable.as_deref().unwrap_or("there is no NVIDIA driver here"));
        };
        let mut text = format!("gpu       {} by a driver for CUDA {driver}\n", self.devices.len() + self.silent.len());
        for Gpu { number, name, uuid, memory_bytes, free_bytes } in &self.devices {
            let (all, free) = (bytes(*memory_bytes as u64), bytes(*free_bytes as u64));
            text += &format!("          gpu {number}: {name}, {uuid}, {all} of memory ({free} free)\n");
        }
        if self.usable() && self.fused.is_empty() {
            text += "          on the first, fused operators give what the processor's do\n";
        }
        for line in self.fused.iter().chain(&self.attention) {
            text += &format!("          {line}\n");
        }
        text
    }
}

impl Gpu {
    /// # Errors
    /// What is wrong with it, in the driver's words.
    fn look(driver: &Driver, number: u32) -> Result<Self, String> {
        let look = || -> Result<Self, nccl_rs::Error> {
            let device = driver.device(number)?;
            let (free_bytes, memory_bytes) = device.memory()?;
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            let uuid = device.uuid();
            let parts = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex);
            Ok(Self { number, name: device.name().to_owned(), uuid: format!("GPU-{}", parts.join("-")), memory_bytes, free_bytes })
        };
        look().map_err(|error| {
            let hint = Fault::of(&error).map_or("look at nvidia-smi -q", Fault::hint);
            format!("gpu {number} does not answer ({error}): {hint}")
        })
    }

    /// What it is called where it is wrong.
    pub(super) fn called(&self) -> String {
        format!("gpu {} ({})", self.number, self.uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_gpu_that_does_not_answer_is_named_and_the_others_are_looked_at() {
        let gpu =
            |number| Gpu { number, name: "H100".to_owned(), uuid: format!("GPU-{number}"), memory_bytes: 80 << 30, free_bytes: 79 << 30 };
        let none = Gpus {
            driver: None,
            devices: Vec::new(),
            silent: Vec::new(),
            unusable: None,
            fused: Vec::new(),
            attention: Vec::new(),
            none_expected: false,
        };
        let gpus = none.of("13.0".to_owned(), vec![Ok(gpu(0)), Err("gpu 1 does not answer (GPU is lost)".to_owned()), Ok(gpu(2))]);
        assert!(gpus.usable());
        assert_eq!(gpus.wrong(), ["gpu 1 does not answer (GPU is lost)"]);
        let text = gpus.text();
        assert!(
            text.starts_with("gpu       3 by a driver for CUDA 13.0\n          gpu 0: H100, GPU-0, ") && text.contains("gpu 2: H100"),
            "{text}"
        );
        assert_eq!(gpus.devices[1].called(), "gpu 2 (GPU-2)");
    }
}
