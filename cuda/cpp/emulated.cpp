// The GPU's half of the kernels, as a Hopper GPU has it, for a processor: tests/common/emulated.rs compiles and loads this.

#define __CUDACC_RTC__
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL
#define ELLA_EMULATED

#include "device.h"
#include "kernels.h"
#include "few_keys.h"
#include "pixels.h"

// Runs a kernel: what `thread` does of `state` is one thread's work. One kernel at a time.
extern "C" void ella_emulate(int pieces, int rows, int threads, int shared, void (*thread)(void*), void* state) {
    using namespace ella;
    static std::mutex one;
    const std::lock_guard guard(one);
    gridDim = {static_cast<unsigned int>(pieces), static_cast<unsigned int>(rows)};
    blockDim = {static_cast<unsigned int>(threads), 1};
    emulated::work = thread;
    emulated::state = state;
    for (int y = 0; y < rows; ++y) {
        for (int x = 0; x < pieces; ++x) emulated::run_block(x, y, shared);
    }
}
