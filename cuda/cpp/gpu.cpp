// The GPU's part: streams, events, graphs, the allocator, and the launching of kernels. A library of its own, since it needs libtorch's CUDA
// part, which a machine without a GPU lacks. The worker carries it and loads it after that.

#include "gpu.h"

#include <ATen/Context.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

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

// --- Kernels ------------------------------------------------------------------------------------------------------------------------------

// Of cuda.h 13: the driver, which libtorch has loaded.
int (*error_text)(int code, const char** text);
int (*load_module)(void** module, const void* image);
int (*find_function)(void** function, void* module, const char* name);
int (*set_attribute)(void* function, int attribute, int value);
int (*launch_kernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void* stream, void** args, void**);

std::mutex lock;
std::map<int, void*> modules;
std::map<std::pair<int, std::string>, void*> functions;

template <class F>
void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    TORCH_CHECK(function, "the driver lacks ", name);
}

// In libtorch's form, by which faults are known.
std::string words(int code) {
    const char* text = nullptr;
    error_text(code, &text);
    return std::string("CUDA driver error: ") + (text ? text : "unknown error");
}

void set_kernels(int device, const void* image) {
    const std::lock_guard guard(lock);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(driver, "the driver cannot be loaded: ", dlerror());
    find(driver, "cuGetErrorString", error_text);
    find(driver, "cuModuleLoadData", load_module);
    find(driver, "cuModuleGetFunction", find_function);
    find(driver, "cuFuncSetAttribute", set_attribute);
    find(driver, "cuLaunchKernel", launch_kernel);
    // libtorch's own start: without it the allocator knows no device. Then the device's context, if it has none yet.
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
    C10_CUDA_CHECK(cudaFree(nullptr));
    void* module = nullptr;
    const int code = load_module(&module, image);
    TORCH_CHECK(code == 0, "the kernels: ", words(code));
    modules[device] = module;
}

void* function_of(int device, const char* name) {
    const std::lock_guard guard(lock);
    const auto key = std::make_pair(device, std::string(name));
    if (const auto there = functions.find(key); there != functions.end()) return there->second;
    const auto module = modules.find(device);
    TORCH_CHECK(module != modules.end(), "no kernels are loaded on GPU ", device);
    void* function = nullptr;
    const int code = find_function(&function, module->second, name);
    TORCH_CHECK(code == 0, "kernel ", name, ": ", words(code));
    return functions[key] = function;
}

constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;  // CU_FUNC_ATTRIBUTE_...
constexpr int SHARED_UNASKED = 48 << 10;          // what every kernel may have

void launch(const char* name, int device, int pieces, int rows, int threads, int shared, void** args) {
    // The driver's calls want the device's context on this thread, which the runtime's make on demand; and who has turned to another device meanwhile
    // stays with that.
    thread_local int bound = -1;
    const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
    if (bound != device) {
        C10_CUDA_CHECK(cudaSetDevice(device));
        bound = device;
    }
    void* stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
    void* function = function_of(device, name);
    int code = shared > SHARED_UNASKED ? set_attribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared) : 0;
    if (code == 0) code = launch_kernel(function, pieces, rows, 1, threads, 1, 1, shared, stream, args, nullptr);
    TORCH_CHECK(code == 0, "kernel ", name, " (", pieces, " × ", rows, " blocks of ", threads, "): ", words(code));
}

// --- The table ----------------------------------------------------------------------------------------------------------------------------

// A tensor, as libtorch's C interface has it.
const at::Tensor& tensor_of(const void* tensor) { return *static_cast<const at::Tensor*>(tensor); }

int64_t now(const c10::CachingAllocator::StatArray& stat) { return stat[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].current; }
int64_t peak(const c10::CachingAllocator::StatArray& stat) { return stat[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak; }

// libtorch 2.11 leaves its allocators recording when a capture cannot begin or end (mended in 2.12, pytorch #180395): every allocation would then
// ask a graph that is gone.
struct Graph : at::cuda::CUDAGraph {
    void begin(c10::MempoolId_t pool) {
        try {
            // Other threads go on with their own streams meanwhile: only what this thread does is held to the rules of a capture.
            capture_begin(pool, cudaStreamCaptureModeThreadLocal);
        } catch (...) {
            abandon();
            throw;
        }
    }

    void end() {
        try {
            capture_end();
        } catch (...) {
            abandon();
            throw;
        }
    }

 private:
    template <class F>
    static void quietly(F work) {
        try {
            work();
        } catch (...) {  // it had not begun
        }
    }

    void abandon() {
        if (capture_ended_ || capture_dev_ < 0) return;
        auto* host = at::getHostAllocator(at::kCUDA);
        quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_); });
        quietly([&] { c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_); });
        quietly([&] { host->end_allocate_to_pool(mempool_id_); });
        quietly([&] { host->release_pool(mempool_id_); });
    }
};

Graph* graph_of(void* graph) { return static_cast<Graph*>(graph); }

const EllaGpu table = {
    .error = [] { return ella_last_error.c_str(); },
    .capability = [](int device, int* major, int* minor) {
        return guarded([&] {
            C10_CUDA_CHECK(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
            C10_CUDA_CHECK(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
        });
    },
    .set_kernels = [](int device, const void* image) { return guarded([&] { set_kernels(device, image); }); },
    .launch = [](const char* name, int device, int pieces, int rows, int threads, int shared, void** args) {
        return guarded([&] { launch(name, device, pieces, rows, threads, shared, args); });
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
    .graph_begin = [](void* beside, void** graph) {
        return guarded([&] {
            auto made = std::make_unique<Graph>();
            const auto pool = beside ? graph_of(beside)->pool() : c10::MempoolId_t{0, 0};
            made->begin(pool);
            *graph = made.release();
        });
    },
    .graph_end = [](void* graph) { return guarded([&] { graph_of(graph)->end(); }); },
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
