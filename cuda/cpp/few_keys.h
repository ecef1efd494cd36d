// Attention to few keys, as a U-Net's to the text: by the same two compilers as the kernels before it, whose text this goes on with.
//
// All keys of a head lie on the chip at once, so that a softmax is one step and its gradient needs nothing of the forward pass but what went into it;
// and a tile of queries is read once, whatever is made of it. libtorch's kernels are made for many keys: the gradient by the queries is added up in
// memory, in float32, for every tile of keys, of which there is one.
//
// Letters: B samples, N queries, L keys, H heads, D channels of a head, C = H D. q and y [B, N, C], kv [B, L, 2C]: keys, then values. Grid: (H × parts,
// B), a part being every so-manieth tile of queries. Block: 4 warps, each with 16 queries of a tile or 16 keys; 8 for wide heads, whose second
// four have the second half of the channels (and make the same shares once more).

namespace ella {

constexpr int KEYS = 64;  // at most
constexpr int TILE = 64;  // queries at a time

#ifdef __CUDACC_RTC__
constexpr int MOST_ON_CHIP = 99 << 10;  // of the GPUs that have least
#endif

// What follows from D. A tile's rows are filled up with zeros to whole steps of a product, and their distance keeps eight of them in different banks.
template <class T, int D>
struct Head {
    static constexpr int STEP = 16, WIDE = (D + STEP - 1) / STEP * STEP, STRIDE = WIDE + VECTOR, SHARES = KEYS + VECTOR;
    static constexpr int SIDES = D > 80 ? 2 : 1, THREADS = 4 * WARP * SIDES, COLUMNS = D / SIDES;
    static constexpr int FORWARD = (2 * KEYS + TILE) * STRIDE + TILE * SHARES, BACKWARD = FORWARD + TILE * STRIDE;  // numbers on the chip
    static_assert(BACKWARD * sizeof(T) <= MOST_ON_CHIP && KEYS == TILE && COLUMNS % VECTOR == 0 && TILE * WIDE % (THREADS * VECTOR) == 0);
};

// --- Products on the chip -----------------------------------------------------------------------------------------------------------------
//
// A warp's products are of 16 rows, by tensor cores on a GPU.

DEVICE int row_of(int t, int i) { return t % WARP / 4 + i / 2 * 8; }
DEVICE int column_of(int t, int i) { return t % 4 * 2 + i % 2; }

// A matrix on the chip by its entries (i, k), where k is what a product adds up over: of rows i, or of rows k.
template <class T>
struct Along {
    const T* at;
    int stride;
    DEVICE float entry(int i, int k) const { return widen(at[i * stride + k]); }
    DEVICE Along from(int i) const { return {at + i * stride, stride}; }
};
template <class T>
struct Across {
    const T* at;
    int stride;
    DEVICE float entry(int i, int k) const { return widen(at[k * stride + i]); }
    DEVICE Across from(int i) const { return {at + i, stride}; }
};

#ifdef __CUDACC_RTC__
#if __CUDA_ARCH__ >= 800
// The left operand of a product: 16 rows, 16 to add up over. The lanes say where rows of 8 lie.
template <class T>
DEVICE void left(Along<T> a, int lane, unsigned int (&to)[4]) { matrices(to, a.at + lane % 16 * a.stride + lane / 16 * 8); }
template <class T>
DEVICE void left(Across<T> a, int lane, unsigned int (&to)[4]) { turned(to, a.at + (lane / 16 * 8 + lane % 8) * a.stride + lane / 8 % 2 * 8); }
// The right one: two times eight columns, or eight.
template <class T>
DEVICE void right(Along<T> b, int lane, unsigned int (&to)[4]) { matrices(to, b.at + (lane / 16 * 8 + lane % 8) * b.stride + lane / 8 % 2 * 8); }
template <class T>
DEVICE void right(Across<T> b, int lane, unsigned int (&to)[4]) { turned(to, b.at + lane % 16 * b.stride + lane / 16 * 8); }
template <class T>
DEVICE void right(Along<T> b, int lane, unsigned int (&to)[2]) { matrices(to, b.at + lane % 8 * b.stride + lane / 8 % 2 * 8); }
template <class T>
DEVICE void right(Across<T> b, int lane, unsigned int (&to)[2]) { turned(to, b.at + lane % 16 * b.stride); }

template <class T>
DEVICE Along<T> further(Along<T> a, int k) { return {a.at + k, a.stride}; }
template <class T>
DEVICE Across<T> further(Across<T> a, int k) { return {a.at + k * a.stride, a.stride}; }

// c += a b over K, a of 16 rows and b of 8 COUNT columns.
template <int K, int COUNT, class T, template <class> class A, template <class> class B>
DEVICE void multiply(int t, Fragment (&c)[COUNT], A<T> a, B<T> b) {
#pragma unroll
    for (int k = 0; k < K; k += Head<T, K>::STEP) {
        unsigned int one[4], two[4], last[2];
        left(further(a, k), t % WARP, one);
#pragma unroll
        for (int n = 0; n + 1 < COUNT; n += 2) {
            right(further(b.from(n * 8), k), t % WARP, two);
            multiply_add(c[n], one, two, T{});
            multiply_add(c[n + 1], one, two + 2, T{});
        }
        if (COUNT % 2) {
            right(further(b.from((COUNT - 1) * 8), k), t % WARP, last);
            multiply_add(c[COUNT - 1], one, last, T{});
        }
    }
}
#endif
#else
// What this thread has of a product, of left(row, k) and right(column, k) added up over K; each is asked once for all that it is multiplied by.
template <int K, int COUNT, class Left, class Right>
DEVICE void add_up(int t, Fragment (&c)[COUNT], Left left, Right right) {
    float rows[2][K], column[K];
    for (int r = 0; r < 2; ++r) {
        for (int k = 0; k < K; ++k) rows[r][k] = left(2 * r, k);
    }
    for (int n = 0; n < COUNT; ++n) {
        for (int j = 0; j < 2; ++j) {
            for (int k = 0; k < K; ++k) column[k] = right(n * 8 + column_of(t, j), k);
            for (int r = 0; r < 2; ++r) {
                float sum = 0.0f;
                for (int k = 0; k < K; ++k) sum += rows[r][k] * column[k];
                c[n].at[2 * r + j] += sum;
            }
        }
    }
}
template <int K, int COUNT, class T, template <class> class A, template <class> class B>
DEVICE void multiply(int t, Fragment (&c)[COUNT], A<T> a, B<T> b) {
    add_up<K>(t, c, [&](int i, int k) { return a.entry(row_of(t, i), k); }, [&](int i, int k) { return b.entry(i, k); });
}
#endif

template <int COUNT>
DEVICE void clear(Fragment (&c)[COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) c[n] = {};
}

// Two numbers beside each other.
template <class T>
DEVICE void put(T* to, float first, float second) {
    narrow(first, to[0]);
    narrow(second, to[1]);
}
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
DEVICE void put(bf16* to, float first, float second) { *reinterpret_cast<unsigned int*>(to) = pair(first, second, bf16{}); }
DEVICE void put(f16* to, float first, float second) { *reinterpret_cast<unsigned int*>(to) = pair(first, second, f16{}); }
#endif
template <int COUNT, class T>
DEVICE void put_rows(int t, const Fragment (&c)[COUNT], T* to, int stride) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) put(to + row_of(t, i) * stride + n * 8 + column_of(t, i), c[n].at[i], c[n].at[i + 1]);
    }
}

// --- Tiles --------------------------------------------------------------------------------------------------------------------------------

// Eight numbers as they lie, whatever they are.
template <class T>
struct alignas(16) Raw { unsigned int at[VECTOR * sizeof(T) / 4]; };

// A tile's first `rows` rows of D numbers from memory, `step` apart, and zeros beyond. A thread asks for all of its packs before it needs the first.
template <int D, class T>
DEVICE void take(int t, T* tile, const T* from, int rows, int step) {
    using Of = Head<T, D>;
    constexpr int LANES = Of::WIDE / VECTOR, EACH = TILE * LANES / Of::THREADS;
    Raw<T> packs[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = (t + k * Of::THREADS) / LANES, c = (t + k * Of::THREADS) % LANES * VECTOR;
        packs[k] = {};
        if (row < rows && c < D) packs[k] = *reinterpret_cast<const Raw<T>*>(from + static_cast<long long>(row) * step + c);
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = (t + k * Of::THREADS) / LANES, c = (t + k * Of::THREADS) % LANES * VECTOR;
        *reinterpret_cast<Raw<T>*>(tile + row * Of::STRIDE + c) = packs[k];
    }
}

// A tile's first `rows` rows to memory; by the threads that take the same places of the next one.
template <int D, class T>
DEVICE void give(int t, const T* tile, T* to, int rows, int step) {
    using Of = Head<T, D>;
    constexpr int LANES = Of::WIDE / VECTOR, EACH = TILE * LANES / Of::THREADS;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = (t + k * Of::THREADS) / LANES, c = (t + k * Of::THREADS) % LANES * VECTOR;
        const T* const place = tile + row * Of::STRIDE + c;
        if (row < rows && c < D) *reinterpret_cast<Raw<T>*>(to + static_cast<long long>(row) * step + c) = *reinterpret_cast<const Raw<T>*>(place);
    }
}

// Where this block's head lies, and its tiles of queries.
struct FewPlace {
    int head, part, parts, sample;
    DEVICE explicit FewPlace(int H)
        : head(blockIdx.x % H), part(blockIdx.x / H), parts(gridDim.x / H), sample(blockIdx.y) {}
    DEVICE long long at(int rows, int row, int width, int D) const {
        return (static_cast<long long>(sample) * rows + row) * width + head * D;
    }
};

// --- The attention ------------------------------------------------------------------------------------------------------------------------

constexpr int PARTNERS = 4;  // threads that share a row of scores

DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// Of a thread's scores, the largest of each of its two rows; none of keys that there are not.
DEVICE void largest_of(int t, Fragment (&scores)[KEYS / 8], int L, float (&upper)[1], float (&lower)[1]) {
    const float none = from_bits(0xff800000u);
    float most[2] = {none, none};
    if (L < KEYS) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 + column_of(t, i) >= L) scores[n].at[i] = none;
        }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) most[i / 2] = larger(most[i / 2], scores[n].at[i]);
    }
    upper[0] = most[0];
    lower[0] = most[1];
}
// The exponentials of what they are above it, in powers of two, and their sums.
DEVICE void exponentials(Fragment (&scores)[KEYS / 8], const float (&most)[2], float scale, float (&upper)[1], float (&lower)[1]) {
    const float less[2] = {most[0] * scale, most[1] * scale};
    float sum[2] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[n].at[i] = power_of_two(scores[n].at[i] * scale - less[i / 2]);
            sum[i / 2] += scores[n].at[i];
        }
    }
    upper[0] = sum[0];
    lower[0] = sum[1];
}
// Each of a thread's two rows times a number.
template <int COUNT>
DEVICE void times(Fragment (&rows)[COUNT], const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[n].at[i] *= by[i / 2];
    }
}

// The shares of L keys that a tile of queries gives them: each thread's of its two rows, and rounded in `shares`. `scale` is in powers of two.
template <int D, class T>
DEVICE void share_keys(const T* queries, const T* keys, T* shares, OWNED(Fragment, scores, KEYS / 8), OWNED(float, upper, 1), OWNED(float, lower, 1),
                       int L, float scale) {
    using Of = Head<T, D>;
    PHASE(t) {
        const int row = t / WARP % 4 * 16;
        clear(OF(scores, t));
        multiply<Of::WIDE>(t, OF(scores, t), Along<T>{queries, Of::STRIDE}.from(row), Along<T>{keys, Of::STRIDE});
        largest_of(t, OF(scores, t), L, OF(upper, t), OF(lower, t));
    }
    OWN(float, most, 2);
    PHASE(t) {
        OF(most, t)[0] = across(upper, t, PARTNERS, larger);
        OF(most, t)[1] = across(lower, t, PARTNERS, larger);
    }
    PHASE(t) exponentials(OF(scores, t), OF(most, t), scale, OF(upper, t), OF(lower, t));
    PHASE(t) {
        times(OF(scores, t), {inverse(across(upper, t, PARTNERS)), inverse(across(lower, t, PARTNERS))});
        if (t / WARP < 4) put_rows(t, OF(scores, t), shares + t / WARP * 16 * Of::SHARES, Of::SHARES);
    }
}

// y = softmax(q kᵀ · scale) v of every head; `scale` in powers of two.
template <class T, int D>
DEVICE void few_keys(const T* q, const T* kv, T* y, int N, int L, int H, float scale) {
    using Of = Head<T, D>;
    DYNAMIC(memory);
    T *const keys = reinterpret_cast<T*>(memory), *const values = keys + KEYS * Of::STRIDE, *const queries = values + KEYS * Of::STRIDE;
    T* const shares = queries + TILE * Of::STRIDE;
    OWN(Fragment, scores, KEYS / 8);
    OWN(float, upper, 1);
    OWN(float, lower, 1);
    const FewPlace here(H);
    const int C = H * D;
    PHASE(t) {
        const T* const both = kv + here.at(L, 0, 2 * C, D);
        take<D>(t, keys, both, L, 2 * C);
        take<D>(t, values, both + C, L, 2 * C);
    }
    for (int first = here.part * TILE; first < N; first += here.parts * TILE) {
        PHASE(t) take<D>(t, queries, q + here.at(N, first, C, D), N - first, C);
        SYNC();
        share_keys<D>(queries, keys, shares, scores, upper, lower, L, scale);
        SYNC();
        PHASE(t) {
            const int row = t / WARP % 4 * 16, column = t / WARP / 4 * Of::COLUMNS;
            Fragment mixed[Of::COLUMNS / 8] = {};
            multiply<KEYS>(t, mixed, Along<T>{shares, Of::SHARES}.from(row), Across<T>{values, Of::STRIDE}.from(column));
            put_rows(t, mixed, queries + row * Of::STRIDE + column, Of::STRIDE);
        }
        SYNC();
        PHASE(t) give<D>(t, queries, y + here.at(N, first, C, D), N - first, C);
    }
}

// The gradients by q, unless dq is null, and by keys and values: of each part's queries, in float32, into sums [parts, B, L, 2C].
template <class T, int D>
DEVICE void few_keys_back(const T* q, const T* kv, const T* dy, T* dq, float* sums, int N, int L, int H, float scale, float slope) {
    using Of = Head<T, D>;
    DYNAMIC(memory);
    T *const keys = reinterpret_cast<T*>(memory), *const values = keys + KEYS * Of::STRIDE, *const queries = values + KEYS * Of::STRIDE;
    T *const slopes = queries + TILE * Of::STRIDE, *const shares = slopes + TILE * Of::STRIDE;
    OWN(Fragment, scores, KEYS / 8);
    OWN(Fragment, slants, KEYS / 8);
    OWN(Fragment, by_keys, Of::COLUMNS / 8);
    OWN(Fragment, by_values, Of::COLUMNS / 8);
    OWN(Fragment, by_queries, Of::COLUMNS / 8);
    OWN(float, upper, 1);
    OWN(float, lower, 1);
    const FewPlace here(H);
    const int C = H * D;
    PHASE(t) {
        const T* const both = kv + here.at(L, 0, 2 * C, D);
        take<D>(t, keys, both, L, 2 * C);
        take<D>(t, values, both + C, L, 2 * C);
        clear(OF(by_keys, t));
        clear(OF(by_values, t));
    }
    for (int first = here.part * TILE; first < N; first += here.parts * TILE) {
        PHASE(t) {
            const long long place = here.at(N, first, C, D);
            take<D>(t, queries, q + place, N - first, C);
            take<D>(t, slopes, dy + place, N - first, C);
        }
        SYNC();
        share_keys<D>(queries, keys, shares, scores, upper, lower, L, scale);
        // Of a share p with the slope s, the score's slope is p (s - Σ p s).
        PHASE(t) {
            const int row = t / WARP % 4 * 16;
            clear(OF(slants, t));
            multiply<Of::WIDE>(t, OF(slants, t), Along<T>{slopes, Of::STRIDE}.from(row), Along<T>{values, Of::STRIDE});
            float sum[2] = {};
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i / 2] += OF(scores, t)[n].at[i] * OF(slants, t)[n].at[i];
            }
            OF(upper, t)[0] = sum[0];
            OF(lower, t)[0] = sum[1];
        }
        PHASE(t) {
            const float mean[2] = {across(upper, t, PARTNERS) * slope, across(lower, t, PARTNERS) * slope};
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) OF(slants, t)[n].at[i] = OF(scores, t)[n].at[i] * (OF(slants, t)[n].at[i] * slope - mean[i / 2]);
            }
        }
        SYNC();
        PHASE(t) {
            const int row = t / WARP % 4 * 16, column = t / WARP / 4 * Of::COLUMNS;
            multiply<TILE>(t, OF(by_values, t), Across<T>{shares, Of::SHARES}.from(row), Across<T>{slopes, Of::STRIDE}.from(column));
        }
        SYNC();
        PHASE(t) if (t / WARP < 4) put_rows(t, OF(slants, t), shares + t / WARP * 16 * Of::SHARES, Of::SHARES);
        SYNC();
        PHASE(t) {
            const int row = t / WARP % 4 * 16, column = t / WARP / 4 * Of::COLUMNS;
            multiply<TILE>(t, OF(by_keys, t), Across<T>{shares, Of::SHARES}.from(row), Across<T>{queries, Of::STRIDE}.from(column));
            if (dq) {
                clear(OF(by_queries, t));
                multiply<KEYS>(t, OF(by_queries, t), Along<T>{shares, Of::SHARES}.from(row), Across<T>{keys, Of::STRIDE}.from(column));
            }
        }
        SYNC();
        if (dq) {
            PHASE(t) {
                const int row = t / WARP % 4 * 16, column = t / WARP / 4 * Of::COLUMNS;
                put_rows(t, OF(by_queries, t), queries + row * Of::STRIDE + column, Of::STRIDE);
            }
            SYNC();
            PHASE(t) give<D>(t, queries, dq + here.at(N, first, C, D), N - first, C);
        }
    }
    PHASE(t) {
        const int row = t / WARP % 4 * 16, column = t / WARP / 4 * Of::COLUMNS;
        float* const to = sums + static_cast<long long>(here.part) * gridDim.y * L * 2 * C + here.at(L, 0, 2 * C, D) + column;
#pragma unroll
        for (int n = 0; n < Of::COLUMNS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int key = row + row_of(t, i);
                if (key >= L) continue;
                float* const place = to + static_cast<long long>(key) * 2 * C + n * 8 + column_of(t, i);
                put(place, OF(by_keys, t)[n].at[i], OF(by_keys, t)[n].at[i + 1]);
                put(place + C, OF(by_values, t)[n].at[i], OF(by_values, t)[n].at[i + 1]);
            }
        }
    }
}

}  // namespace ella

#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
// NAME_D_TYPE, with as many blocks beside each other as what they hold on the chip lets.
#define FEW_KEYS(T, suffix, D, forward, backward)                                                                                            \
    extern "C" __global__ void __launch_bounds__(ella::Head<T, D>::THREADS, forward)                                                         \
        attention_few_keys_##D##_##suffix(const T* q, const T* kv, T* y, int N, int L, int H, float scale) {                                 \
        ella::few_keys<T, D>(q, kv, y, N, L, H, scale);                                                                                      \
    }                                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(ella::Head<T, D>::THREADS, backward) attention_few_keys_back_##D##_##suffix(                \
        const T* q, const T* kv, const T* dy, T* dq, float* sums, int N, int L, int H, float scale, float slope) {                           \
        ella::few_keys_back<T, D>(q, kv, dy, dq, sums, N, L, H, scale, slope);                                                               \
    }
#define ALL_FEW_KEYS(T, suffix)                                                                                                              \
    FEW_KEYS(T, suffix, 40, 5, 3)                                                                                                            \
    FEW_KEYS(T, suffix, 64, 5, 2)                                                                                                            \
    FEW_KEYS(T, suffix, 80, 4, 2)                                                                                                            \
    FEW_KEYS(T, suffix, 160, 2, 1)
ALL_FEW_KEYS(ella::bf16, bf16)
ALL_FEW_KEYS(ella::f16, f16)
#endif
