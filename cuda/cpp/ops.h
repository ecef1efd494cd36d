// The part that every machine has: fused operators with their gradients, libtorch's global choices, and its profiler. Linked into each binary.
// Functions that return a tensor return null, and the others 1, with a text in ella_error(), when they fail.

#pragma once
#include <cstdint>

#include "gpu.h"

extern "C" {
const char* ella_error();
// From here on, operators on a GPU launch by this table.
void ella_use_gpu(const EllaGpu* gpu);
// For tests: the GPU's half of the kernels on the processor (emulated.cpp). `find` gives a kernel's function, or null for one that a GPU has not.
struct EllaEmulator {
    void* (*find)(const char* name);
    void (*run)(int pieces, int rows, int threads, int shared, void (*thread)(void*), void* state);
};
// From here on, operators on the processor launch by this one.
void ella_use_emulator(const EllaEmulator* emulator);

// Tensors are at::Tensor*; those returned are the caller's. See src/fused.rs and src/resize.rs. A norm gives what goes past it too: x, or a + b.
// `second`, `add` and `more` may be null. The group norm makes two tensors, or three of an x of two parts.
int ella_group_norm(const void* x, const void* second, const void* gamma, const void* beta, const void* add, int64_t groups, double eps,
                    int activate, void** made);
void* ella_frozen_conv2d(const void* x, const void* weight, int64_t stride, int64_t padding);
void* ella_frozen_double(const void* x, const void* weight, const void* back, const void* bias);
void* ella_frozen_half(const void* x, const void* weight, const void* back);
void* ella_pixels(const void* qkv, int64_t heads);
void* ella_few_keys(const void* q, const void* kv, int64_t heads);
void* ella_geglu(const void* both);
void* ella_rms_norm(const void* x, const void* weight, double eps);
void* ella_gated_gelu(const void* both);
void* ella_add_biased(const void* a, const void* b, const void* more, const void* bias);

// `b` may be null.
int ella_add_layer_norm(const void* a, const void* b, const void* gamma, const void* beta, double eps, void** sum, void** y);
// `kind`: of what it makes, as c10::ScalarType counts them.
void* ella_ada_layer_norm(const void* x, const void* lead, double eps, int kind);
// Sums of the squares of shares of x, in float64.
void* ella_square_sums(const void* x);
// `rates`: the nine numbers of ella::Rates.
int ella_adamw(const void* p, const void* g, const void* m, const void* v, const void* ema, const float* rates);

int ella_set_tf32(int on);
int ella_set_deterministic(int on);
int ella_set_benchmark(int on);

int ella_profile_begin(int gpu);
// Calls `each` for every event of an operator or kernel.
int ella_profile_end(void* user, void (*each)(void* user, const char* name, int on_device, uint64_t start_ns, uint64_t duration_ns));
}
