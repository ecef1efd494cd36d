//! One network on tensors from a file.
