// Fused operators on frozen networks: their gradients go to activations alone, and they keep no more of the forward pass than that needs.

#include "ops.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "error.h"
#include "kernels.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

const EllaGpu* gpu = nullptr;

// How a kernel is launched: (pieces, rows) blocks of so many threads.
struct Grid {
    int pieces, rows, threads;
};

// Runs one kernel on the device of `on`: on a GPU by its name, elsewhere block by block.
template <class... A>
void launch(const Tensor& on, const std::string& name, Grid grid, void (*kernel)(A...), std::type_identity_t<A>... args) {
    if (on.is_cuda()) {
        TORCH_CHECK(gpu, "the GPU's part is not loaded");
        void* places[] = {const_cast<void*>(static_cast<const void*>(&args))...};
        TORCH_CHECK(gpu->launch(name.c_str(), on.get_device(), grid.pieces, grid.rows, grid.threads, places) == 0, gpu->error());
        return;
    }
    for (int row = 0; row < grid.rows; ++row) {
        for (int piece = 0; piece < grid.pieces; ++piece) {
            ella::gridDim = {grid.pieces, grid.rows};
            ella::blockIdx = {piece, row};
            ella::blockDim = {grid.threads, 1};
            kernel(args...);
        }
    }
}

// Calls `work` with a number of the type that kernels take for the tensor's, and the suffix of their names.
template <class F>
void by_type(const Tensor& x, F work) {
    switch (x.scalar_type()) {
        case at::kFloat: return work(float{}, "_f32");
        case at::kBFloat16: return work(ella::bf16{}, "_bf16");
        case at::kHalf: return work(ella::f16{}, "_f16");
        default: TORCH_CHECK(false, "fused operators take float32, bfloat16 and float16, not ", x.scalar_type());
    }
}

template <class T>
T* numbers(const Tensor& x) {
    return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

Tensor channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// --- Group norm ---------------------------------------------------------------------------------------------------------------------------

// The shape of a norm's passes over x [B, C, H, W], which depends on nothing but that shape: so do its sums.
struct Passes {
    int B, P, C, G, chunk;
    Grid grid, groups;

    Passes(const Tensor& x, int64_t count) {
        TORCH_CHECK(x.dim() == 4, "a fused group norm takes [B, C, H, W], not ", x.sizes());
        B = static_cast<int>(x.size(0));
        C = static_cast<int>(x.size(1));
        P = static_cast<int>(x.size(2) * x.size(3));
        G = static_cast<int>(count);
        const int lanes = C / ella::VECTOR;
        TORCH_CHECK(C % ella::VECTOR == 0 && C % G == 0 && lanes <= ella::MAX_THREADS, "a fused group norm takes channels in multiples of ",
                    ella::VECTOR, " up to ", ella::VECTOR * ella::MAX_THREADS, ", not ", C, " in ", G, " groups");
        const int rows = std::max(1, ella::MAX_THREADS / lanes);
        // Eight pixels a thread: enough to pay for a block's start and its sums, few enough that the last blocks keep few processors waiting.
        chunk = 8 * rows;
        grid = {(P + chunk - 1) / chunk, B, rows * lanes};
        groups = {1, B, 256};
    }

    Tensor sums(const Tensor& x) const { return at::empty({B, grid.pieces, G, 2}, x.options().dtype(at::kFloat)); }
    Tensor per_group(const Tensor& x) const { return at::empty({B, G, 2}, x.options().dtype(at::kFloat)); }
};

// What goes past the norm comes out beside its result, so that both gradients are added up in one pass.
struct GroupNorm : torch::autograd::Function<GroupNorm> {
    static variable_list forward(AutogradContext* ctx, const Tensor& map, const Tensor& gamma, const Tensor& beta, const std::optional<Tensor>& more,
                          int64_t count, double eps, bool activate) {
        const Tensor add = more.value_or(Tensor());
        const Tensor x = channels_last(map), y = at::empty_like(x);
        const Passes n(x, count);
        const Tensor sums = n.sums(x), stats = n.per_group(x);
        by_type(x, [&](auto number, const char* type) {
            using T = decltype(number);
            const auto* a = numbers<float>(add);
            launch(x, std::string("norm_sums") + type, n.grid, &ella::norm_sums<T>, numbers<T>(x), a, numbers<float>(sums), n.P, n.C, n.G, n.chunk);
            launch(x, std::string("norm_stats") + type, n.groups, &ella::norm_stats<T>, numbers<T>(x), a, numbers<float>(sums),
                   numbers<float>(stats), n.P, n.C, n.G, n.grid.pieces, static_cast<float>(eps));
            launch(x, std::string("norm_apply") + type, n.grid, &ella::norm_apply<T>, numbers<T>(x), a, numbers<float>(stats),
                   numbers<T>(gamma), numbers<T>(beta), numbers<T>(y), n.P, n.C, n.G, n.chunk, static_cast<int>(activate));
        });
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({x, gamma, beta, add, stats});
        ctx->saved_data["groups"] = count;
        ctx->saved_data["activate"] = activate;
        ctx->saved_data["by_add"] = add.defined() && add.requires_grad();
        return {x, y};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &gamma = saved[1], &beta = saved[2], &add = saved[3], &stats = saved[4];
        const Tensor none, dy = grads[1].defined() ? channels_last(grads[1]) : at::zeros_like(x);
        const Tensor past = grads[0].defined() ? channels_last(grads[0]) : none, dx = at::empty_like(x);
        // What is added does not go past the norm: its gradient is to be taken before that of what does comes in.
        const bool by_add = ctx->saved_data["by_add"].toBool();
        const Tensor more = by_add ? none : past;
        const Passes n(x, ctx->saved_data["groups"].toInt());
        const int activate = ctx->saved_data["activate"].toBool();
        const Tensor sums = n.sums(x), means = n.per_group(x);
        by_type(x, [&](auto number, const char* type) {
            using T = decltype(number);
            const auto* a = numbers<float>(add);
            launch(x, std::string("norm_back_sums") + type, n.grid, &ella::norm_back_sums<T>, numbers<T>(x), a, numbers<float>(stats),
                   numbers<T>(gamma), numbers<T>(beta), numbers<T>(dy), numbers<float>(sums), n.P, n.C, n.G, n.chunk, activate);
            launch(x, "norm_back_means_f32", n.groups, &ella::norm_back_means, numbers<float>(sums), numbers<float>(means), n.P, n.C, n.G,
                   n.grid.pieces);
            launch(x, std::string("norm_back_apply") + type, n.grid, &ella::norm_back_apply<T>, numbers<T>(x), a, numbers<float>(stats),
                   numbers<T>(gamma), numbers<T>(beta), numbers<T>(dy), numbers<T>(more), numbers<float>(means), numbers<T>(dx), n.P, n.C, n.G,
                   n.chunk, activate);
        });
        const Tensor added = by_add ? dx.sum({2, 3}, false, at::kFloat) : none;
        if (by_add && past.defined()) dx.add_(past);
        return {dx, none, none, added, none, none, none};
    }
};

// --- Convolution --------------------------------------------------------------------------------------------------------------------------

// libtorch's own keeps the input for a gradient of the weight that nobody asks for. The gradient by the input needs its size only.
struct FrozenConv : torch::autograd::Function<FrozenConv> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
        ctx->saved_data["weight"] = weight;
        ctx->saved_data["height"] = x.size(2);
        ctx->saved_data["width"] = x.size(3);
        ctx->saved_data["stride"] = stride;
        ctx->saved_data["padding"] = padding;
        return at::convolution(x, weight, {}, {stride, stride}, {padding, padding}, {1, 1}, false, {0, 0}, 1);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Tensor weight = ctx->saved_data["weight"].toTensor(), none;
        const int64_t stride = ctx->saved_data["stride"].toInt(), padding = ctx->saved_data["padding"].toInt();
        // What is left of the input beyond the last place of the kernel.
        const auto rest = [&](int64_t size, int axis) { return size - ((grads[0].size(axis) - 1) * stride - 2 * padding + weight.size(axis)); };
        const int64_t below = rest(ctx->saved_data["height"].toInt(), 2), right = rest(ctx->saved_data["width"].toInt(), 3);
        const Tensor dx = at::convolution(grads[0], weight, {}, {stride, stride}, {padding, padding}, {1, 1}, true, {below, right}, 1);
        return {dx, none, none, none};
    }
};

// --- Feed-forward and residual ------------------------------------------------------------------------------------------------------------

Grid flat(int64_t count) {
    constexpr int threads = 256;
    const int64_t each = threads * ella::VECTOR;
    return {static_cast<int>((count + each - 1) / each), 1, threads};
}

// `both` [.., 2D] as the result of half its width.
Tensor halved(const Tensor& both) {
    TORCH_CHECK(both.size(-1) % (2 * ella::VECTOR) == 0, "a fused gate takes twice a multiple of ", ella::VECTOR, ", not ", both.size(-1));
    auto sizes = both.sizes().vec();
    sizes.back() /= 2;
    return at::empty(sizes, both.options());
}

struct Geglu : torch::autograd::Function<Geglu> {
    static Tensor forward(AutogradContext* ctx, const Tensor& input) {
        const Tensor both = input.contiguous(), y = halved(both);
        by_type(both, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(y, std::string("geglu") + type, flat(y.numel()), &ella::geglu<T>, numbers<T>(both), numbers<T>(y), y.numel(),
                   static_cast<int>(y.size(-1)));
        });
        ctx->save_for_backward({both});
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Tensor both = ctx->get_saved_variables()[0], dy = grads[0].contiguous(), dboth = at::empty_like(both);
        by_type(both, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(dy, std::string("geglu_back") + type, flat(dy.numel()), &ella::geglu_back<T>, numbers<T>(both), numbers<T>(dy),
                   numbers<T>(dboth), dy.numel(), static_cast<int>(both.size(-1) / 2));
        });
        return {dboth};
    }
};

// Rows of a layer norm over the last axis.
struct Rows {
    int N, D;
    Grid grid;

    explicit Rows(const Tensor& x) {
        D = static_cast<int>(x.size(-1));
        N = static_cast<int>(x.numel() / std::max(D, 1));
        const int lanes = D / ella::VECTOR;
        TORCH_CHECK(D % ella::VECTOR == 0 && lanes > 0 && lanes <= ella::MAX_THREADS, "a fused layer norm takes rows in multiples of ",
                    ella::VECTOR, " up to ", ella::VECTOR * ella::MAX_THREADS, ", not ", D);
        const int rows = std::min(ella::MAX_ROWS, ella::MAX_THREADS / lanes);
        grid = {std::max(1, (N + rows - 1) / rows), 1, rows * lanes};
    }
};

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
    static variable_list forward(AutogradContext* ctx, const Tensor& first, const std::optional<Tensor>& second, const Tensor& gamma,
                                 const Tensor& beta, double eps) {
        const Tensor a = first.contiguous(), b = second ? second->contiguous() : Tensor();
        TORCH_CHECK(!second || a.sizes() == b.sizes(), "a fused residual takes two tensors of one shape, not ", a.sizes(), " and ", b.sizes());
        const Tensor sum = second ? at::empty_like(a) : a, y = at::empty_like(a);
        const Rows n(a);
        const Tensor stats = at::empty({n.N, 2}, a.options().dtype(at::kFloat));
        by_type(a, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(a, std::string("layer_norm") + type, n.grid, &ella::layer_norm<T>, numbers<T>(a), numbers<T>(b), numbers<T>(gamma),
                   numbers<T>(beta), numbers<T>(sum), numbers<T>(y), numbers<float>(stats), n.N, n.D, static_cast<float>(eps));
        });
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({sum, gamma, stats});
        ctx->saved_data["adds"] = second.has_value();
        return {sum, y};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &gamma = saved[1], &stats = saved[2], none;
        const Tensor dy = grads[1].defined() ? grads[1].contiguous() : at::zeros_like(x);
        const Tensor more = grads[0].defined() ? grads[0].contiguous() : none, dx = at::empty_like(x);
        const Rows n(x);
        by_type(x, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(x, std::string("layer_norm_back") + type, n.grid, &ella::layer_norm_back<T>, numbers<T>(x), numbers<T>(gamma),
                   numbers<float>(stats), numbers<T>(dy), numbers<T>(more), numbers<T>(dx), n.N, n.D);
        });
        return {dx, ctx->saved_data["adds"].toBool() ? dx : none, none, none, none};
    }
};

struct AddBiased : torch::autograd::Function<AddBiased> {
    static Tensor forward(AutogradContext*, const Tensor& first, const Tensor& second, const Tensor& bias) {
        const Tensor a = channels_last(first), b = channels_last(second), y = at::empty_like(a);
        TORCH_CHECK(a.sizes() == b.sizes() && bias.dim() == 1 && bias.size(0) == a.size(1) && a.size(1) % ella::VECTOR == 0,
                    "a fused residual takes two maps of one shape and a bias, not ", a.sizes(), ", ", b.sizes(), " and ", bias.sizes());
        by_type(a, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(a, std::string("add_biased") + type, flat(a.numel()), &ella::add_biased<T>, numbers<T>(a), numbers<T>(b),
                   numbers<float>(bias), numbers<T>(y), a.numel(), static_cast<int>(a.size(1)));
        });
        return y;
    }

    static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], grads[0], Tensor()}; }
};

// --- Text encoders ------------------------------------------------------------------------------------------------------------------------

void refuse_gradient(const Tensor& x) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()), "there is no gradient through this fused operator: use the plain one");
}

Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
    refuse_gradient(input);
    const Tensor x = input.contiguous(), y = at::empty_like(x);
    const Rows n(x);
    by_type(x, [&](auto number, const char* type) {
        using T = decltype(number);
        launch(x, std::string("rms_norm") + type, n.grid, &ella::rms_norm<T>, numbers<T>(x), numbers<T>(weight), numbers<T>(y), n.N, n.D,
               static_cast<float>(eps));
    });
    return y;
}

Tensor gated_gelu(const Tensor& input) {
    refuse_gradient(input);
    const Tensor both = input.contiguous(), y = halved(both);
    by_type(both, [&](auto number, const char* type) {
        using T = decltype(number);
        launch(y, std::string("gated_gelu") + type, flat(y.numel()), &ella::gated_gelu<T>, numbers<T>(both), numbers<T>(y), y.numel(),
               static_cast<int>(y.size(-1)));
    });
    return y;
}

// --- The C interface ----------------------------------------------------------------------------------------------------------------------

const Tensor& tensor_of(const void* tensor) { return *static_cast<const Tensor*>(tensor); }
std::optional<Tensor> maybe(const void* tensor) { return tensor ? std::optional(tensor_of(tensor)) : std::nullopt; }
void* given(Tensor tensor) { return new Tensor(std::move(tensor)); }

}  // namespace

const char* ella_error() { return ella_last_error.c_str(); }
void ella_use_gpu(const EllaGpu* table) { gpu = table; }

int ella_group_norm(const void* x, const void* gamma, const void* beta, const void* add, int64_t groups, double eps, int activate, void** past,
                    void** y) {
    return ella_guarded(1, [&] {
        auto made = GroupNorm::apply(tensor_of(x), tensor_of(gamma), tensor_of(beta), maybe(add), groups, eps, activate != 0);
        *past = given(made[0]);
        *y = given(made[1]);
        return 0;
    });
}
void* ella_frozen_conv2d(const void* x, const void* weight, int64_t stride, int64_t padding) {
    return ella_guarded<void*>(nullptr, [&] { return given(FrozenConv::apply(tensor_of(x), tensor_of(weight), stride, padding)); });
}
void* ella_geglu(const void* both) {
    return ella_guarded<void*>(nullptr, [&] { return given(Geglu::apply(tensor_of(both))); });
}
int ella_add_layer_norm(const void* a, const void* b, const void* gamma, const void* beta, double eps, void** sum, void** y) {
    return ella_guarded(1, [&] {
        auto made = AddLayerNorm::apply(tensor_of(a), maybe(b), tensor_of(gamma), tensor_of(beta), eps);
        *sum = given(made[0]);
        *y = given(made[1]);
        return 0;
    });
}
int ella_adamw(const void* p, const void* g, const void* m, const void* v, const void* ema, const float* rates) {
    return ella_guarded(1, [&] {
        const Tensor& params = tensor_of(p);
        ella::Rates r;
        static_assert(sizeof r == 9 * sizeof(float));
        std::memcpy(&r, rates, sizeof r);
        launch(params, "adamw_f32", flat(params.numel()), &ella::adamw, numbers<float>(params), numbers<float>(tensor_of(g)),
               numbers<float>(tensor_of(m)), numbers<float>(tensor_of(v)), numbers<float>(tensor_of(ema)), params.numel(), r);
        return 0;
    });
}
void* ella_rms_norm(const void* x, const void* weight, double eps) {
    return ella_guarded<void*>(nullptr, [&] { return given(rms_norm(tensor_of(x), tensor_of(weight), eps)); });
}
void* ella_gated_gelu(const void* both) {
    return ella_guarded<void*>(nullptr, [&] { return given(gated_gelu(tensor_of(both))); });
}
void* ella_add_biased(const void* a, const void* b, const void* bias) {
    return ella_guarded<void*>(nullptr, [&] { return given(AddBiased::apply(tensor_of(a), tensor_of(b), tensor_of(bias))); });
}
