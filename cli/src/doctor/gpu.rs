//! The GPUs, as the driver tells of them, and whether libtorch can use them.

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
        let unusable = has_gpu().err();
        match found {
            Ok((version, devices)) => Self { driver: Some(version), devices, unusable },
            Err(nccl_rs::Error::Absent { .. }) => Self { driver: None, devices: Vec::new(), unusable },
            // There is one, and it does not work.
            Err(error) => Self { driver: Some("broken".to_owned()), devices: Vec::new(), unusable: Some(error.to_string()) },
        }
    }

    pub(super) fn usable(&self) -> bool {
        !self.devices.is_empty() && self.unusable.is_none()
    }

    /// A driver without a device that can be used was meant to have one.
    pub(super) fn wrong(&self) -> Option<String> {
        self.unusable.clone().filter(|_| self.driver.is_some())
    }

    pub(super) fn text(&self) -> String {
        let Some(driver) = &self.driver else { return "gpu       none: there is no NVIDIA driver here\n".to_owned() };
        let mut text = format!("gpu       {} by a driver for CUDA {driver}\n", self.devices.len());
        for Gpu { name, uuid, memory_bytes, free_bytes } in &self.devices {
            text += &format!("          {name}, {uuid}, {} of memory ({} free)\n", bytes(*memory_bytes as u64), bytes(*free_bytes as u64));
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
