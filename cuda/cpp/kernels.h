// The fused operators' kernels, in one text for two compilers: NVRTC makes GPU code of it at run time, and the C++ compiler makes functions
// of it that go through a block's threads one after the other. So what runs on a GPU is tested where there is none.
//
// Letters: B samples, P pixels, C channels, G groups of channels, N rows. Feature maps are [B, P, C] (channels-last), C a multiple of 8.
// Every thread moves 16 bytes of 16-bit numbers at a time; sums are float32, in an order that depends on the shape alone.

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define SYNC() __syncthreads()
// What stands in a PHASE is done by every thread of the block; nothing of it but what is SHARED lives on to the next one.
#define PHASE(t) if (const int t = threadIdx.x; true)
#else
#include <algorithm>
#include <cmath>
#include <cstring>
namespace ella {
struct Place { int x, y; };
inline thread_local Place blockIdx, blockDim, gridDim;
}  // namespace ella
#define DEVICE inline
#define SHARED(type, name, count) static thread_local type name[count]
#define SYNC()
#define PHASE(t) for (int t = 0; t < blockDim.x; ++t)
#endif

namespace ella {

constexpr int VECTOR = 8;         // numbers that a thread moves at once
constexpr int MAX_THREADS = 512;  // of a block
constexpr int MAX_ROWS = 64;      // that a block of a layer norm takes

// bfloat16 and IEEE half, as they lie in memory.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

#ifdef __CUDACC_RTC__
DEVICE float from_bits(unsigned int bits) { return __uint_as_float(bits); }
DEVICE unsigned int to_bits(float x) { return __float_as_uint(x); }
DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE void narrow(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE float exponential(float x) { return __expf(x); }
DEVICE float inverse(float x) { return __fdividef(1.0f, x); }
#else
DEVICE float from_bits(unsigned int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
DEVICE unsigned int to_bits(float x) {
    unsigned int bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
DEVICE float widen(f16 x) {
    const unsigned int sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, not a number
    // Subnormal ones come out right too: the product moves the exponent, and is exact.
    const float y = from_bits(rest << 13) * from_bits(0x77800000u);
    return sign ? -y : y;
}
DEVICE void narrow(float x, f16& y) {
    const unsigned int bits = to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    unsigned int half;
    if (rest > 0x7f800000u) half = 0x7e00u;
    else if (rest >= 0x477ff000u) half = 0x7c00u;                                     // rounds to infinity
    else if (rest < 0x38800000u) half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;  // subnormal: the sum rounds it
    else half = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
    y.bits = static_cast<unsigned short>(sign | half);
}
DEVICE float exponential(float x) { return std::exp(x); }
DEVICE float inverse(float x) { return 1.0f / x; }
using std::erf;
using std::exp;
using std::min;
using std::sqrt;
using std::tanh;
#endif

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return from_bits(static_cast<unsigned int>(x.bits) << 16); }
DEVICE void narrow(float x, float& y) { y = x; }
// To nearest, half to even; what is not a number stays none.
DEVICE void narrow(float x, bf16& y) {
    const unsigned int bits = to_bits(x);
    const unsigned int rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    y.bits = static_cast<unsigned short>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded >> 16);
}

// Eight numbers that lie beside each other, in one or two accesses.
template <class T>
struct alignas(16) Pack { T at[VECTOR]; };

template <class T>
DEVICE Pack<T> pack_at(const T* from) { return *reinterpret_cast<const Pack<T>*>(from); }

template <class T>
DEVICE void unpack(const Pack<T>& pack, float (&to)[VECTOR]) {
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to[j] = widen(pack.at[j]);
}

template <class T>
DEVICE void load(const T* from, float (&to)[VECTOR]) { unpack(pack_at(from), to); }

template <class T>
DEVICE void store(const float (&from)[VECTOR], T* to) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) narrow(from[j], pack.at[j]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
}

// 1 / (1 + e^-x): by the processor's quick exponential and quotient where the result is rounded to 16 bits anyway.
template <class T>
DEVICE float sigmoid(float x) { return inverse(1.0f + exponential(-x)); }
template <>
DEVICE float sigmoid<float>(float x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
DEVICE float silu(float x) { return x * sigmoid<T>(x); }
template <class T>
DEVICE float silu_slope(float x) {
    const float s = sigmoid<T>(x);
    return s * (1.0f + x * (1.0f - s));
}

// The exact GELU, x Φ(x), and its slope Φ(x) + x φ(x).
DEVICE float normal_share(float x) { return 0.5f * (1.0f + erf(x * 0.70710678118654752f)); }
DEVICE float gelu_slope(float x) { return normal_share(x) + x * 0.39894228040143268f * exp(-0.5f * x * x); }

// --- Group norm ---------------------------------------------------------------------------------------------------------------------------
//
// Three passes: sums of pieces of `chunk` pixels; mean and 1/σ of each group from them; the map itself. Grid of the first and last: (pieces, B).
// Block: `rows` × C/8 threads, each with eight channels of every `rows`-th pixel. `add` [B, C] float32 (or null) is added to the map first:
// a convolution's bias and the time embedding, which else would be passes of their own.

constexpr int AHEAD = 4;  // packs of one map that a thread has asked memory for before it needs the first

// One thread's part of a pass over maps of one shape: work(place, numbers of each map) for eight channels of every `rows`-th pixel of a piece.
template <int MAPS, class T, class F>
DEVICE void each_pixel(int t, const T* const (&maps)[MAPS], int P, int C, int rows, int chunk, F work) {
    constexpr int STEPS = MAPS == 1 ? AHEAD : 1;  // more of several maps take registers from other threads
    const int lanes = C / VECTOR, begin = static_cast<int>(blockIdx.x) * chunk, end = min(P, begin + chunk);
    const long long first = static_cast<long long>(blockIdx.y) * P * C + t % lanes * VECTOR;
    for (int p = begin + t / lanes; p < end; p += STEPS * rows) {
        Pack<T> packs[STEPS][MAPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (p + k * rows < end)
#pragma unroll
                for (int m = 0; m < MAPS; ++m) packs[k][m] = pack_at(maps[m] + first + static_cast<long long>(p + k * rows) * C);
        }
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (p + k * rows < end) {
                float numbers[MAPS][VECTOR];
#pragma unroll
                for (int m = 0; m < MAPS; ++m) unpack(packs[k][m], numbers[m]);
                work(first + static_cast<long long>(p + k * rows) * C, numbers);
            }
        }
    }
}

// What sums are taken about, so that a mean far from zero costs no digits: the group's first number.
template <class T>
DEVICE float anchor(const T* x, const float* add, int b, int P, int C, int channel) {
    return widen(x[static_cast<long long>(b) * P * C + channel]) + (add ? add[b * C + channel] : 0.0f);
}

// Adds up two sums per channel over a block's rows, and over each group's channels, into out [B, pieces, G, 2].
DEVICE void reduce_groups(int t, float* first, float* second, int C, int rows) {
    for (int c = t; c < C; c += blockDim.x) {
        float a = first[c], b = second[c];
        for (int row = 1; row < rows; ++row) {
            a += first[row * C + c];
            b += second[row * C + c];
        }
        first[c] = a;
        second[c] = b;
    }
}
DEVICE void write_groups(int t, const float* first, const float* second, float* out, int C, int G) {
    const int width = C / G;
    for (int g = t; g < G; g += blockDim.x) {
        float a = 0.0f, b = 0.0f;
        for (int c = g * width; c < (g + 1) * width; ++c) {
            a += first[c];
            b += second[c];
        }
        float* place = out + ((static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * G + g) * 2;
        place[0] = a;
        place[1] = b;
    }
}

template <class T>
DEVICE void norm_sums(const T* x, const float* add, float* sums, int P, int C, int G, int chunk) {
    SHARED(float, first, MAX_THREADS * VECTOR);
    SHARED(float, second, MAX_THREADS * VECTOR);
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int row = t / lanes, c = t % lanes * VECTOR;
        float offset[VECTOR], s[VECTOR] = {}, q[VECTOR] = {};
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const int group = (c + j) / (C / G);
            offset[j] = (add ? add[b * C + c + j] : 0.0f) - anchor(x, add, b, P, C, group * (C / G));
        }
        const T* const maps[] = {x};
        each_pixel(t, maps, P, C, rows, chunk, [&](long long, const float (&v)[1][VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float d = v[0][j] + offset[j];
                s[j] += d;
                q[j] += d * d;
            }
        });
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            first[row * C + c + j] = s[j];
            second[row * C + c + j] = q[j];
        }
    }
    SYNC();
    PHASE(t) reduce_groups(t, first, second, C, rows);
    SYNC();
    PHASE(t) write_groups(t, first, second, sums, C, G);
}

// The pieces' sums [B, pieces, G, 2] of one sample, added up in two steps: by shares of the pieces, as many as the block has threads for, into
// share [shares, G, 2], then over these. Between the steps all threads must have met.
DEVICE int shares_of(int G, int pieces) { return min(pieces, G < static_cast<int>(blockDim.x) ? static_cast<int>(blockDim.x) / G : 1); }
DEVICE void share_pieces(int t, const float* sums, float* share, int G, int pieces) {
    const int shares = shares_of(G, pieces);
    for (int i = t; i < shares * G; i += blockDim.x) {
        float a = 0.0f, b = 0.0f;
        for (int k = i / G; k < pieces; k += shares) {
            const float* place = sums + ((static_cast<long long>(blockIdx.y) * pieces + k) * G + i % G) * 2;
            a += place[0];
            b += place[1];
        }
        share[i * 2] = a;
        share[i * 2 + 1] = b;
    }
}
DEVICE float sum_shares(const float* share, int of, int G, int pieces) {
    float sum = 0.0f;
    for (int k = 0, shares = shares_of(G, pieces); k < shares; ++k) sum += share[k * G * 2 + of];
    return sum;
}

// From sums [B, pieces, G, 2] to stats [B, G, 2]: mean and 1/σ. Grid: (1, B).
template <class T>
DEVICE void norm_stats(const T* x, const float* add, const float* sums, float* stats, int P, int C, int G, int pieces, float eps) {
    SHARED(float, share, MAX_THREADS * VECTOR * 2);
    const int b = blockIdx.y, width = C / G;
    PHASE(t) share_pieces(t, sums, share, G, pieces);
    SYNC();
    PHASE(t) for (int g = t; g < G; g += blockDim.x) {
        const float s = sum_shares(share, g * 2, G, pieces), q = sum_shares(share, g * 2 + 1, G, pieces);
        const float count = static_cast<float>(P) * static_cast<float>(width);
        const float mean = s / count, variance = fmaxf(q / count - mean * mean, 0.0f);
        stats[(b * G + g) * 2] = mean + anchor(x, add, b, P, C, g * width);
        stats[(b * G + g) * 2 + 1] = 1.0f / sqrt(variance + eps);
    }
}

// û = γ x̂ + β of one channel as a map of x. Few numbers for each of a thread's channels: registers decide how many threads ask memory at a time.
struct NormChannel {
    float scale, shift;
};
template <class T>
DEVICE NormChannel norm_channel(const float* add, const float* stats, const T* gamma, const T* beta, int b, int C, int G, int c) {
    const float* group = stats + (b * G + c / (C / G)) * 2;
    const float scale = group[1] * widen(gamma[c]);
    return {scale, widen(beta[c]) + ((add ? add[b * C + c] : 0.0f) - group[0]) * scale};
}
// dû, from û and dy.
template <class T>
DEVICE float norm_slope(float u, float dy, int activate) {
    return activate ? dy * silu_slope<T>(u) : dy;
}

// y = act((x + add - mean) / σ · γ + β); act is SiLU or nothing.
template <class T>
DEVICE void norm_apply(const T* x, const float* add, const float* stats, const T* gamma, const T* beta, T* y, int P, int C, int G, int chunk,
                       int activate) {
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int c = t % lanes * VECTOR;
        NormChannel channel[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) channel[j] = norm_channel(add, stats, gamma, beta, b, C, G, c + j);
        const T* const maps[] = {x};
        each_pixel(t, maps, P, C, rows, chunk, [&](long long place, float (&v)[1][VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                v[0][j] = v[0][j] * channel[j].scale + channel[j].shift;
                if (activate) v[0][j] = silu<T>(v[0][j]);
            }
            store(v[0], y + place);
        });
    }
}

// Sums of γ · dû and γ · dû · x̂ over groups, where û = γ x̂ + β: into sums [B, pieces, G, 2]. Grid and block as for norm_sums.
template <class T>
DEVICE void norm_back_sums(const T* x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, float* sums, int P,
                           int C, int G, int chunk, int activate) {
    SHARED(float, first, MAX_THREADS * VECTOR);
    SHARED(float, second, MAX_THREADS * VECTOR);
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int row = t / lanes, c = t % lanes * VECTOR;
        NormChannel channel[VECTOR];
        float s[VECTOR] = {}, q[VECTOR] = {};
        const Pack<T> least = pack_at(beta + c);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) channel[j] = norm_channel(add, stats, gamma, beta, b, C, G, c + j);
        const T* const maps[] = {x, dy};
        each_pixel(t, maps, P, C, rows, chunk, [&](long long, const float (&v)[2][VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float u = v[0][j] * channel[j].scale + channel[j].shift, slope = norm_slope<T>(u, v[1][j], activate);
                s[j] += slope;
                q[j] += slope * (u - widen(least.at[j]));  // γ x̂
            }
        });
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            first[row * C + c + j] = s[j] * widen(gamma[c + j]);
            second[row * C + c + j] = q[j];
        }
    }
    SYNC();
    PHASE(t) reduce_groups(t, first, second, C, rows);
    SYNC();
    PHASE(t) write_groups(t, first, second, sums, C, G);
}

// The pieces' sums [B, pieces, G, 2] as means over a group's numbers [B, G, 2]. Grid: (1, B).
DEVICE void norm_back_means(const float* sums, float* means, int P, int C, int G, int pieces) {
    SHARED(float, share, MAX_THREADS * VECTOR * 2);
    const int b = blockIdx.y;
    PHASE(t) share_pieces(t, sums, share, G, pieces);
    SYNC();
    PHASE(t) for (int i = t; i < 2 * G; i += blockDim.x) {
        means[b * G * 2 + i] = sum_shares(share, i, G, pieces) / (static_cast<float>(P) * static_cast<float>(C / G));
    }
}

// dx = (γ dû - mean(γ dû) - x̂ mean(γ dû x̂)) / σ + more; `more` (or null) is the gradient by x that comes past the norm.
template <class T>
DEVICE void norm_back_apply(const T* x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, const T* more,
                            const float* means, T* dx, int P, int C, int G, int chunk, int activate) {
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int c = t % lanes * VECTOR;
        NormChannel channel[VECTOR];
        float less[VECTOR], along[VECTOR];  // (mean(γ dû) + x̂ mean(γ dû x̂)) / σ, as a map of x too
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            channel[j] = norm_channel(add, stats, gamma, beta, b, C, G, c + j);
            const int group = (b * G + (c + j) / (C / G)) * 2;
            const float inverse = stats[group + 1], offset = ((add ? add[b * C + c + j] : 0.0f) - stats[group]) * inverse;
            along[j] = inverse * inverse * means[group + 1];
            less[j] = inverse * (means[group] + offset * means[group + 1]);
        }
        const auto through = [&](int j, float v, float d) {
            const float slope = norm_slope<T>(v * channel[j].scale + channel[j].shift, d, activate);
            return channel[j].scale * slope - (v * along[j] + less[j]);
        };
        if (more) {
            const T* const maps[] = {x, dy, more};
            each_pixel(t, maps, P, C, rows, chunk, [&](long long place, float (&v)[3][VECTOR]) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[0][j] = through(j, v[0][j], v[1][j]) + v[2][j];
                store(v[0], dx + place);
            });
        } else {
            const T* const maps[] = {x, dy};
            each_pixel(t, maps, P, C, rows, chunk, [&](long long place, float (&v)[2][VECTOR]) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[0][j] = through(j, v[0][j], v[1][j]);
                store(v[0], dx + place);
            });
        }
    }
}

// --- The gated feed-forward network's middle ----------------------------------------------------------------------------------------------
//
// both [N, 2D]: values, then gates. One thread for eight of N × D; D a multiple of 8.

template <class T>
DEVICE void geglu(const T* both, T* y, long long count, int D) {
    PHASE(t) {
        const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + t) * VECTOR;
        if (i < count) {
            const T* row = both + i / D * 2 * D + i % D;
            float value[VECTOR], gate[VECTOR];
            load(row, value);
            load(row + D, gate);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) value[j] *= gate[j] * normal_share(gate[j]);
            store(value, y + i);
        }
    }
}

template <class T>
DEVICE void geglu_back(const T* both, const T* dy, T* dboth, long long count, int D) {
    PHASE(t) {
        const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + t) * VECTOR;
        if (i < count) {
            const long long place = i / D * 2 * D + i % D;
            float value[VECTOR], gate[VECTOR], d[VECTOR];
            load(both + place, value);
            load(both + place + D, gate);
            load(dy + i, d);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float g = gate[j];
                gate[j] = d[j] * value[j] * gelu_slope(g);
                value[j] = d[j] * g * normal_share(g);
            }
            store(value, dboth + place);
            store(gate, dboth + place + D);
        }
    }
}

// --- Layer norm beside a residual ---------------------------------------------------------------------------------------------------------
//
// Rows of D numbers, D a multiple of 8 up to 4096. Block: `rows` × D/8 threads, each with eight numbers of one row; grid: ⌈N / rows⌉.

constexpr int PARTS = 16;  // sums of a row's threads are added up in so many parts, then over these

// From each thread's `value` to its row's sum, in `sum` at the row's place. Between these two steps all threads must have met.
DEVICE void row_parts(int t, const float* value, float* part, int lanes) {
    const int row = t / lanes, lane = t % lanes;
    if (lane >= PARTS) return;
    float sum = 0.0f;
    for (int i = lane; i < lanes; i += PARTS) sum += value[row * lanes + i];
    part[row * PARTS + lane] = sum;
}
DEVICE float row_sum(int t, const float* part, int lanes) {
    const int row = t / lanes, count = lanes < PARTS ? lanes : PARTS;
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += part[row * PARTS + i];
    return sum;
}

// sum = a + b (b may be null: then sum is not written, and stands for a), y = norm(sum) · γ + β, stats [N, 2]: mean and 1/σ.
template <class T>
DEVICE void layer_norm(const T* a, const T* b, const T* gamma, const T* beta, T* sum, T* y, float* stats, int N, int D, float eps) {
    SHARED(float, numbers, MAX_THREADS * VECTOR);
    SHARED(float, first, MAX_THREADS);
    SHARED(float, second, MAX_THREADS);
    SHARED(float, first_part, MAX_ROWS * PARTS);
    SHARED(float, second_part, MAX_ROWS * PARTS);
    const int lanes = D / VECTOR, rows = blockDim.x / lanes;
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes;
        float v[VECTOR] = {}, s = 0.0f, q = 0.0f;
        if (row < N) {
            const long long place = static_cast<long long>(row) * D + t % lanes * VECTOR;
            load(a + place, v);
            // About the row's first number, so that a mean far from zero costs no digits.
            float origin = widen(a[static_cast<long long>(row) * D]);
            if (b) {
                float w[VECTOR];
                load(b + place, w);
                origin += widen(b[static_cast<long long>(row) * D]);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[j] += w[j];
                store(v, sum + place);
                // What is normed is what is kept.
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    T kept;
                    narrow(v[j], kept);
                    v[j] = widen(kept);
                }
            }
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float d = v[j] - origin;
                s += d;
                q += d * d;
            }
            if (t % lanes == 0) stats[row * 2LL] = origin;
        }
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) numbers[j * MAX_THREADS + t] = v[j];
        first[t] = s;
        second[t] = q;
    }
    SYNC();
    PHASE(t) {
        row_parts(t, first, first_part, lanes);
        row_parts(t, second, second_part, lanes);
    }
    SYNC();
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes;
        if (row < N) {
            const float s = row_sum(t, first_part, lanes) / D, q = row_sum(t, second_part, lanes) / D;
            first[t] = s + stats[row * 2LL];
            second[t] = 1.0f / sqrt(fmaxf(q - s * s, 0.0f) + eps);
        }
    }
    SYNC();
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes, c = t % lanes * VECTOR;
        if (row < N) {
            float v[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] = (numbers[j * MAX_THREADS + t] - first[t]) * second[t] * widen(gamma[c + j]) + widen(beta[c + j]);
            store(v, y + static_cast<long long>(row) * D + c);
            if (c == 0) {
                stats[row * 2LL] = first[t];
                stats[row * 2LL + 1] = second[t];
            }
        }
    }
}

// dx = (γ dy - mean(γ dy) - x̂ mean(γ dy x̂)) / σ + more; `more` (or null) is the gradient by the sum itself.
template <class T>
DEVICE void layer_norm_back(const T* x, const T* gamma, const float* stats, const T* dy, const T* more, T* dx, int N, int D) {
    SHARED(float, normed, MAX_THREADS * VECTOR);
    SHARED(float, slopes, MAX_THREADS * VECTOR);
    SHARED(float, first, MAX_THREADS);
    SHARED(float, second, MAX_THREADS);
    SHARED(float, first_part, MAX_ROWS * PARTS);
    SHARED(float, second_part, MAX_ROWS * PARTS);
    const int lanes = D / VECTOR, rows = blockDim.x / lanes;
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes, c = t % lanes * VECTOR;
        float s = 0.0f, q = 0.0f;
        if (row < N) {
            const long long place = static_cast<long long>(row) * D + c;
            const float mean = stats[row * 2LL], inverse = stats[row * 2LL + 1];
            float v[VECTOR], d[VECTOR];
            load(x + place, v);
            load(dy + place, d);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float unit = (v[j] - mean) * inverse, slope = d[j] * widen(gamma[c + j]);
                s += slope;
                q += slope * unit;
                normed[j * MAX_THREADS + t] = unit;
                slopes[j * MAX_THREADS + t] = slope;
            }
        }
        first[t] = s;
        second[t] = q;
    }
    SYNC();
    PHASE(t) {
        row_parts(t, first, first_part, lanes);
        row_parts(t, second, second_part, lanes);
    }
    SYNC();
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes;
        if (row < N) {
            const long long place = static_cast<long long>(row) * D + t % lanes * VECTOR;
            const float mean = row_sum(t, first_part, lanes) / D, along = row_sum(t, second_part, lanes) / D, inverse = stats[row * 2LL + 1];
            float v[VECTOR] = {};
            if (more) load(more + place, v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                v[j] += inverse * (slopes[j * MAX_THREADS + t] - mean - normed[j * MAX_THREADS + t] * along);
            }
            store(v, dx + place);
        }
    }
}

// --- Text encoders, which nothing is trained through --------------------------------------------------------------------------------------

// T5's and LLaMA's norm: y = (x / √(mean(x²) + ε)) · w, rounded before the weight as theirs is. Rows as for layer_norm.
template <class T>
DEVICE void rms_norm(const T* x, const T* weight, T* y, int N, int D, float eps) {
    SHARED(float, first, MAX_THREADS);
    SHARED(float, first_part, MAX_ROWS * PARTS);
    const int lanes = D / VECTOR, rows = blockDim.x / lanes;
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes;
        float q = 0.0f;
        if (row < N) {
            float v[VECTOR];
            load(x + static_cast<long long>(row) * D + t % lanes * VECTOR, v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) q += v[j] * v[j];
        }
        first[t] = q;
    }
    SYNC();
    PHASE(t) row_parts(t, first, first_part, lanes);
    SYNC();
    PHASE(t) {
        const int row = blockIdx.x * rows + t / lanes, c = t % lanes * VECTOR;
        if (row < N) {
            const long long place = static_cast<long long>(row) * D + c;
            const float inverse = 1.0f / sqrt(row_sum(t, first_part, lanes) / D + eps);
            float v[VECTOR];
            load(x + place, v);  // again: it is in the cache
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                T rounded;
                narrow(v[j] * inverse, rounded);
                v[j] = widen(rounded) * widen(weight[c + j]);
            }
            store(v, y + place);
        }
    }
}

// The GELU's tanh approximation.
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x))); }

// both [N, 2D]: gates, then values; y = gelu(gate) · value.
template <class T>
DEVICE void gated_gelu(const T* both, T* y, long long count, int D) {
    PHASE(t) {
        const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + t) * VECTOR;
        if (i < count) {
            const T* row = both + i / D * 2 * D + i % D;
            float gate[VECTOR], value[VECTOR];
            load(row, gate);
            load(row + D, value);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) value[j] *= gelu_tanh(gate[j]);
            store(value, y + i);
        }
    }
}

// --- Residual -----------------------------------------------------------------------------------------------------------------------------

// y = a + b + bias over maps [N, C]; bias [C] in float32. One thread for eight of N × C.
template <class T>
DEVICE void add_biased(const T* a, const T* b, const float* bias, T* y, long long count, int C) {
    PHASE(t) {
        const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + t) * VECTOR;
        if (i < count) {
            const int c = static_cast<int>(i % C);
            float v[VECTOR], w[VECTOR];
            load(a + i, v);
            load(b + i, w);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] += w[j] + bias[c + j];
            store(v, y + i);
        }
    }
}

// --- The update ---------------------------------------------------------------------------------------------------------------------------

// One step of AdamW with decoupled decay, and the moving average of its weights: see src/fused.rs.
struct Rates {
    float scale, keep, first, second_keep, second, root, eps, rate, average;
};

DEVICE void adamw_one(float& p, float g, float& m, float& v, float& ema, const Rates& r) {
    g *= r.scale;
    p *= r.keep;
    m += (g - m) * r.first;
    v = v * r.second_keep + g * g * r.second;
    p -= m / (sqrt(v) / r.root + r.eps) * r.rate;
    ema += (p - ema) * r.average;
}

// Buffers [count] float32. One thread for eight of them.
DEVICE void adamw(float* p, const float* g, float* m, float* v, float* ema, long long count, Rates r) {
    PHASE(t) {
        const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + t) * VECTOR;
        if (i + VECTOR <= count) {
            float ps[VECTOR], gs[VECTOR], ms[VECTOR], vs[VECTOR], es[VECTOR];
            load(p + i, ps);
            load(g + i, gs);
            load(m + i, ms);
            load(v + i, vs);
            load(ema + i, es);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) adamw_one(ps[j], gs[j], ms[j], vs[j], es[j], r);
            store(ps, p + i);
            store(ms, m + i);
            store(vs, v + i);
            store(es, ema + i);
        } else {
            for (long long j = i; j < count; ++j) adamw_one(p[j], g[j], m[j], v[j], ema[j], r);
        }
    }
}

}  // namespace ella

#ifdef __CUDACC_RTC__
// What the driver finds by name: NAME_f32, NAME_bf16 and NAME_f16.
#define KERNEL(name, type, suffix) extern "C" __global__ void __launch_bounds__(ella::MAX_THREADS) name##_##suffix
// No more registers than let two of the largest blocks run beside each other.
#define LEAN_KERNEL(name, type, suffix) extern "C" __global__ void __launch_bounds__(ella::MAX_THREADS, 2) name##_##suffix
#define KERNELS(T, suffix)                                                                                                                  \
    KERNEL(norm_sums, T, suffix)(const T* x, const float* add, float* sums, int P, int C, int G, int chunk) {                               \
        ella::norm_sums(x, add, sums, P, C, G, chunk);                                                                                      \
    }                                                                                                                                       \
    KERNEL(norm_stats, T, suffix)                                                                                                           \
    (const T* x, const float* add, const float* sums, float* stats, int P, int C, int G, int pieces, float eps) {                           \
        ella::norm_stats(x, add, sums, stats, P, C, G, pieces, eps);                                                                        \
    }                                                                                                                                       \
    KERNEL(norm_apply, T, suffix)                                                                                                           \
    (const T* x, const float* add, const float* stats, const T* gamma, const T* beta, T* y, int P, int C, int G, int chunk, int activate) { \
        ella::norm_apply(x, add, stats, gamma, beta, y, P, C, G, chunk, activate);                                                          \
    }                                                                                                                                       \
    LEAN_KERNEL(norm_back_sums, T, suffix)                                                                                                  \
    (const T* x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, float* sums, int P, int C, int G,        \
     int chunk, int activate) {                                                                                                             \
        ella::norm_back_sums(x, add, stats, gamma, beta, dy, sums, P, C, G, chunk, activate);                                               \
    }                                                                                                                                       \
    LEAN_KERNEL(norm_back_apply, T, suffix)                                                                                                 \
    (const T* x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, const T* more, const float* means,       \
     T* dx, int P, int C, int G, int chunk, int activate) {                                                                                 \
        ella::norm_back_apply(x, add, stats, gamma, beta, dy, more, means, dx, P, C, G, chunk, activate);                                   \
    }                                                                                                                                       \
    KERNEL(geglu, T, suffix)(const T* both, T* y, long long count, int D) { ella::geglu(both, y, count, D); }                               \
    KERNEL(geglu_back, T, suffix)(const T* both, const T* dy, T* dboth, long long count, int D) {                                           \
        ella::geglu_back(both, dy, dboth, count, D);                                                                                        \
    }                                                                                                                                       \
    KERNEL(layer_norm, T, suffix)                                                                                                           \
    (const T* a, const T* b, const T* gamma, const T* beta, T* sum, T* y, float* stats, int N, int D, float eps) {                          \
        ella::layer_norm(a, b, gamma, beta, sum, y, stats, N, D, eps);                                                                      \
    }                                                                                                                                       \
    KERNEL(layer_norm_back, T, suffix)                                                                                                      \
    (const T* x, const T* gamma, const float* stats, const T* dy, const T* more, T* dx, int N, int D) {                                     \
        ella::layer_norm_back(x, gamma, stats, dy, more, dx, N, D);                                                                         \
    }                                                                                                                                       \
    KERNEL(rms_norm, T, suffix)(const T* x, const T* weight, T* y, int N, int D, float eps) { ella::rms_norm(x, weight, y, N, D, eps); }     \
    KERNEL(gated_gelu, T, suffix)(const T* both, T* y, long long count, int D) { ella::gated_gelu(both, y, count, D); }                     \
    KERNEL(add_biased, T, suffix)(const T* a, const T* b, const float* bias, T* y, long long count, int C) {                                \
        ella::add_biased(a, b, bias, y, count, C);                                                                                          \
    }
KERNELS(float, f32)
KERNELS(ella::bf16, bf16)
KERNELS(ella::f16, f16)
KERNEL(adamw, float, f32)(float* p, const float* g, float* m, float* v, float* ema, long long count, ella::Rates r) {
    ella::adamw(p, g, m, v, ema, count, r);
}
KERNEL(norm_back_means, float, f32)(const float* sums, float* means, int P, int C, int G, int pieces) {
    ella::norm_back_means(sums, means, P, C, G, pieces);
}
#endif
