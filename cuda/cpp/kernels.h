// The fused operators' kernels, but for attention's.
//
// Letters: B samples, P pixels, C channels, G groups of channels, N rows. Feature maps are [B, P, C] (channels-last), C a multiple of 8.
// Every thread moves 16 bytes of 16-bit numbers at a time; sums are float32, in an order that depends on the shape alone.

namespace ella {

// Eight numbers that lie beside each other, in one or two accesses.
template <class T>
struct alignas(16) Pack { T at[VECTOR]; };

// The compiler forgets what it has unpacked of it: to unpack again costs an instruction a number, to remember a register.
template <class T>
DEVICE void forget(Pack<T>& pack) {
#ifdef __CUDACC_RTC__
    unsigned int* words = reinterpret_cast<unsigned int*>(&pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / 4); ++i) forget(words[i]);
#endif
}

template <class T>
DEVICE Pack<T> pack_at(const T* from) { return *reinterpret_cast<const Pack<T>*>(from); }

template <class T>
DEVICE void unpack(const Pack<T>& pack, float (&to)[VECTOR]) {
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to[j] = widen(pack.at[j]);
}

#ifdef __CUDACC_RTC__
template <>
DEVICE void unpack<bf16>(const Pack<bf16>& pack, float (&to)[VECTOR]) {
    const unsigned int* pairs = reinterpret_cast<const unsigned int*>(&pack);
#pragma unroll
    for (int j = 0; j < VECTOR; j += 2) {
        to[j] = from_bits(pairs[j / 2] << 16);
        to[j + 1] = from_bits(pairs[j / 2] & 0xffff0000u);
    }
}
#endif

template <class T>
DEVICE void load(const T* from, float (&to)[VECTOR]) { unpack(pack_at(from), to); }

template <class T>
DEVICE Pack<T> packed(const float (&from)[VECTOR]) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) narrow(from[j], pack.at[j]);
    return pack;
}
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
template <class T>
DEVICE Pack<T> packed_by_pairs(const float (&from)[VECTOR]) {
    Pack<T> pack;
    unsigned int* pairs = reinterpret_cast<unsigned int*>(&pack);
#pragma unroll
    for (int j = 0; j < VECTOR; j += 2) pairs[j / 2] = pair(from[j], from[j + 1], T{});
    return pack;
}
template <>
DEVICE Pack<bf16> packed<bf16>(const float (&from)[VECTOR]) { return packed_by_pairs<bf16>(from); }
template <>
DEVICE Pack<f16> packed<f16>(const float (&from)[VECTOR]) { return packed_by_pairs<f16>(from); }
#endif

template <class T>
DEVICE void store(const float (&from)[VECTOR], T* to) { *reinterpret_cast<Pack<T>*>(to) = packed<T>(from); }

// 1 / (1 + e^-x): by the processor's quick exponential and quotient where the result is rounded to 16 bits anyway.
template <class T>
DEVICE float sigmoid(float x) { return inverse(1.0f + power_of_two(x * -1.44269504088896341f)); }
template <>
DEVICE float sigmoid<float>(float x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
DEVICE float silu(float x) { return x * sigmoid<T>(x); }
template <class T>
DEVICE float silu_slope(float x) {
    const float s = sigmoid<T>(x);
    return s * (1.0f + x * (1.0f - s));
}

// Of the normal distribution, Φ(x) and φ(x): the exact GELU is x Φ(x), its slope Φ(x) + x φ(x).
struct Normal {
    float share, density;
};
// To 7.5e-8, by Abramowitz and Stegun's 26.2.17: far below what 16 bits round to, and both by one exponential.
template <class T>
DEVICE Normal normal(float x) {
    const float density = power_of_two(x * x * -0.72134752044448170f - 1.32574806473616f);
    const float t = inverse(1.0f + 0.2316419f * fabsf(x));
    const float tail = t * (0.319381530f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f)))) * density;
    return {x < 0.0f ? tail : 1.0f - tail, density};
}
template <>
DEVICE Normal normal<float>(float x) {
    return {0.5f * (1.0f + erf(x * 0.70710678118654752f)), 0.39894228040143268f * exp(-0.5f * x * x)};
}

// Where the eight numbers of this thread lie, of rows of `lanes` packs: (row, pack). 32 bits, because wider quotients take dozens of instructions.
struct Spot {
    unsigned int pack, row, lane;
};
DEVICE Spot spot(int t, int lanes) {
    const unsigned int pack = static_cast<unsigned int>(blockIdx.x) * static_cast<unsigned int>(blockDim.x) + static_cast<unsigned int>(t);
    const unsigned int row = pack / static_cast<unsigned int>(lanes);
    return {pack, row, pack - row * static_cast<unsigned int>(lanes)};
}

// --- Group norm ---------------------------------------------------------------------------------------------------------------------------
//
// Three passes: sums of pieces of `chunk` pixels; mean and 1/σ of each group from them; the map itself. Grid of the first and last: (pieces, B).
// Block: `rows` × C/8 threads, each with eight channels of every `rows`-th pixel. `add` [B, C] float32 (or null) is added to the map first:
// a convolution's bias and the time embedding, which else would be passes of their own.

// A map [B, P, C] whose first `split` channels lie in one tensor and the others in another, if there are others.
template <class T>
struct Joined {
    T *first, *second;
    int split;
};

// Eight channels of one sample: where their first pixel is, and how far it is to the next.
template <class T>
struct Column {
    T* at;
    int step;
};
template <class T>
DEVICE Column<T> column(const Joined<T>& map, int b, int P, int C, int c) {
    const bool left = c < map.split;
    const int width = left ? map.split : C - map.split;
    return {(left ? map.first : map.second) + (static_cast<long long>(b) * P * width + (left ? c : c - map.split)), width};
}
template <class T>
DEVICE Column<T> column(T* map, int b, int P, int C, int c) {
    return {map + (static_cast<long long>(b) * P * C + c), C};
}

constexpr int AHEAD = 4;  // packs of one map that a thread has asked memory for before it needs the first

// One thread's part of a pass over maps: work(pixel, numbers of each map) for every `rows`-th pixel of a piece, from its `row`-th.
template <int MAPS, class T, class F>
DEVICE void each_pixel(int row, const Column<const T> (&maps)[MAPS], int P, int rows, int chunk, F work) {
    constexpr int STEPS = MAPS == 1 ? AHEAD : 1;  // more of several maps take registers from other threads
    const int begin = static_cast<int>(blockIdx.x) * chunk, end = min(P, begin + chunk);
    for (int p = begin + row; p < end; p += STEPS * rows) {
        Pack<T> packs[STEPS][MAPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (p + k * rows < end)
#pragma unroll
                for (int m = 0; m < MAPS; ++m) packs[k][m] = pack_at(maps[m].at + (p + k * rows) * maps[m].step);
        }
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (p + k * rows < end) {
                float numbers[MAPS][VECTOR];
#pragma unroll
                for (int m = 0; m < MAPS; ++m) unpack(packs[k][m], numbers[m]);
                work(p + k * rows, numbers);
            }
        }
    }
}

// For the channels c + j of a thread, in groups of `width`: enter(group) where one begins, and work(j).
template <class E, class F>
DEVICE void each_channel(int c, int width, E enter, F work) {
    int group = c / width, next = (group + 1) * width - c;
    enter(group);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        if (j == next) {
            enter(++group);
            next += width;
        }
        work(j);
    }
}

// What is added to a thread's channels before the norm.
DEVICE void load_add(const float* add, int b, int C, int c, float (&to)[VECTOR]) {
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to[j] = 0.0f;
    if (add) load(add + (b * C + c), to);
}

// What sums are taken about, so that a mean far from zero costs no digits: the group's first number.
template <class T>
DEVICE float anchor(const Joined<const T>& x, const float* add, int b, int P, int C, int channel) {
    return widen(*column(x, b, P, C, channel).at) + (add ? add[b * C + channel] : 0.0f);
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
DEVICE void norm_sums(Joined<const T> x, const float* add, float* sums, int P, int C, int G, int chunk) {
    SHARED(float, first, MAX_THREADS * VECTOR);
    SHARED(float, second, MAX_THREADS * VECTOR);
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y, width = C / G;
    PHASE(t) {
        const int row = t / lanes, c = t % lanes * VECTOR;
        float offset[VECTOR], origin = 0.0f, s[VECTOR] = {}, q[VECTOR] = {};
        load_add(add, b, C, c, offset);
        each_channel(
            c, width, [&](int group) { origin = anchor(x, add, b, P, C, group * width); }, [&](int j) { offset[j] -= origin; });
        const Column<const T> maps[] = {column(x, b, P, C, c)};
        each_pixel(row, maps, P, rows, chunk, [&](int, const float (&v)[1][VECTOR]) {
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
DEVICE void norm_stats(Joined<const T> x, const float* add, const float* sums, float* stats, int P, int C, int G, int pieces, float eps) {
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

// û = γ x̂ + β of a thread's channels as a map of x. Few numbers for each: registers decide how many threads ask memory at a time.
struct NormChannels {
    float scale[VECTOR], shift[VECTOR];
};
template <class T>
DEVICE NormChannels norm_channels(const float* add, const float* stats, const T* gamma, const T* beta, int b, int C, int G, int c) {
    NormChannels to;
    float offset[VECTOR];
    load_add(add, b, C, c, offset);
    load(gamma + c, to.scale);
    load(beta + c, to.shift);
    float mean = 0.0f, inverse = 0.0f;
    const auto enter = [&](int group) {
        mean = stats[(b * G + group) * 2];
        inverse = stats[(b * G + group) * 2 + 1];
    };
    each_channel(c, C / G, enter, [&](int j) {
        to.scale[j] *= inverse;
        to.shift[j] += (offset[j] - mean) * to.scale[j];
    });
    return to;
}
// dû, from û and dy.
template <class T>
DEVICE float norm_slope(float u, float dy, int activate) {
    return activate ? dy * silu_slope<T>(u) : dy;
}

// y = act((x + add - mean) / σ · γ + β); act is SiLU or nothing.
template <class T>
DEVICE void norm_apply(Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, T* y, int P, int C, int G,
                       int chunk, int activate) {
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int c = t % lanes * VECTOR;
        const NormChannels to = norm_channels(add, stats, gamma, beta, b, C, G, c);
        const Column<const T> maps[] = {column(x, b, P, C, c)};
        const Column<T> out = column(y, b, P, C, c);
        each_pixel(t / lanes, maps, P, rows, chunk, [&](int p, float (&v)[1][VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                v[0][j] = v[0][j] * to.scale[j] + to.shift[j];
                if (activate) v[0][j] = silu<T>(v[0][j]);
            }
            store(v[0], out.at + p * out.step);
        });
    }
}

// Sums of γ · dû and γ · dû · x̂ over groups, where û = γ x̂ + β: into sums [B, pieces, G, 2]. Grid and block as for norm_sums.
template <class T>
DEVICE void norm_back_sums(Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, float* sums,
                           int P, int C, int G, int chunk, int activate) {
    SHARED(float, first, MAX_THREADS * VECTOR);
    SHARED(float, second, MAX_THREADS * VECTOR);
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int row = t / lanes, c = t % lanes * VECTOR;
        float s[VECTOR] = {}, q[VECTOR] = {};
        const NormChannels to = norm_channels(add, stats, gamma, beta, b, C, G, c);
        const Pack<T> least = pack_at(beta + c);
        const Column<const T> maps[] = {column(x, b, P, C, c), column(dy, b, P, C, c)};
        each_pixel(row, maps, P, rows, chunk, [&](int, const float (&v)[2][VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float u = v[0][j] * to.scale[j] + to.shift[j], slope = norm_slope<T>(u, v[1][j], activate);
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
DEVICE void norm_back_apply(Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy,
                            Joined<const T> more, const float* means, Joined<T> dx, int P, int C, int G, int chunk, int activate) {
    const int lanes = C / VECTOR, rows = blockDim.x / lanes, b = blockIdx.y;
    PHASE(t) {
        const int row = t / lanes, c = t % lanes * VECTOR;
        const NormChannels to = norm_channels(add, stats, gamma, beta, b, C, G, c);
        float less[VECTOR], along[VECTOR];  // (mean(γ dû) + x̂ mean(γ dû x̂)) / σ, as a map of x too
        load_add(add, b, C, c, less);
        float middle = 0.0f, inverse = 0.0f, mean = 0.0f, slant = 0.0f;
        const auto enter = [&](int group) {
            const float *stat = stats + (b * G + group) * 2, *by = means + (b * G + group) * 2;
            middle = stat[0];
            inverse = stat[1];
            mean = inverse * by[0];
            slant = inverse * inverse * by[1];
        };
        each_channel(c, C / G, enter, [&](int j) {
            along[j] = slant;
            less[j] = mean + (less[j] - middle) * slant;
        });
        const auto through = [&](int j, float v, float d) {
            return to.scale[j] * norm_slope<T>(v * to.scale[j] + to.shift[j], d, activate) - (v * along[j] + less[j]);
        };
        const Column<const T> from = column(x, b, P, C, c), slope = column(dy, b, P, C, c);
        const Column<T> out = column(dx, b, P, C, c);
        if (more.first) {
            const Column<const T> maps[] = {from, slope, column(more, b, P, C, c)};
            each_pixel(row, maps, P, rows, chunk, [&](int p, float (&v)[3][VECTOR]) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[0][j] = through(j, v[0][j], v[1][j]) + v[2][j];
                store(v[0], out.at + p * out.step);
            });
        } else {
            const Column<const T> maps[] = {from, slope};
            each_pixel(row, maps, P, rows, chunk, [&](int p, float (&v)[2][VECTOR]) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[0][j] = through(j, v[0][j], v[1][j]);
                store(v[0], out.at + p * out.step);
            });
        }
    }
}

// --- The gated feed-forward network's middle ----------------------------------------------------------------------------------------------
//
// both [N, 2D]: values, then gates. One thread for eight of N × D; D a multiple of 8; `packs` is N × D / 8.

template <class T>
DEVICE void geglu(const T* both, T* y, unsigned int packs, int D) {
    PHASE(t) {
        const Spot at = spot(t, D / VECTOR);
        if (at.pack < packs) {
            const T* row = both + static_cast<long long>(at.row) * 2 * D + at.lane * VECTOR;
            float value[VECTOR], gate[VECTOR];
            load(row, value);
            load(row + D, gate);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) value[j] *= gate[j] * normal<T>(gate[j]).share;
            store(value, y + static_cast<long long>(at.pack) * VECTOR);
        }
    }
}

template <class T>
DEVICE void geglu_back(const T* both, const T* dy, T* dboth, unsigned int packs, int D) {
    PHASE(t) {
        const Spot at = spot(t, D / VECTOR);
        if (at.pack < packs) {
            const long long place = static_cast<long long>(at.row) * 2 * D + at.lane * VECTOR;
            float value[VECTOR], gate[VECTOR], d[VECTOR];
            load(both + place, value);
            load(both + place + D, gate);
            load(dy + static_cast<long long>(at.pack) * VECTOR, d);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float g = gate[j];
                const Normal n = normal<T>(g);
                gate[j] = d[j] * value[j] * (n.share + g * n.density);
                value[j] = d[j] * g * n.share;
            }
            store(value, dboth + place);
            store(gate, dboth + place + D);
        }
    }
}

// --- Layer norm beside a residual ---------------------------------------------------------------------------------------------------------
//
// Rows of D numbers, D a multiple of 8. `lanes` threads of one warp, a power of two, share a row, and hold it in registers between its sums; grid: the
// rows over blockDim / lanes.

constexpr int ROW_THREADS = 256;  // of a block
constexpr int HELD = 5;           // packs of a row that one of its threads holds at most

// What the threads of this one's row have for their OWN, joined: their sum, if nothing else is asked for.
DEVICE float plus(float a, float b) { return a + b; }
#ifdef __CUDACC_RTC__
template <class F>
DEVICE float across(const float (&own)[1], int, int lanes, F join) {
    float all = own[0];
    for (int step = lanes / 2; step > 0; step /= 2) all = join(all, __shfl_xor_sync(0xffffffffu, all, step));
    return all;
}
DEVICE float across(const float (&own)[1], int t, int lanes) { return across(own, t, lanes, plus); }
#else
template <class F>
DEVICE float across(const float (*own)[1], int t, int lanes, F join) {
    const int first = t / lanes * lanes;
    float all = own[first][0];
    for (int i = first + 1; i < first + lanes; ++i) all = join(all, own[i][0]);
    return all;
}
DEVICE float across(const float (*own)[1], int t, int lanes) { return across(own, t, lanes, plus); }
#endif

// A thread's part of a row: packs `lane`, `lane` + lanes, ... of it. None of a row that there is not, whose threads still meet the others of their warp.
struct Part {
    long long row;
    int lane, lanes, packs;
};
DEVICE Part part_of(int t, int N, int D, int lanes) {
    const long long row = static_cast<long long>(blockIdx.x) * (blockDim.x / lanes) + t / lanes;
    return {row, t % lanes, lanes, row < N ? D / VECTOR : 0};
}
// work(k, channel) for each of them.
template <class F>
DEVICE void each_held(const Part& part, F work) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        const int i = k * part.lanes + part.lane;
        if (i < part.packs) work(k, i * VECTOR);
    }
}

// Mean and 1/σ of the rows that threads hold.
template <class T>
DEVICE void row_moments(OWNED(Pack<T>, held, HELD), OWNED(float, mean, 1), OWNED(float, inverse, 1), int N, int D, int lanes, float eps) {
    OWN(float, total, 1);
    PHASE(t) {
        float s = 0.0f;
        each_held(part_of(t, N, D, lanes), [&](int k, int) {
            float v[VECTOR];
            unpack(OF(held, t)[k], v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) s += v[j];
        });
        OF(total, t)[0] = s;
    }
    PHASE(t) OF(mean, t)[0] = across(total, t, lanes) / D;
    PHASE(t) {
        const float middle = OF(mean, t)[0];
        float q = 0.0f;
        each_held(part_of(t, N, D, lanes), [&](int k, int) {
            float v[VECTOR];
            forget(OF(held, t)[k]);
            unpack(OF(held, t)[k], v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) q += (v[j] - middle) * (v[j] - middle);
        });
        OF(total, t)[0] = q;
    }
    PHASE(t) OF(inverse, t)[0] = 1.0f / sqrt(across(total, t, lanes) / D + eps);
}

// The row that a thread holds, less its mean and over its σ, times the scale and plus the shift that affine(channel, scale, shift) gives.
template <class X, class T, class A>
DEVICE void put_normed(const Part& part, Pack<X> (&held)[HELD], float mean, float inverse, T* to, A affine) {
    each_held(part, [&](int k, int c) {
        float v[VECTOR], scale[VECTOR], shift[VECTOR];
        forget(held[k]);
        unpack(held[k], v);
        affine(c, scale, shift);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[j] = (v[j] - mean) * inverse * scale[j] + shift[j];
        store(v, to + c);
    });
}

// Keeps a row's mean and 1/σ in stats [N, 2].
DEVICE void keep_moments(const Part& part, float mean, float inverse, float* stats) {
    if (part.lane == 0 && part.packs > 0) {
        stats[part.row * 2] = mean;
        stats[part.row * 2 + 1] = inverse;
    }
}

// sum = a + b (b may be null: then sum is not written, and stands for a), y = norm(sum) · γ + β, stats [N, 2]: mean and 1/σ.
template <class T>
DEVICE void layer_norm(const T* a, const T* b, const T* gamma, const T* beta, T* sum, T* y, float* stats, int N, int D, int lanes, float eps) {
    OWN(Pack<T>, held, HELD);
    OWN(float, mean, 1);
    OWN(float, inverse, 1);
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const T *const from = a + part.row * D, *const and_from = b + part.row * D;
        T* const to = sum + part.row * D;
        auto& row = OF(held, t);
        each_held(part, [&](int k, int c) { row[k] = pack_at(from + c); });
        if (b) {
            Pack<T> more[HELD];
            each_held(part, [&](int k, int c) { more[k] = pack_at(and_from + c); });
            each_held(part, [&](int k, int c) {
                float v[VECTOR], w[VECTOR];
                unpack(row[k], v);
                unpack(more[k], w);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[j] += w[j];
                row[k] = packed<T>(v);  // what is normed is what is kept
                *reinterpret_cast<Pack<T>*>(to + c) = row[k];
            });
        }
    }
    row_moments<T>(held, mean, inverse, N, D, lanes, eps);
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const float middle = OF(mean, t)[0], factor = OF(inverse, t)[0];
        T* const to = y + part.row * D;
        put_normed(part, OF(held, t), middle, factor, to, [&](int c, float(&scale)[VECTOR], float(&shift)[VECTOR]) {
            load(gamma + c, scale);
            load(beta + c, shift);
        });
        keep_moments(part, middle, factor, stats);
    }
}

// x̂ and γ dy of one pack.
template <class X, class T>
DEVICE void normed_and_slope(Pack<X>& number, Pack<T>& slope, const float (&gamma)[VECTOR], float mean, float inverse, float (&v)[VECTOR],
                             float (&d)[VECTOR]) {
    forget(number);
    forget(slope);
    unpack(number, v);
    unpack(slope, d);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        v[j] = (v[j] - mean) * inverse;
        d[j] *= gamma[j];
    }
}

// dx = (γ dy - mean(γ dy) - x̂ mean(γ dy x̂)) / σ + more; `more` (or null) is the gradient by the sum itself.
template <class T>
DEVICE void layer_norm_back(const T* x, const T* gamma, const float* stats, const T* dy, const T* more, T* dx, int N, int D, int lanes) {
    OWN(Pack<T>, numbers, HELD);
    OWN(Pack<T>, slopes, HELD);
    OWN(float, first, 1);
    OWN(float, second, 1);
    const auto both = [&](Pack<T>& number, Pack<T>& slope, int c, float mean, float inverse, float (&v)[VECTOR], float (&d)[VECTOR]) {
        float scale[VECTOR];
        load(gamma + c, scale);
        normed_and_slope(number, slope, scale, mean, inverse, v, d);
    };
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const T *const from = x + part.row * D, *const slope = dy + part.row * D;
        each_held(part, [&](int k, int c) {
            OF(numbers, t)[k] = pack_at(from + c);
            OF(slopes, t)[k] = pack_at(slope + c);
        });
        const float mean = part.packs ? stats[part.row * 2] : 0.0f, inverse = part.packs ? stats[part.row * 2 + 1] : 0.0f;
        float s = 0.0f, q = 0.0f;
        each_held(part, [&](int k, int c) {
            float v[VECTOR], d[VECTOR];
            both(OF(numbers, t)[k], OF(slopes, t)[k], c, mean, inverse, v, d);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                s += d[j];
                q += d[j] * v[j];
            }
        });
        OF(first, t)[0] = s;
        OF(second, t)[0] = q;
    }
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const float middle = across(first, t, lanes) / D, along = across(second, t, lanes) / D;
        const float mean = part.packs ? stats[part.row * 2] : 0.0f, inverse = part.packs ? stats[part.row * 2 + 1] : 0.0f;
        const T* const other = more + part.row * D;
        T* const to = dx + part.row * D;
        each_held(part, [&](int k, int c) {
            float v[VECTOR], d[VECTOR], past[VECTOR] = {};
            both(OF(numbers, t)[k], OF(slopes, t)[k], c, mean, inverse, v, d);
            if (more) load(other + c, past);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] = past[j] + inverse * (d[j] - middle - v[j] * along);
            store(v, to + c);
        });
    }
}

// --- Adaptive layer norm ------------------------------------------------------------------------------------------------------------------
//
// A connector's (AdaLN): rows of [B, tokens, D], as above, whose shift and scale are their sample's own, `lead` [B, 2 D] in float32: shifts, then scales.

// γ = 1 + scale.
DEVICE void load_gamma(const float* scales, float (&to)[VECTOR]) {
    load(scales, to);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to[j] += 1.0f;
}

// y = norm(x) · (1 + scale) + shift, in another kind than x maybe; stats [B · tokens, 2]: mean and 1/σ.
template <class X, class T>
DEVICE void ada_layer_norm(const X* x, const float* lead, T* y, float* stats, int B, int tokens, int D, int lanes, float eps) {
    OWN(Pack<X>, held, HELD);
    OWN(float, mean, 1);
    OWN(float, inverse, 1);
    const int N = B * tokens;
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const X* const from = x + part.row * D;
        each_held(part, [&](int k, int c) { OF(held, t)[k] = pack_at(from + c); });
    }
    row_moments<X>(held, mean, inverse, N, D, lanes, eps);
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const float middle = OF(mean, t)[0], factor = OF(inverse, t)[0];
        const float* const shifts = lead + static_cast<int>(part.row) / tokens * 2 * D;
        T* const to = y + part.row * D;
        put_normed(part, OF(held, t), middle, factor, to, [&](int c, float(&scale)[VECTOR], float(&shift)[VECTOR]) {
            load_gamma(shifts + D + c, scale);
            load(shifts + c, shift);
        });
        keep_moments(part, middle, factor, stats);
    }
}

constexpr int ADA_ROWS = 4;  // of one sample, that the threads of a row take one after the other

// dx as for layer_norm, of γ = 1 + scale; and of the gradient by `lead` the sums over each ADA_ROWS rows: sums [parts of a sample, B, 2 D].
template <class X, class T>
DEVICE void ada_layer_norm_back(const X* x, const float* lead, const float* stats, const T* dy, X* dx, float* sums, int B, int tokens, int D,
                                int lanes) {
    OWN(Pack<X>, numbers, HELD);
    OWN(Pack<T>, slopes, HELD);
    OWN(float, by_shift, HELD * VECTOR);
    OWN(float, by_scale, HELD * VECTOR);
    OWN(float, first, 1);
    OWN(float, second, 1);
    const int parts = (tokens + ADA_ROWS - 1) / ADA_ROWS;
    // Task `row` is part `row` % parts of sample `row` / parts.
    const auto task = [&](int t) { return part_of(t, B * parts, D, lanes); };
    const auto sample_of = [&](int t) { return static_cast<int>(task(t).row) / parts; };
    // Its i-th row, of which there is nothing if the sample has none.
    const auto row_of = [&](int t, int i) {
        Part row = task(t);
        const int sample = sample_of(t), token = (static_cast<int>(row.row) - sample * parts) * ADA_ROWS + i;
        row.row = static_cast<long long>(sample) * tokens + token;
        if (token >= tokens) row.packs = 0;
        return row;
    };
    const auto both = [&](Pack<X>& number, Pack<T>& slope, const float* scales, const float* moments, float (&v)[VECTOR], float (&d)[VECTOR]) {
        float gamma[VECTOR];
        load_gamma(scales, gamma);
        normed_and_slope(number, slope, gamma, moments[0], moments[1], v, d);
    };
    PHASE(t) {
#pragma unroll
        for (int j = 0; j < HELD * VECTOR; ++j) OF(by_shift, t)[j] = OF(by_scale, t)[j] = 0.0f;
    }
    for (int i = 0; i < ADA_ROWS; ++i) {
        PHASE(t) {
            const Part row = row_of(t, i);
            const float *const scales = lead + (sample_of(t) * 2 + 1) * D, *const moments = stats + row.row * 2;
            each_held(row, [&](int k, int c) {
                OF(numbers, t)[k] = pack_at(x + row.row * D + c);
                OF(slopes, t)[k] = pack_at(dy + row.row * D + c);
            });
            float s = 0.0f, q = 0.0f;
            each_held(row, [&](int k, int c) {
                float v[VECTOR], d[VECTOR], slope[VECTOR];
                both(OF(numbers, t)[k], OF(slopes, t)[k], scales + c, moments, v, d);
                unpack(OF(slopes, t)[k], slope);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    s += d[j];
                    q += d[j] * v[j];
                    OF(by_shift, t)[k * VECTOR + j] += slope[j];
                    OF(by_scale, t)[k * VECTOR + j] += slope[j] * v[j];
                }
            });
            OF(first, t)[0] = s;
            OF(second, t)[0] = q;
        }
        PHASE(t) {
            const Part row = row_of(t, i);
            const float *const scales = lead + (sample_of(t) * 2 + 1) * D, *const moments = stats + row.row * 2;
            const float middle = across(first, t, lanes) / D, along = across(second, t, lanes) / D;
            each_held(row, [&](int k, int c) {
                float v[VECTOR], d[VECTOR];
                both(OF(numbers, t)[k], OF(slopes, t)[k], scales + c, moments, v, d);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) v[j] = moments[1] * (d[j] - middle - v[j] * along);
                store(v, dx + row.row * D + c);
            });
        }
    }
    PHASE(t) {
        const Part part = task(t);
        const int sample = sample_of(t), number = static_cast<int>(part.row) - sample * parts;
        float* const to = sums + (static_cast<long long>(number) * B + sample) * 2 * D;
        each_held(part, [&](int k, int c) {
            float shift[VECTOR], scale[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                shift[j] = OF(by_shift, t)[k * VECTOR + j];
                scale[j] = OF(by_scale, t)[k * VECTOR + j];
            }
            store(shift, to + c);
            store(scale, to + D + c);
        });
    }
}

// The sum over parts [parts, packs × 8]. One thread for eight numbers.
template <class T>
DEVICE void sum_parts(const float* sums, T* to, unsigned int packs, int parts) {
    PHASE(t) {
        const unsigned int pack = spot(t, 1).pack;
        if (pack < packs) {
            float sum[VECTOR] = {};
            for (int part = 0; part < parts; ++part) {
                float v[VECTOR];
                load(sums + (static_cast<long long>(part) * packs + pack) * VECTOR, v);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) sum[j] += v[j];
            }
            store(sum, to + static_cast<long long>(pack) * VECTOR);
        }
    }
}

// --- Text encoders, which nothing is trained through --------------------------------------------------------------------------------------

// T5's and LLaMA's norm: y = (x / √(mean(x²) + ε)) · w, rounded before the weight as theirs is. Rows as for layer_norm, of any length.
template <class T>
DEVICE void rms_norm(const T* x, const T* weight, T* y, int N, int D, int lanes, float eps) {
    OWN(float, total, 1);
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        float q = 0.0f;
        for (int i = part.lane; i < part.packs; i += lanes) {
            float v[VECTOR];
            load(x + part.row * D + i * VECTOR, v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) q += v[j] * v[j];
        }
        OF(total, t)[0] = q;
    }
    PHASE(t) {
        const Part part = part_of(t, N, D, lanes);
        const float inverse = 1.0f / sqrt(across(total, t, lanes) / D + eps);
        for (int i = part.lane; i < part.packs; i += lanes) {
            const long long place = part.row * D + i * VECTOR;
            float v[VECTOR], scale[VECTOR];
            load(x + place, v);  // again: it is in the cache
            load(weight + i * VECTOR, scale);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] *= inverse;
            unpack(packed<T>(v), v);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] *= scale[j];
            store(v, y + place);
        }
    }
}

// The GELU's tanh approximation.
template <class T>
DEVICE float gelu_tanh(float x) { return x * sigmoid<T>(1.59576912160573073f * (x + 0.044715f * x * x * x)); }  // ½ (1 + tanh z) = σ(2 z)

// both [N, 2D]: gates, then values; y = gelu(gate) · value.
template <class T>
DEVICE void gated_gelu(const T* both, T* y, unsigned int packs, int D) {
    PHASE(t) {
        const Spot at = spot(t, D / VECTOR);
        if (at.pack < packs) {
            const T* row = both + static_cast<long long>(at.row) * 2 * D + at.lane * VECTOR;
            float gate[VECTOR], value[VECTOR];
            load(row, gate);
            load(row + D, value);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) value[j] *= gelu_tanh<T>(gate[j]);
            store(value, y + static_cast<long long>(at.pack) * VECTOR);
        }
    }
}

// --- Residual -----------------------------------------------------------------------------------------------------------------------------

// y = a + b + more + bias over maps [N, C], more may be null; bias [C] in float32. One thread for eight of N × C.
template <class T>
DEVICE void add_biased(const T* a, const T* b, const T* more, const float* bias, T* y, unsigned int packs, int C) {
    PHASE(t) {
        const Spot at = spot(t, C / VECTOR);
        if (at.pack < packs) {
            const long long place = static_cast<long long>(at.pack) * VECTOR;
            float v[VECTOR], w[VECTOR], third[VECTOR] = {}, each[VECTOR];
            load(a + place, v);
            load(b + place, w);
            if (more) load(more + place, third);
            load(bias + at.lane * VECTOR, each);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) v[j] += w[j] + third[j] + each[j];
            store(v, y + place);
        }
    }
}

// --- Changes of resolution ----------------------------------------------------------------------------------------------------------------

// Four maps of every second pixel of every second row, woven into one: y[b, 2i + v, 2j + u, c] = quarters[b, i + s(v), j + s(u), (v, u, c)] + bias[c],
// where s(0) is `shift` and s(1) is 1; bias (or null) in float32. y [B, 2H, 2W, C], quarters [B, H + 1, W + 1, 4 C]. One thread for eight of y.
template <class T>
DEVICE void weave(const T* quarters, const float* bias, T* y, unsigned int packs, int H, int W, int C, int shift) {
    PHASE(t) {
        const Spot at = spot(t, C / VECTOR);
        if (at.pack < packs) {
            const unsigned int width = 2 * W, height = 2 * H, line = at.row / width, b = line / height;
            const int x = static_cast<int>(at.row - line * width), r = static_cast<int>(line - b * height), v = r % 2, u = x % 2;
            const long long from = (static_cast<long long>(b) * (H + 1) + r / 2 + (v ? 1 : shift)) * (W + 1) + x / 2 + (u ? 1 : shift);
            float numbers[VECTOR], more[VECTOR];
            load(quarters + (from * 4 + v * 2 + u) * C + at.lane * VECTOR, numbers);
            if (bias) {
                load(bias + at.lane * VECTOR, more);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) numbers[j] += more[j];
            }
            store(numbers, y + static_cast<long long>(at.pack) * VECTOR);
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

constexpr int SQUARE_THREADS = 256;

// Σ x² of each block's share of x [count], in float64: into sums [blocks].
DEVICE void square_sums(const float* x, double* sums, long long count) {
    SHARED(double, each, SQUARE_THREADS);
    constexpr int FEW = 32;
    PHASE(t) {
        const long long step = static_cast<long long>(gridDim.x) * SQUARE_THREADS * VECTOR;
        double sum = 0.0;
        for (long long i = (static_cast<long long>(blockIdx.x) * SQUARE_THREADS + t) * VECTOR; i < count; i += step) {
            float v[VECTOR] = {};
            if (i + VECTOR <= count) {
                load(x + i, v);
            } else {
                for (int j = 0; i + j < count; ++j) v[j] = x[i + j];
            }
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum += static_cast<double>(v[j]) * static_cast<double>(v[j]);
        }
        each[t] = sum;
    }
    SYNC();
    PHASE(t) if (t < FEW) {
        for (int i = t + FEW; i < SQUARE_THREADS; i += FEW) each[t] += each[i];
    }
    SYNC();
    PHASE(t) if (t == 0) {
        double sum = 0.0;
        for (int i = 0; i < FEW; ++i) sum += each[i];
        sums[blockIdx.x] = sum;
    }
}

}  // namespace ella

#ifdef __CUDACC_RTC__
// What the driver finds by name: NAME_f32, NAME_bf16 and NAME_f16.
#define KERNEL(name, type, suffix) extern "C" __global__ void __launch_bounds__(ella::MAX_THREADS) name##_##suffix
// No more registers than let two of the largest blocks run beside each other.
#define LEAN_KERNEL(name, type, suffix) extern "C" __global__ void __launch_bounds__(ella::MAX_THREADS, 2) name##_##suffix
// The threads of a row hold much of it: a smaller block, so that their registers are enough.
#define ROW_KERNEL(name, type, suffix) extern "C" __global__ void __launch_bounds__(ella::ROW_THREADS, 3) name##_##suffix
#define KERNELS(T, suffix)                                                                                                                  \
    KERNEL(norm_sums, T, suffix)(ella::Joined<const T> x, const float* add, float* sums, int P, int C, int G, int chunk) {                  \
        ella::norm_sums<T>(x, add, sums, P, C, G, chunk);                                                                                   \
    }                                                                                                                                       \
    KERNEL(norm_stats, T, suffix)                                                                                                           \
    (ella::Joined<const T> x, const float* add, const float* sums, float* stats, int P, int C, int G, int pieces, float eps) {              \
        ella::norm_stats<T>(x, add, sums, stats, P, C, G, pieces, eps);                                                                     \
    }                                                                                                                                       \
    KERNEL(norm_apply, T, suffix)                                                                                                           \
    (ella::Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, T* y, int P, int C, int G, int chunk,    \
     int activate) {                                                                                                                        \
        ella::norm_apply<T>(x, add, stats, gamma, beta, y, P, C, G, chunk, activate);                                                       \
    }                                                                                                                                       \
    LEAN_KERNEL(norm_back_sums, T, suffix)                                                                                                  \
    (ella::Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, float* sums, int P, int C,  \
     int G, int chunk, int activate) {                                                                                                      \
        ella::norm_back_sums<T>(x, add, stats, gamma, beta, dy, sums, P, C, G, chunk, activate);                                            \
    }                                                                                                                                       \
    LEAN_KERNEL(norm_back_apply, T, suffix)                                                                                                 \
    (ella::Joined<const T> x, const float* add, const float* stats, const T* gamma, const T* beta, const T* dy, ella::Joined<const T> more, \
     const float* means, ella::Joined<T> dx, int P, int C, int G, int chunk, int activate) {                                                \
        ella::norm_back_apply<T>(x, add, stats, gamma, beta, dy, more, means, dx, P, C, G, chunk, activate);                                \
    }                                                                                                                                       \
    KERNEL(geglu, T, suffix)(const T* both, T* y, unsigned int packs, int D) { ella::geglu(both, y, packs, D); }                            \
    KERNEL(geglu_back, T, suffix)(const T* both, const T* dy, T* dboth, unsigned int packs, int D) {                                        \
        ella::geglu_back(both, dy, dboth, packs, D);                                                                                        \
    }                                                                                                                                       \
    ROW_KERNEL(layer_norm, T, suffix)                                                                                                       \
    (const T* a, const T* b, const T* gamma, const T* beta, T* sum, T* y, float* stats, int N, int D, int lanes, float eps) {               \
        ella::layer_norm(a, b, gamma, beta, sum, y, stats, N, D, lanes, eps);                                                               \
    }                                                                                                                                       \
    ROW_KERNEL(layer_norm_back, T, suffix)                                                                                                  \
    (const T* x, const T* gamma, const float* stats, const T* dy, const T* more, T* dx, int N, int D, int lanes) {                          \
        ella::layer_norm_back(x, gamma, stats, dy, more, dx, N, D, lanes);                                                                  \
    }                                                                                                                                       \
    KERNEL(sum_parts, T, suffix)(const float* sums, T* to, unsigned int packs, int parts) {                                                 \
        ella::sum_parts<T>(sums, to, packs, parts);                                                                                         \
    }                                                                                                                                       \
    KERNEL(rms_norm, T, suffix)(const T* x, const T* weight, T* y, int N, int D, int lanes, float eps) {                                    \
        ella::rms_norm(x, weight, y, N, D, lanes, eps);                                                                                     \
    }                                                                                                                                       \
    KERNEL(gated_gelu, T, suffix)(const T* both, T* y, unsigned int packs, int D) { ella::gated_gelu(both, y, packs, D); }                  \
    KERNEL(add_biased, T, suffix)(const T* a, const T* b, const T* more, const float* bias, T* y, unsigned int packs, int C) {              \
        ella::add_biased(a, b, more, bias, y, packs, C);                                                                                    \
    }                                                                                                                                       \
    KERNEL(weave, T, suffix)(const T* quarters, const float* bias, T* y, unsigned int packs, int H, int W, int C, int shift) {              \
        ella::weave(quarters, bias, y, packs, H, W, C, shift);                                                                              \
    }
KERNELS(float, f32)
KERNELS(ella::bf16, bf16)
KERNELS(ella::f16, f16)
// NAME_X_T: of numbers of one kind to those of another.
#define ADA_KERNELS(X, T, suffix)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(ella::ROW_THREADS) ada_layer_norm_##suffix(                                                \
        const X* x, const float* lead, T* y, float* stats, int B, int tokens, int D, int lanes, float eps) {                                \
        ella::ada_layer_norm(x, lead, y, stats, B, tokens, D, lanes, eps);                                                                  \
    }                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(ella::ROW_THREADS) ada_layer_norm_back_##suffix(                                           \
        const X* x, const float* lead, const float* stats, const T* dy, X* dx, float* sums, int B, int tokens, int D, int lanes) {          \
        ella::ada_layer_norm_back(x, lead, stats, dy, dx, sums, B, tokens, D, lanes);                                                       \
    }
ADA_KERNELS(float, float, f32_f32)
ADA_KERNELS(float, ella::bf16, f32_bf16)
ADA_KERNELS(float, ella::f16, f32_f16)
ADA_KERNELS(ella::bf16, ella::bf16, bf16_bf16)
ADA_KERNELS(ella::f16, ella::f16, f16_f16)
KERNEL(adamw, float, f32)(float* p, const float* g, float* m, float* v, float* ema, long long count, ella::Rates r) {
    ella::adamw(p, g, m, v, ema, count, r);
}
KERNEL(square_sums, float, f32)(const float* x, double* sums, long long count) { ella::square_sums(x, sums, count); }
KERNEL(norm_back_means, float, f32)(const float* sums, float* means, int P, int C, int G, int pieces) {
    ella::norm_back_means(sums, means, P, C, G, pieces);
}
#endif
