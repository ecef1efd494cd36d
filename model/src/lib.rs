//! The networks, in tch: connectors, U-Net, text encoders, VAE, diffusion schedules, and the files they live in.
