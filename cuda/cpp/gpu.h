// What the library with the GPU's part offers: its one symbol, ella_gpu(), returns this table. Rust has the same one (src/gpu.rs).
// Functions return 0, or 1 with a text in error(). Streams are libtorch's own, by their ids.

#pragma once
#include <cstdint>

extern "C" {
struct EllaGpu {
    const char* (*error)();
    // The device's compute capability.
    int (*capability)(int device, int* major, int* minor);
    // The machine code of all kernels for `device`.
    int (*set_kernels)(int device, const void* image);
    // Puts a kernel on the current stream of `device`; `shared`: the bytes on the chip that it asks for when it is launched.
    int (*launch)(const char* name, int device, int pieces, int rows, int threads, int shared, void** args);
    int (*stream_new)(int device, int priority, int64_t* id);
    int (*stream_current)(int device, int64_t* id);
    int (*stream_enter)(int device, int64_t id);
    int (*stream_raw)(int device, int64_t id, void** raw);
    int (*stream_synchronize)(int device, int64_t id);
    int (*stream_keep)(int device, int64_t id, const void* tensor);
    int (*event_record)(int device, int64_t id, void** event);
    int (*event_wait)(int device, int64_t id, void* event);
    int (*event_done)(void* event, int* done);
    int (*event_synchronize)(void* event);
    int (*event_free)(int device, void* event);
    // In the memory of `beside`, if that is not null: the two are replayed in the order in which they were recorded.
    int (*graph_begin)(void* beside, void** graph);
    int (*graph_end)(void* graph);
    int (*graph_replay)(void* graph);
    int (*graph_free)(void* graph);
    int (*memory)(int device, int64_t* counters);
    int (*memory_reset_peak)(int device);
    int (*memory_empty_cache)();
    int (*memory_limit)(int device, int64_t bytes);
};
}
