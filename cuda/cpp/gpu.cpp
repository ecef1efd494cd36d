// The GPU's part: streams, events, graphs, the allocator, and kernels made at run time. A library of its own, since it needs libtorch's CUDA
// part, which a machine without a GPU lacks. The worker carries it and loads it after that.

#include "gpu.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"

namespace {

template <class F>
int guarded(F work) {
    return ella_guarded(1, [&] {
        work();
        return 0;
    });
}

c10::cuda::CUDAStream stream_of(int device, int64_t id) {
    const c10::Device at(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    return c10::cuda::CUDAStream(c10::Stream(c10::Stream::UNSAFE, at, id));
}

cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

// --- Kernels, made from their text for the GPU at hand ------------------------------------------------------------------------------------

// Of nvrtc.h and cuda.h 13: libtorch's own loader brings both libraries, and its headers declare neither.
struct Compiler {
    int (*create)(void** program, const char* text, const char* name, int headers, const char* const*, const char* const*);
    int (*compile)(void* program, int count, const char* const* options);
    int (*log_size)(void* program, size_t*);
    int (*log)(void* program, char*);
    int (*cubin_size)(void* program, size_t*);
    int (*cubin)(void* program, char*);
    int (*destroy)(void** program);
    const char* (*error)(int);
    int (*load)(void** module, const void* image);
    int (*find)(void** function, void* module, const char* name);
    int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream, void** args, void** extra);
};

Compiler compiler;
std::string kernels;
std::mutex lock;
std::map<std::pair<int, std::string>, void*> functions;
std::map<int, void*> modules;

template <class F>
void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    TORCH_CHECK(function, name, " is missing: ", dlerror());
}

void init(const char* libtorch, const char* text) {
    const std::string path = std::string(libtorch) + "/libcaffe2_nvrtc.so";
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    TORCH_CHECK(library, "the kernel compiler cannot be loaded: ", dlerror());
    find(library, "nvrtcCreateProgram", compiler.create);
    find(library, "nvrtcCompileProgram", compiler.compile);
    find(library, "nvrtcGetProgramLogSize", compiler.log_size);
    find(library, "nvrtcGetProgramLog", compiler.log);
    find(library, "nvrtcGetCUBINSize", compiler.cubin_size);
    find(library, "nvrtcGetCUBIN", compiler.cubin);
    find(library, "nvrtcDestroyProgram", compiler.destroy);
    find(library, "nvrtcGetErrorString", compiler.error);
    find(library, "cuModuleLoadData", compiler.load);
    find(library, "cuModuleGetFunction", compiler.find);
    find(library, "cuLaunchKernel", compiler.launch);
    kernels = text;
}

// Machine code for `architecture`, as "sm_90".
std::vector<char> compile(const std::string& architecture) {
    void* program = nullptr;
    int code = compiler.create(&program, kernels.c_str(), "kernels.h", 0, nullptr, nullptr);
    TORCH_CHECK(code == 0, "nvrtcCreateProgram: ", compiler.error(code));
    const std::string target = "--gpu-architecture=" + architecture;
    const char* options[] = {target.c_str(), "--std=c++17"};
    code = compiler.compile(program, 2, options);
    if (code != 0) {
        size_t size = 0;
        compiler.log_size(program, &size);
        std::string log(size, ' ');
        compiler.log(program, log.data());
        compiler.destroy(&program);
        TORCH_CHECK(false, "the kernels do not compile for ", architecture, ": ", compiler.error(code), "\n", log);
    }
    size_t size = 0;
    compiler.cubin_size(program, &size);
    std::vector<char> image(size);
    code = compiler.cubin(program, image.data());
    compiler.destroy(&program);
    TORCH_CHECK(code == 0, "nvrtcGetCUBIN: ", compiler.error(code));
    return image;
}

void* module_of(int device) {
    if (const auto there = modules.find(device); there != modules.end()) return there->second;
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const auto image = compile("sm_" + std::to_string(properties.major) + std::to_string(properties.minor));
    void* made = nullptr;
    const int code = compiler.load(&made, image.data());
    TORCH_CHECK(code == 0, "cuModuleLoadData: error ", code);
    return modules[device] = made;
}

void* function_of(int device, const char* name) {
    const std::lock_guard guard(lock);
    const auto key = std::make_pair(device, std::string(name));
    if (const auto there = functions.find(key); there != functions.end()) return there->second;
    void* function = nullptr;
    const int code = compiler.find(&function, module_of(device), name);
    TORCH_CHECK(code == 0, "kernel ", name, ": error ", code);
    return functions[key] = function;
}

void launch(const char* name, int device, int pieces, int rows, int threads, void** args) {
    const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
    void* stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
    const int code = compiler.launch(function_of(device, name), pieces, rows, 1, threads, 1, 1, 0, stream, args, nullptr);
    TORCH_CHECK(code == 0, "kernel ", name, " (", pieces, " × ", rows, " blocks of ", threads, "): error ", code);
}

// --- The table ----------------------------------------------------------------------------------------------------------------------------

// A tensor, as libtorch's C interface has it.
const at::Tensor& tensor_of(const void* tensor) { return *static_cast<const at::Tensor*>(tensor); }

int64_t now(const c10::CachingAllocator::StatArray& stat) { return stat[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].current; }
int64_t peak(const c10::CachingAllocator::StatArray& stat) { return stat[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak; }

at::cuda::CUDAGraph* graph_of(void* graph) { return static_cast<at::cuda::CUDAGraph*>(graph); }

const EllaGpu table = {
    .error = [] { return ella_last_error.c_str(); },
    .init = [](const char* libtorch, const char* text) { return guarded([&] { init(libtorch, text); }); },
    .launch = [](const char* name, int device, int pieces, int rows, int threads, void** args) {
        return guarded([&] { launch(name, device, pieces, rows, threads, args); });
    },
    .stream_new = [](int device, int priority, int64_t* id) {
        return guarded([&] { *id = c10::cuda::getStreamFromPool(priority, static_cast<c10::DeviceIndex>(device)).id(); });
    },
    .stream_current = [](int device, int64_t* id) {
        return guarded([&] { *id = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).id(); });
    },
    .stream_enter = [](int device, int64_t id) { return guarded([&] { c10::cuda::setCurrentCUDAStream(stream_of(device, id)); }); },
    .stream_raw = [](int device, int64_t id, void** raw) { return guarded([&] { *raw = stream_of(device, id).stream(); }); },
    .stream_synchronize = [](int device, int64_t id) { return guarded([&] { stream_of(device, id).synchronize(); }); },
    .stream_keep = [](int device, int64_t id, const void* tensor) {
        return guarded([&] { c10::cuda::CUDACachingAllocator::recordStream(tensor_of(tensor).storage().data_ptr(), stream_of(device, id)); });
    },
    .event_record = [](int device, int64_t id, void** event) {
        return guarded([&] {
            const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
            cudaEvent_t made = nullptr;
            C10_CUDA_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
            *event = made;
            C10_CUDA_CHECK(cudaEventRecord(made, stream_of(device, id).stream()));
        });
    },
    .event_wait = [](int device, int64_t id, void* event) {
        return guarded([&] {
            const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
            C10_CUDA_CHECK(cudaStreamWaitEvent(stream_of(device, id).stream(), event_of(event), 0));
        });
    },
    .event_done = [](void* event, int* done) {
        return guarded([&] {
            const cudaError_t found = cudaEventQuery(event_of(event));
            *done = found == cudaSuccess;
            if (found == cudaErrorNotReady) {
                cudaGetLastError();  // it is no error, and would be taken for the next call's
            } else {
                C10_CUDA_CHECK(found);
            }
        });
    },
    .event_synchronize = [](void* event) { return guarded([&] { C10_CUDA_CHECK(cudaEventSynchronize(event_of(event))); }); },
    .event_free = [](int device, void* event) {
        return guarded([&] {
            const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
            C10_CUDA_CHECK(cudaEventDestroy(event_of(event)));
        });
    },
    .graph_begin = [](void** graph) {
        return guarded([&] {
            auto made = std::make_unique<at::cuda::CUDAGraph>();
            // Other threads go on with their own streams meanwhile: only what this thread does is held to the rules of a capture.
            made->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
            *graph = made.release();
        });
    },
    .graph_end = [](void* graph) { return guarded([&] { graph_of(graph)->capture_end(); }); },
    .graph_replay = [](void* graph) { return guarded([&] { graph_of(graph)->replay(); }); },
    .graph_free = [](void* graph) { return guarded([&] { delete graph_of(graph); }); },
    .memory = [](int device, int64_t* counters) {
        return guarded([&] {
            const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
            counters[0] = now(stats.allocated_bytes);
            counters[1] = now(stats.reserved_bytes);
            counters[2] = peak(stats.allocated_bytes);
            counters[3] = peak(stats.reserved_bytes);
        });
    },
    .memory_reset_peak = [](int device) {
        return guarded([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
    },
    .memory_empty_cache = [] { return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); }); },
    .memory_limit = [](int device, int64_t bytes) {
        return guarded([&] {
            const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
            size_t free = 0, total = 0;
            C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
            const double share = std::min(1.0, static_cast<double>(bytes) / static_cast<double>(total));
            c10::cuda::CUDACachingAllocator::setMemoryFraction(share, static_cast<c10::DeviceIndex>(device));
        });
    },
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const EllaGpu* ella_gpu() { return &table; }
