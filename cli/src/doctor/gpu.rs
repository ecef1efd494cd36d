//! The GPUs, as the driver tells of them, and whether libtorch can use them.

use ella_worker::gpu::Unusable;
use nccl_rs::cuda::{Device, Driver};
use serde::Serialize;

use super::has_gpu;
use crate::ui::bytes;

#[derive(Debug, Serialize)]
pub(super) struct Gpus {
    /// The newest CUDA that the driver can run.
    driver: Option<String>,
    pub(super) devices: Vec<Gpu>,
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
    name: String,
    uuid: String,
    memory_bytes: usize,
    pub(super) free_bytes: usize,
}

impl Gpus {
    pub(super) fn look() -> Self {
        let found = Driver::load().and_then(|driver| {
            let (major, minor) = driver.version()?;
            let devices = (0..driver.device_count()?).map(|ordinal| Gpu::look(&driver.device(ordinal)?)).collect::<Result<_, _>>()?;
            Ok((format!("{major}.{minor}"), devices))
        });
        let why = has_gpu().err();
        let fused = ella_worker::gpu::of_fused().to_vec();
        let attention = match why {
            None => ella_worker::gpu::of_attention().unwrap_or_else(|error| vec![format!("attention cannot be timed: {error}")]),
            Some(_) => Vec::new(),
        };
        let (unusable, none_expected) = (why.as_ref().map(ToString::to_string), why == Some(Unusable::Nothing));
        match found {
            Ok((version, devices)) => Self { driver: Some(version), devices, unusable, fused, attention, none_expected },
            Err(nccl_rs::Error::Absent { .. }) => Self { driver: None, devices: Vec::new(), unusable, fused, attention, none_expected },
            // There is one, and it does not work: on one of its devices, if not before.
            Err(error) => {
                let unusable = unusable.or_else(|| Some(error.to_string()));
                Self { driver: Some("broken".to_owned()), devices: Vec::new(), unusable, fused, attention, none_expected }
            }
        }
    }

    pub(super) fn usable(&self) -> bool {
        !self.devices.is_empty() && self.unusable.is_none()
    }

    /// What keeps a machine that is meant to have a GPU from using it.
    pub(super) fn wrong(&self) -> Option<String> {
        self.unusable.clone().filter(|_| !self.none_expected)
    }

    pub(super) fn text(&self) -> String {
        let Some(driver) = &self.driver else {
            return format!("gpu       none: {}\n", self.unusable.as_deref().unwrap_or("there is no NVIDIA driver here"));
        };
        let mut text = format!("gpu       {} by a driver for CUDA {driver}\n", self.devices.len());
        for Gpu { name, uuid, memory_bytes, free_bytes } in &self.devices {
            text += &format!("          {name}, {uuid}, {} of memory ({} free)\n", bytes(*memory_bytes as u64), bytes(*free_bytes as u64));
        }
        if self.usable() && self.fused.is_empty() {
            text += "          its fused operators give what the processor's do\n";
        }
        for line in self.fused.iter().chain(&self.attention) {
            text += &format!("          {line}\n");
        }
        text
    }
}

impl Gpu {
    fn look(device: &Device) -> Result<Self, nccl_rs::Error> {
        let (free_bytes, memory_bytes) = device.memory()?;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let uuid = device.uuid();
        let parts = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex);
        Ok(Self { name: device.name().to_owned(), uuid: format!("GPU-{}", parts.join("-")), memory_bytes, free_bytes })
    }
}
