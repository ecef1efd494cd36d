// libtorch's global choices, and its profiler.

#include <ATen/Context.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include "error.h"
#include "ops.h"

int ella_set_tf32(int on) {
    return ella_guarded(1, [&] {
        at::globalContext().setAllowTF32CuBLAS(on != 0);
        at::globalContext().setAllowTF32CuDNN(on != 0);
        return 0;
    });
}

int ella_set_deterministic(int on) {
    return ella_guarded(1, [&] {
        at::globalContext().setDeterministicAlgorithms(on != 0, false);
        at::globalContext().setDeterministicCuDNN(on != 0);
        // Memory is filled for debugging only: what is read here was written.
        at::globalContext().setDeterministicFillUninitializedMemory(false);
        return 0;
    });
}

int ella_set_benchmark(int on) {
    return ella_guarded(1, [&] {
        at::globalContext().setBenchmarkCuDNN(on != 0);
        return 0;
    });
}

namespace profiler = torch::autograd::profiler;

int ella_profile_begin(int gpu) {
    return ella_guarded(1, [&] {
        std::set<profiler::ActivityType> activities = {profiler::ActivityType::CPU};
        if (gpu) activities.insert(profiler::ActivityType::CUDA);
        const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
        profiler::prepareProfiler(config, activities);
        profiler::enableProfiler(config, activities);
        return 0;
    });
}

int ella_profile_end(void* user, void (*each)(void*, const char*, int, uint64_t, uint64_t)) {
    return ella_guarded(1, [&] {
        const auto result = profiler::disableProfiler();
        for (const auto& event : result->events()) {
            each(user, event.name().c_str(), event.deviceType() == c10::DeviceType::CUDA, event.startNs(), event.durationNs());
        }
        return 0;
    });
}
