//! Data sets: sources, filters, prepared shards, features, sample order. Nothing here links libtorch.
