// Fused operators on frozen networks: their gradients go to activations alone, and they keep no more of the forward pass than that needs.

#include "ops.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "error.h"
#include "device.h"
#include "kernels.h"
#include "few_keys.h"
#include "pixels.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

const EllaGpu* gpu = nullptr;
const EllaEmulator* emulator = nullptr;

// How a kernel is launched: (pieces, rows) blocks of so many threads, with so many bytes on the chip beside those that it names itself.
struct Grid {
    int pieces, rows, threads, shared = 0;
};

// Runs one kernel on the device of `on`: on a GPU by its name, elsewhere block by block.
template <class... A>
void launch(const Tensor& on, const std::string& name, Grid grid, void (*kernel)(A...), std::type_identity_t<A>... args) {
    if (grid.pieces == 0 || grid.rows == 0) return;  // of nothing
    if (on.is_cuda()) {
        TORCH_CHECK(gpu, "the GPU's part is not loaded");
        void* places[] = {const_cast<void*>(static_cast<const void*>(&args))...};
        TORCH_CHECK(gpu->launch(name.c_str(), on.get_device(), grid.pieces, grid.rows, grid.threads, grid.shared, places) == 0, gpu->error());
        return;
    }
    if (auto* const emulated = emulator ? reinterpret_cast<void (*)(A...)>(emulator->find(name.c_str())) : nullptr) {
        auto thread = [&] { emulated(args...); };
        emulator->run(grid.pieces, grid.rows, grid.threads, grid.shared, [](void* work) { (*static_cast<decltype(thread)*>(work))(); }, &thread);
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

// What kernels read and write in packs of 16 bytes; null for a tensor that is not there.
template <class T>
T* numbers(const Tensor& x) {
    if (!x.defined()) return nullptr;
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, "fused operators take tensors that start at a multiple of 16 bytes");
    return static_cast<T*>(x.data_ptr());
}

Tensor channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// --- Group norm ---------------------------------------------------------------------------------------------------------------------------

// A map [B, C, H, W] in one tensor, or its first channels in one and the others in another; empty where there is none.
struct Map {
    Tensor first, second;

    Map like() const { return {at::empty_like(first), second.defined() ? at::empty_like(second) : Tensor()}; }
    int64_t channels() const { return first.size(1) + (second.defined() ? second.size(1) : 0); }

    template <class T>
    ella::Joined<T> joined() const {
        using Number = std::remove_const_t<T>;
        return {numbers<Number>(first), numbers<Number>(second), first.defined() ? static_cast<int>(first.size(1)) : 0};
    }
};

// The shape of a norm's passes over x [B, C, H, W], which depends on nothing but that shape: so do its sums.
struct Passes {
    int B, P, C, G, chunk;
    Grid grid, groups;

    Passes(const Map& map, int64_t count) {
        const Tensor& x = map.first;
        TORCH_CHECK(x.dim() == 4, "a fused group norm takes [B, C, H, W], not ", x.sizes());
        B = static_cast<int>(x.size(0));
        C = static_cast<int>(map.channels());
        P = static_cast<int>(x.size(2) * x.size(3));
        G = static_cast<int>(count);
        const int lanes = C / ella::VECTOR;
        TORCH_CHECK(C % ella::VECTOR == 0 && x.size(1) % ella::VECTOR == 0 && C % G == 0 && lanes <= ella::MAX_THREADS,
                    "a fused group norm takes channels in multiples of ", ella::VECTOR, " up to ", ella::VECTOR * ella::MAX_THREADS, ", not ", C,
                    " in ", G, " groups");
        TORCH_CHECK(static_cast<int64_t>(P) * C < INT32_MAX, "a fused group norm takes fewer than 2^31 numbers of a sample, not ", x.sizes());
        const int rows = std::max(1, ella::MAX_THREADS / lanes);
        // Eight pixels a thread: enough to pay for a block's start and its sums, few enough that the last blocks keep few processors waiting.
        chunk = 8 * rows;
        grid = {(P + chunk - 1) / chunk, B, rows * lanes};
        groups = {1, B, 256};
    }

    Tensor sums(const Tensor& x) const { return at::empty({B, grid.pieces, G, 2}, x.options().dtype(at::kFloat)); }
    Tensor per_group(const Tensor& x) const { return at::empty({B, G, 2}, x.options().dtype(at::kFloat)); }
};

// What goes past the norm comes out beside its result, so that both gradients are added up in one pass: the norm, x, and where x is of two parts the
// second.
struct GroupNorm : torch::autograd::Function<GroupNorm> {
    static variable_list forward(AutogradContext* ctx, const Tensor& map, const std::optional<Tensor>& second, const Tensor& gamma,
                                 const Tensor& beta, const std::optional<Tensor>& more, int64_t count, double eps, bool activate) {
        const Tensor add = more.value_or(Tensor());
        const Map x = {channels_last(map), second ? channels_last(*second) : Tensor()};
        const Passes n(x, count);
        const Tensor sums = n.sums(x.first), stats = n.per_group(x.first);
        const Tensor y = at::empty({n.B, n.C, map.size(2), map.size(3)}, map.options(), at::MemoryFormat::ChannelsLast);
        by_type(y, [&](auto number, const char* type) {
            using T = decltype(number);
            const auto* a = numbers<float>(add);
            const auto from = x.joined<const T>();
            launch(y, std::string("norm_sums") + type, n.grid, &ella::norm_sums<T>, from, a, numbers<float>(sums), n.P, n.C, n.G, n.chunk);
            launch(y, std::string("norm_stats") + type, n.groups, &ella::norm_stats<T>, from, a, numbers<float>(sums), numbers<float>(stats), n.P,
                   n.C, n.G, n.grid.pieces, static_cast<float>(eps));
            launch(y, std::string("norm_apply") + type, n.grid, &ella::norm_apply<T>, from, a, numbers<float>(stats), numbers<T>(gamma),
                   numbers<T>(beta), numbers<T>(y), n.P, n.C, n.G, n.chunk, static_cast<int>(activate));
        });
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({x.first, x.second, gamma, beta, add, stats});
        ctx->saved_data["groups"] = count;
        ctx->saved_data["activate"] = activate;
        ctx->saved_data["by_add"] = add.defined() && add.requires_grad();
        if (second) return {y, x.first, x.second};
        return {y, x.first};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Map x = {saved[0], saved[1]}, dx = x.like();
        const Tensor &gamma = saved[2], &beta = saved[3], &add = saved[4], &stats = saved[5], none;
        const Passes n(x, ctx->saved_data["groups"].toInt());
        const auto sizes = [&] { return std::vector<int64_t>{n.B, n.C, x.first.size(2), x.first.size(3)}; };
        const Tensor dy = grads[0].defined() ? channels_last(grads[0])
                                             : at::zeros(sizes(), x.first.options()).contiguous(at::MemoryFormat::ChannelsLast);
        const Map past = gone_past(x, grads);
        // What is added does not go past the norm: its gradient is to be taken before that of what does comes in.
        const bool by_add = ctx->saved_data["by_add"].toBool();
        const Map more = by_add ? Map{} : past;
        const int activate = ctx->saved_data["activate"].toBool();
        const Tensor sums = n.sums(dy), means = n.per_group(dy);
        by_type(dy, [&](auto number, const char* type) {
            using T = decltype(number);
            const auto* a = numbers<float>(add);
            const auto from = x.joined<const T>();
            launch(dy, std::string("norm_back_sums") + type, n.grid, &ella::norm_back_sums<T>, from, a, numbers<float>(stats), numbers<T>(gamma),
                   numbers<T>(beta), numbers<T>(dy), numbers<float>(sums), n.P, n.C, n.G, n.chunk, activate);
            launch(dy, "norm_back_means_f32", n.groups, &ella::norm_back_means, numbers<float>(sums), numbers<float>(means), n.P, n.C, n.G,
                   n.grid.pieces);
            launch(dy, std::string("norm_back_apply") + type, n.grid, &ella::norm_back_apply<T>, from, a, numbers<float>(stats),
                   numbers<T>(gamma), numbers<T>(beta), numbers<T>(dy), more.joined<const T>(), numbers<float>(means), dx.joined<T>(), n.P, n.C,
                   n.G, n.chunk, activate);
        });
        Tensor added;
        if (by_add) {
            added = dx.first.sum({2, 3}, false, at::kFloat);
            if (dx.second.defined()) added = at::cat({added, dx.second.sum({2, 3}, false, at::kFloat)}, 1);
            if (past.first.defined()) dx.first.add_(past.first);
            if (past.second.defined()) dx.second.add_(past.second);
        }
        return {dx.first, dx.second, none, none, added, none, none, none};
    }

private:
    // The gradient by what goes past: of both parts, if of any.
    static Map gone_past(const Map& x, const variable_list& grads) {
        const auto part = [&](const Tensor& of, size_t i) { return grads[i].defined() ? channels_last(grads[i]) : at::zeros_like(of); };
        const bool two = x.second.defined(), any = grads[1].defined() || (two && grads[2].defined());
        if (!any) return {};
        return {part(x.first, 1), two ? part(x.second, 2) : Tensor()};
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

// --- Changes of resolution ----------------------------------------------------------------------------------------------------------------
//
// Twice the resolution by nearest neighbours and then a 3 × 3 convolution take nine products for a pixel, of which five are of numbers that stand in two
// places: four do, by sums of the weights, one kernel of 2 × 2 for each of the four places of a pixel in its square. And the gradient by the input
// of a convolution of stride 2 is of that form too, for which cuDNN has but a slow way.

Grid flat(int64_t count) {
    constexpr int threads = 256;
    const int64_t each = threads * ella::VECTOR;
    return {static_cast<int>((count + each - 1) / each), 1, threads};
}
unsigned int packs_of(const Tensor& x) { return static_cast<unsigned int>(x.numel() / ella::VECTOR); }

Tensor convolved(const Tensor& x, const Tensor& weight, int64_t stride) {
    return at::convolution(x, weight, {}, {stride, stride}, {1, 1}, {1, 1}, false, {0, 0}, 1);
}

// The convolution of x [B, D, H, W] with four kernels [4 C, D, 2, 2], woven into [B, C, 2H, 2W].
Tensor woven(const Tensor& input, const Tensor& weight, const Tensor& bias, int shift) {
    const int64_t channels = weight.size(0) / 4;
    TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && weight.size(0) % (4 * ella::VECTOR) == 0 && weight.size(1) == input.size(1),
                "a fused change of resolution takes [B, D, H, W] and kernels [4 C, D, 2, 2], C a multiple of ", ella::VECTOR, ", not ",
                input.sizes(), " and ", weight.sizes());
    const Tensor quarters = channels_last(convolved(channels_last(input), weight, 1));
    const int64_t height = input.size(2), width = input.size(3);
    const Tensor y = at::empty({input.size(0), channels, 2 * height, 2 * width}, quarters.options(), at::MemoryFormat::ChannelsLast);
    by_type(y, [&](auto number, const char* type) {
        using T = decltype(number);
        launch(y, std::string("weave") + type, flat(y.numel()), &ella::weave<T>, numbers<T>(quarters), numbers<float>(bias), numbers<T>(y),
               packs_of(y), static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels), shift);
    });
    return y;
}

struct FrozenDouble : torch::autograd::Function<FrozenDouble> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& back, const Tensor& bias) {
        ctx->saved_data["back"] = back;
        return woven(x, weight, bias, 0);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Tensor none;
        return {convolved(channels_last(grads[0]), ctx->saved_data["back"].toTensor(), 2), none, none, none};
    }
};

struct FrozenHalf : torch::autograd::Function<FrozenHalf> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& back) {
        TORCH_CHECK(x.size(2) % 2 == 0 && x.size(3) % 2 == 0, "a fused half takes even heights and widths, not ", x.sizes());
        ctx->saved_data["back"] = back;
        return convolved(x, weight, 2);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Tensor none;
        return {woven(grads[0], ctx->saved_data["back"].toTensor(), none, 1), none, none};
    }
};

// --- Feed-forward and residual ------------------------------------------------------------------------------------------------------------

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
            launch(y, std::string("geglu") + type, flat(y.numel()), &ella::geglu<T>, numbers<T>(both), numbers<T>(y), packs_of(y),
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
                   numbers<T>(dboth), packs_of(dy), static_cast<int>(both.size(-1) / 2));
        });
        return {dboth};
    }
};

constexpr int ROW_LANES = 32;  // threads that share a row at most: a warp

// Rows of a norm over the last axis, of which one thread holds at most so many packs at a time.
struct Rows {
    int N, D, lanes;
    Grid grid;

    Rows(const Tensor& x, int held) {
        D = static_cast<int>(x.size(-1));
        N = static_cast<int>(x.numel() / std::max(D, 1));
        TORCH_CHECK(D % ella::VECTOR == 0 && D > 0 && D / ella::VECTOR <= held * ROW_LANES, "a fused norm of rows takes multiples of ",
                    ella::VECTOR, " up to ", static_cast<int64_t>(held) * ROW_LANES * ella::VECTOR, ", not ", D);
        for (lanes = 1; lanes < ROW_LANES && lanes * ella::HELD * ella::VECTOR < D;) lanes *= 2;
        const int rows = ella::ROW_THREADS / lanes;
        grid = {std::max(1, (N + rows - 1) / rows), 1, ella::ROW_THREADS};
    }
};

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
    static variable_list forward(AutogradContext* ctx, const Tensor& first, const std::optional<Tensor>& second, const Tensor& gamma,
                                 const Tensor& beta, double eps) {
        const Tensor a = first.contiguous(), b = second ? second->contiguous() : Tensor();
        TORCH_CHECK(!second || a.sizes() == b.sizes(), "a fused residual takes two tensors of one shape, not ", a.sizes(), " and ", b.sizes());
        const Tensor sum = second ? at::empty_like(a) : a, y = at::empty_like(a);
        const Rows n(a, ella::HELD);
        const Tensor stats = at::empty({n.N, 2}, a.options().dtype(at::kFloat));
        by_type(a, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(a, std::string("layer_norm") + type, n.grid, &ella::layer_norm<T>, numbers<T>(a), numbers<T>(b), numbers<T>(gamma),
                   numbers<T>(beta), numbers<T>(sum), numbers<T>(y), numbers<float>(stats), n.N, n.D, n.lanes,
                   static_cast<float>(eps));
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
        const Rows n(x, ella::HELD);
        by_type(x, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(x, std::string("layer_norm_back") + type, n.grid, &ella::layer_norm_back<T>, numbers<T>(x), numbers<T>(gamma),
                   numbers<float>(stats), numbers<T>(dy), numbers<T>(more), numbers<T>(dx), n.N, n.D, n.lanes);
        });
        return {dx, ctx->saved_data["adds"].toBool() ? dx : none, none, none, none};
    }
};

// A connector's norm, of rows that may be float32 where what it makes is not.
struct AdaLayerNorm : torch::autograd::Function<AdaLayerNorm> {
    struct Shape {
        int B, tokens, D, lanes, parts;
        Grid there, back;

        Shape(const Tensor& x, const Tensor& lead) {
            TORCH_CHECK(x.dim() == 3 && x.numel() > 0 && lead.dim() == 2 && lead.size(0) == x.size(0) && lead.size(1) == 2 * x.size(2) &&
                            lead.scalar_type() == at::kFloat && lead.device() == x.device(),
                        "a fused adaptive norm takes [B, N, D] and float32 [B, 2 D], not ", x.sizes(), " and ", lead.sizes());
            TORCH_CHECK(x.numel() < INT32_MAX, "a fused adaptive norm takes fewer than 2^31 numbers, not ", x.sizes());
            const Rows n(x, ella::HELD);
            B = static_cast<int>(x.size(0));
            tokens = static_cast<int>(x.size(1));
            D = n.D;
            lanes = n.lanes;
            parts = (tokens + ella::ADA_ROWS - 1) / ella::ADA_ROWS;
            const int rows = ella::ROW_THREADS / lanes;
            there = n.grid;
            back = {(B * parts + rows - 1) / rows, 1, ella::ROW_THREADS};
        }
    };

    // Calls `work` with a number of x's type and one of `kind`, and the suffix of their kernels' names.
    template <class F>
    static void by_types(const Tensor& x, at::ScalarType kind, F work) {
        TORCH_CHECK(x.scalar_type() == kind || x.scalar_type() == at::kFloat, "a fused adaptive norm makes ", x.scalar_type(),
                    " of itself or of float32, not ", kind);
        by_type(x, [&](auto from, const char* name) {
            using X = decltype(from);
            if (x.scalar_type() == kind) return work(X{}, X{}, std::string(name) + name);
            if constexpr (std::is_same_v<X, float>) {
                kind == at::kBFloat16 ? work(X{}, ella::bf16{}, std::string("_f32_bf16")) : work(X{}, ella::f16{}, std::string("_f32_f16"));
            }
        });
    }

    static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& leading, double eps, at::ScalarType kind) {
        const Tensor x = input.contiguous(), lead = leading.contiguous();
        const Shape n(x, lead);
        const Tensor y = at::empty(x.sizes(), x.options().dtype(kind)), stats = at::empty({n.B, n.tokens, 2}, lead.options());
        by_types(x, kind, [&](auto from, auto to, const std::string& types) {
            using X = decltype(from);
            using T = decltype(to);
            launch(x, "ada_layer_norm" + types, n.there, &ella::ada_layer_norm<X, T>, numbers<X>(x), numbers<float>(lead), numbers<T>(y),
                   numbers<float>(stats), n.B, n.tokens, n.D, n.lanes, static_cast<float>(eps));
        });
        ctx->save_for_backward({x, lead, stats});
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &lead = saved[1], &stats = saved[2], none, dy = grads[0].contiguous();
        const Shape n(x, lead);
        const Tensor dx = at::empty_like(x), dlead = at::empty_like(lead), sums = at::empty({n.parts, n.B, 2 * n.D}, lead.options());
        by_types(x, dy.scalar_type(), [&](auto from, auto to, const std::string& types) {
            using X = decltype(from);
            using T = decltype(to);
            launch(x, "ada_layer_norm_back" + types, n.back, &ella::ada_layer_norm_back<X, T>, numbers<X>(x), numbers<float>(lead),
                   numbers<float>(stats), numbers<T>(dy), numbers<X>(dx), numbers<float>(sums), n.B, n.tokens, n.D, n.lanes);
            launch(x, "sum_parts_f32", flat(dlead.numel()), &ella::sum_parts<float>, numbers<float>(sums), numbers<float>(dlead),
                   packs_of(dlead), n.parts);
        });
        return {dx, dlead, none, none};
    }
};

struct AddBiased : torch::autograd::Function<AddBiased> {
    static Tensor forward(AutogradContext* ctx, const Tensor& first, const Tensor& second, const std::optional<Tensor>& third, const Tensor& bias) {
        const Tensor a = channels_last(first), b = channels_last(second), c = third ? channels_last(*third) : Tensor(), y = at::empty_like(a);
        TORCH_CHECK(a.sizes() == b.sizes() && (!third || a.sizes() == c.sizes()) && bias.dim() == 1 && bias.size(0) == a.size(1) &&
                        a.size(1) % ella::VECTOR == 0,
                    "a fused residual takes maps of one shape and a bias, not ", a.sizes(), ", ", b.sizes(), " and ", bias.sizes());
        by_type(a, [&](auto number, const char* type) {
            using T = decltype(number);
            launch(a, std::string("add_biased") + type, flat(a.numel()), &ella::add_biased<T>, numbers<T>(a), numbers<T>(b), numbers<T>(c),
                   numbers<float>(bias), numbers<T>(y), packs_of(a), static_cast<int>(a.size(1)));
        });
        ctx->saved_data["three"] = third.has_value();
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        return {grads[0], grads[0], ctx->saved_data["three"].toBool() ? grads[0] : Tensor(), Tensor()};
    }
};

// --- Attention to few keys ----------------------------------------------------------------------------------------------------------------

// Calls `work` with the channels of a head, as a number that is known when this is compiled.
template <class F>
void by_width(int64_t width, F work) {
    switch (width) {
        case 40: return work(std::integral_constant<int, 40>{});
        case 64: return work(std::integral_constant<int, 64>{});
        case 80: return work(std::integral_constant<int, 80>{});
        case 160: return work(std::integral_constant<int, 160>{});
        default: TORCH_CHECK(false, "a fused attention to few keys takes heads of 40, 64, 80 or 160 channels, not ", width);
    }
}

struct FewKeys : torch::autograd::Function<FewKeys> {
    // The shape of its passes, which depends on nothing but that of what it takes: so do its sums.
    struct Shape {
        int B, N, L, H, tiles;
        int64_t width;
        float scale, slope;

        Shape(const Tensor& q, const Tensor& kv, int64_t heads) {
            TORCH_CHECK(q.dim() == 3 && kv.dim() == 3 && q.size(0) == kv.size(0) && kv.size(2) == 2 * q.size(2) &&
                            q.device() == kv.device() && q.scalar_type() == kv.scalar_type() && heads > 0 && q.size(2) % heads == 0 &&
                            q.numel() > 0 && kv.numel() > 0 && kv.size(1) <= ella::KEYS,
                        "a fused attention to few keys takes [B, N, C] and [B, L, 2 C] of one kind, L at most ", ella::KEYS, ", not ", q.sizes(),
                        " and ", kv.sizes(), " for ", heads, " heads");
            B = static_cast<int>(q.size(0));
            N = static_cast<int>(q.size(1));
            L = static_cast<int>(kv.size(1));
            H = static_cast<int>(heads);
            tiles = (N + ella::TILE - 1) / ella::TILE;
            width = q.size(2) / heads;
            slope = 1.0f / std::sqrt(static_cast<float>(width));
            scale = slope * 1.44269504088896341f;
        }

        // Four tiles of queries pay for a block's keys and values.
        int parts() const { return std::max(1, tiles / 4); }
        // So few that what they add up, in float32, is little beside the queries; but enough blocks for a GPU, of which there are few samples.
        int summed() const {
            constexpr int fewest = 4, busy = 512;
            return std::min(parts(), std::max(fewest, busy / (B * H)));
        }
    };

    static Tensor forward(AutogradContext* ctx, const Tensor& queries, const Tensor& both, int64_t heads) {
        const Tensor q = queries.contiguous(), kv = both.contiguous(), y = at::empty_like(q);
        const Shape n(q, kv, heads);
        by_type(q, [&](auto number, const char* type) {
            using T = decltype(number);
            by_width(n.width, [&](auto width) {
                using Of = ella::Head<T, width()>;
                const Grid grid = {n.parts() * n.H, n.B, Of::THREADS, Of::FORWARD * static_cast<int>(sizeof(T))};
                launch(q, "attention_few_keys_" + std::to_string(width()) + type, grid, &ella::few_keys<T, width()>, numbers<T>(q), numbers<T>(kv),
                       numbers<T>(y), n.N, n.L, n.H, n.scale);
            });
        });
        ctx->save_for_backward({q, kv});
        ctx->saved_data["heads"] = heads;
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &q = saved[0], &kv = saved[1], none, dy = grads[0].contiguous();
        const Shape n(q, kv, ctx->saved_data["heads"].toInt());
        const Tensor dq = ctx->needs_input_grad(0) ? at::empty_like(q) : none, dkv = at::empty_like(kv);
        const Tensor sums = at::empty({n.summed(), n.B, n.L, kv.size(2)}, kv.options().dtype(at::kFloat));
        by_type(q, [&](auto number, const char* type) {
            using T = decltype(number);
            by_width(n.width, [&](auto width) {
                using Of = ella::Head<T, width()>;
                const Grid grid = {n.summed() * n.H, n.B, Of::THREADS, Of::BACKWARD * static_cast<int>(sizeof(T))};
                launch(q, "attention_few_keys_back_" + std::to_string(width()) + type, grid, &ella::few_keys_back<T, width()>, numbers<T>(q),
                       numbers<T>(kv), numbers<T>(dy), numbers<T>(dq), numbers<float>(sums), n.N, n.L, n.H, n.scale, n.slope);
            });
            launch(q, std::string("sum_parts") + type, flat(dkv.numel()), &ella::sum_parts<T>, numbers<float>(sums), numbers<T>(dkv),
                   packs_of(dkv), n.summed());
        });
        return {dq, dkv, none};
    }
};

// --- Attention of pixels to themselves ----------------------------------------------------------------------------------------------------

struct Pixels : torch::autograd::Function<Pixels> {
    struct Shape {
        int B, N, H;
        int64_t width;
        float scale, slope;

        Shape(const Tensor& qkv, int64_t heads) {
            TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0 && qkv.numel() > 0,
                        "a fused attention of pixels takes [B, N, 3 C], not ", qkv.sizes(), " for ", heads, " heads");
            TORCH_CHECK(qkv.size(1) * qkv.size(2) < INT32_MAX, "a fused attention of pixels takes fewer than 2^31 numbers of a sample, not ",
                        qkv.sizes());
            B = static_cast<int>(qkv.size(0));
            N = static_cast<int>(qkv.size(1));
            H = static_cast<int>(heads);
            width = qkv.size(2) / (3 * heads);
            TORCH_CHECK(width == 40 || width == 80, "a fused attention of pixels takes heads of 40 or 80 channels, not ", width);
            slope = 1.0f / std::sqrt(static_cast<float>(width));
            scale = slope * 1.44269504088896341f;
        }

        // A number for each row of shares, filled up to whole tiles.
        Tensor rows(const Tensor& like) const {
            const int64_t tiles = (N + ella::TILE - 1) / ella::TILE;
            return at::empty({B, H, tiles * ella::TILE}, like.options().dtype(at::kFloat));
        }
        // Blocks of so many groups, with so many bytes on the chip.
        Grid grid(int groups, size_t bytes) const {
            const int rows = groups * ella::TILE;
            return {(N + rows - 1) / rows * H, B, groups * ella::GROUP, static_cast<int>(bytes)};
        }
        template <class F>
        void by_width(F work) const {
            width == 40 ? work(std::integral_constant<int, 40>{}) : work(std::integral_constant<int, 80>{});
        }
    };

    static Tensor forward(AutogradContext* ctx, const Tensor& all, int64_t heads) {
        const Tensor qkv = all.contiguous();
        const Shape n(qkv, heads);
        const Tensor y = at::empty({n.B, n.N, n.width * heads}, qkv.options()), log = n.rows(qkv);
        by_type(qkv, [&](auto number, const char* type) {
            using T = decltype(number);
            n.by_width([&](auto width) {
                constexpr int D = width();
                const Grid grid = n.grid(ella::Groups<D>::FORWARD, ella::ForwardChip<T, D>::COUNT * sizeof(T));
                launch(qkv, "attention_pixels_" + std::to_string(D) + type, grid, &ella::pixels<T, D>, numbers<T>(qkv), numbers<T>(y),
                       numbers<float>(log), n.N, n.H, n.scale);
            });
        });
        ctx->save_for_backward({qkv, y, log});
        ctx->saved_data["heads"] = heads;
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &qkv = saved[0], &y = saved[1], &log = saved[2], none, dy = grads[0].contiguous();
        const Shape n(qkv, ctx->saved_data["heads"].toInt());
        const Tensor dqkv = at::empty_like(qkv), slant = n.rows(qkv);
        by_type(qkv, [&](auto number, const char* type) {
            using T = decltype(number);
            n.by_width([&](auto width) {
                constexpr int D = width();
                const std::string name = "attention_pixels_back_", end = "_" + std::to_string(D) + type;
                const Grid queries = n.grid(ella::Groups<D>::BY_QUERIES, ella::QueriesChip<T, D>::COUNT * sizeof(T));
                const Grid keys = n.grid(ella::Groups<D>::BY_KEYS, ella::KeysChip<T, D>::COUNT * sizeof(T));
                launch(qkv, name + "queries" + end, queries, &ella::pixels_back_queries<T, D>, numbers<T>(qkv), numbers<T>(y), numbers<T>(dy),
                       numbers<float>(log), numbers<float>(slant), numbers<T>(dqkv), n.N, n.H, n.scale, n.slope);
                launch(qkv, name + "keys" + end, keys, &ella::pixels_back_keys<T, D>, numbers<T>(qkv), numbers<T>(dy), numbers<float>(log),
                       numbers<float>(slant), numbers<T>(dqkv), n.N, n.H, n.scale, n.slope);
            });
        });
        return {dqkv, none};
    }
};

// --- Text encoders ------------------------------------------------------------------------------------------------------------------------

void refuse_gradient(const Tensor& x) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()), "there is no gradient through this fused operator: use the plain one");
}

Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
    refuse_gradient(input);
    const Tensor x = input.contiguous(), y = at::empty_like(x);
    const Rows n(x, ella::MAX_THREADS / ROW_LANES);
    by_type(x, [&](auto number, const char* type) {
        using T = decltype(number);
        launch(x, std::string("rms_norm") + type, n.grid, &ella::rms_norm<T>, numbers<T>(x), numbers<T>(weight), numbers<T>(y), n.N, n.D,
               n.lanes, static_cast<float>(eps));
    });
    return y;
}

Tensor gated_gelu(const Tensor& input) {
    refuse_gradient(input);
    const Tensor both = input.contiguous(), y = halved(both);
    by_type(both, [&](auto number, const char* type) {
        using T = decltype(number);
        launch(y, std::string("gated_gelu") + type, flat(y.numel()), &ella::gated_gelu<T>, numbers<T>(both), numbers<T>(y), packs_of(y),
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
void ella_use_emulator(const EllaEmulator* table) { emulator = table; }

int ella_group_norm(const void* x, const void* second, const void* gamma, const void* beta, const void* add, int64_t groups, double eps,
                    int activate, void** made) {
    return ella_guarded(1, [&] {
        auto tensors = GroupNorm::apply(tensor_of(x), maybe(second), tensor_of(gamma), tensor_of(beta), maybe(add), groups, eps, activate != 0);
        for (size_t i = 0; i < tensors.size(); ++i) made[i] = given(tensors[i]);
        return 0;
    });
}
void* ella_frozen_conv2d(const void* x, const void* weight, int64_t stride, int64_t padding) {
    return ella_guarded<void*>(nullptr, [&] { return given(FrozenConv::apply(tensor_of(x), tensor_of(weight), stride, padding)); });
}
void* ella_frozen_double(const void* x, const void* weight, const void* back, const void* bias) {
    return ella_guarded<void*>(nullptr, [&] {
        return given(FrozenDouble::apply(tensor_of(x), tensor_of(weight), tensor_of(back), tensor_of(bias)));
    });
}
void* ella_frozen_half(const void* x, const void* weight, const void* back) {
    return ella_guarded<void*>(nullptr, [&] { return given(FrozenHalf::apply(tensor_of(x), tensor_of(weight), tensor_of(back))); });
}
void* ella_pixels(const void* qkv, int64_t heads) {
    return ella_guarded<void*>(nullptr, [&] { return given(Pixels::apply(tensor_of(qkv), heads)); });
}
void* ella_few_keys(const void* q, const void* kv, int64_t heads) {
    return ella_guarded<void*>(nullptr, [&] { return given(FewKeys::apply(tensor_of(q), tensor_of(kv), heads)); });
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
void* ella_ada_layer_norm(const void* x, const void* lead, double eps, int kind) {
    return ella_guarded<void*>(nullptr, [&] {
        return given(AdaLayerNorm::apply(tensor_of(x), tensor_of(lead), eps, static_cast<at::ScalarType>(kind)));
    });
}
void* ella_square_sums(const void* x) {
    return ella_guarded<void*>(nullptr, [&] {
        const Tensor& all = tensor_of(x);
        // Enough blocks to keep any GPU busy; the order of the sums depends on the length alone.
        constexpr int64_t most = 1024, each = ella::SQUARE_THREADS * ella::VECTOR;
        const int blocks = static_cast<int>(std::clamp<int64_t>((all.numel() + each - 1) / each, 1, most));
        const Tensor sums = at::empty({blocks}, all.options().dtype(at::kDouble));
        launch(all, "square_sums_f32", {blocks, 1, ella::SQUARE_THREADS}, &ella::square_sums, numbers<float>(all), numbers<double>(sums), all.numel());
        return given(sums);
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
void* ella_add_biased(const void* a, const void* b, const void* more, const void* bias) {
    return ella_guarded<void*>(nullptr, [&] { return given(AddBiased::apply(tensor_of(a), tensor_of(b), maybe(more), tensor_of(bias))); });
}
