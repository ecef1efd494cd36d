//! The timestep-aware semantic connector.
