//! Networks from files, and all pictures through them.

use ella_model::base::Base;
use ella_model::connector::Connector;
use ella_model::lora::Lora;
use ella_model::unet::UNet;
use ella_model::vae::Vae;
use ella_worker::draw::{self, Drawer, Networks, Noise, Picture, Script, Shot};
use tch::{Device, Kind};

use crate::ui::Fail;

/// How to draw.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) how: draw::Settings,
    /// Pictures drawn at once.
    pub(super) batch: usize,
}

/// What draws.
#[derive(Debug)]
pub(super) struct Studio {
    connector: Connector,
    unet: UNet,
    vae: Vae,
    drawer: Drawer,
    batch: usize,
}

impl Studio {
    /// Loads the base's networks, LoRAs merged into its U-Net, which compute in `kind`.
    pub(super) fn load(
        (base, loras): (&Base, &[Lora]),
        connector: Connector,
        settings: &Settings,
        (kind, device): (Kind, Device),
    ) -> Result<Self, Fail> {
        let drawer = Drawer::new(settings.how, &base.schedule(device)?, device)?;
        let (unet, vae) = (base.unet_with(loras, kind, device)?, base.vae(kind, device)?);
        Ok(Self { connector, unet, vae, drawer, batch: settings.batch })
    }

    /// How often the progress of so many pictures will count.
    pub(super) fn total_steps(&self, pictures: usize) -> u64 {
        (pictures.div_ceil(self.batch) * self.drawer.steps()) as u64
    }

    /// The pictures of all shots, as the script tells them. `step` hears of each step done.
    pub(super) fn draw(&mut self, shots: &[Shot], script: &Script, noise: &Noise, step: &mut dyn FnMut()) -> Result<Vec<Picture>, Fail> {
        let through = Networks { connector: Some(&self.connector), unet: &self.unet, vae: &self.vae };
        let mut drawn = Vec::with_capacity(shots.len());
        for shots in shots.chunks(self.batch) {
            let noise = noise.rows(drawn.len(), shots)?;
            drawn.extend(self.drawer.draw(through, (shots, script, &noise), step)?);
        }
        Ok(drawn)
    }
}
