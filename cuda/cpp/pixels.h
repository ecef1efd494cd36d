// Attention of a map's pixels to themselves, for heads that libtorch's kernels fill up: cuDNN's make 64 channels of 40, and 128 of 80. By Hopper's
// products of a group of four warps, whose operands lie on the chip or, the left one, in registers. By the same two compilers as the kernels before
// it, whose text this goes on with.
//
// Three kernels of one form: a group of warps holds 64 rows and what is added up for them, and goes through all columns, 64 at a time, which a
// block's groups share. Forward rows are queries and columns keys; so they are for the gradient by queries; for that by keys and values, the other
// way around. That makes shares twice for the gradient, and needs neither sums in memory nor anything of one group from another.
//
// Letters: B samples, N pixels, H heads, D channels of a head, C = H D. qkv [B, N, 3C]: queries, keys, values; y [B, N, C]. Of each row of shares: log
// [B, H, M], the logarithm of its exponentials' sum, in powers of two, and slant [B, H, M], Σ dy · y / √D; M: N filled up to whole tiles, with zeros.
// Grid: (H × parts, B), a part being a block's rows.

namespace ella {

constexpr int GROUP = 4 * WARP;  // threads whose product is one
constexpr int STAGES = 4;        // tiles of columns on the chip: of this step, of the one before it whose last product it has, and two on their way

// A tile on the chip: 64 tokens' channels by eights, one eight of all tokens after the other, filled up with zeros to whole steps of a product.
template <class T, int D>
struct Tile {
    static constexpr int WIDE = Head<T, D>::WIDE, EIGHT = TILE * VECTOR, SIZE = WIDE / VECTOR * EIGHT;
};
// Its entries where a product adds up over channels, i being a token; and where it does over tokens, i being a channel.
template <class T>
struct ByToken {
    const T* at;
    DEVICE float entry(int i, int k) const { return widen(at[k / VECTOR * TILE * VECTOR + i * VECTOR + k % VECTOR]); }
};
template <class T>
struct ByChannel {
    const T* at;
    DEVICE float entry(int i, int k) const { return widen(at[i / VECTOR * TILE * VECTOR + k * VECTOR + i % VECTOR]); }
};

// --- Products of a group ------------------------------------------------------------------------------------------------------------------
//
// A product is started, and what it makes may be looked at once it is finished: finish<n> leaves the n that were started last on their way. Each warp has
// 16 of the 64 rows, as in the products before.

DEVICE int group_row(int t, int i) { return t % GROUP / WARP * 16 + row_of(t, i); }

#if defined(__CUDACC_RTC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER
// What was written to these registers is there before a product begins, and they are read after it is finished.
template <int COUNT>
DEVICE void touch(Fragment (&c)[COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) touch(c[n].at[i]);
    }
}
template <int LEFT, int COUNT>
DEVICE void finish(Fragment (&c)[COUNT]) {
    wait<LEFT>();
    touch(c);
}

DEVICE Blocks blocks_at(const void* at, unsigned int along, unsigned int across) { return {place_of(at) >> 4 | along >> 4 << 16, across >> 4}; }
DEVICE Blocks further(Blocks of, unsigned int bytes) { return {of.place + (bytes >> 4), of.across}; }

// c = a bᵀ over the channels of two tiles.
template <int WIDE, class T>
DEVICE void start(int, Fragment (&c)[TILE / 8], ByToken<T> a, ByToken<T> b) {
    constexpr unsigned int EIGHT = TILE * VECTOR * sizeof(T), BLOCK = 128;
    const Blocks left = blocks_at(a.at, EIGHT, BLOCK), right = blocks_at(b.at, EIGHT, BLOCK);
    begin();
    group_first(c, left, right, T{});
#pragma unroll
    for (int k = 1; k < WIDE / 16; ++k) group_more(c, further(left, 2 * k * EIGHT), further(right, 2 * k * EIGHT), T{});
    commit();
}
// A left operand as it is held, rounded.
template <class T>
struct Held {
    unsigned int at[TILE / 16][4];
};
template <class T>
DEVICE void hold(Held<T>& to, const Fragment (&from)[TILE / 8]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) put(reinterpret_cast<T*>(&to.at[k][i]), from[2 * k + i / 2].at[i % 2 * 2], from[2 * k + i / 2].at[i % 2 * 2 + 1]);
    }
}
template <class T>
DEVICE void touch(Held<T>& a) {
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) touch(a.at[k][i]);
    }
}
// c += a b over a tile's tokens.
template <int COUNT, class T>
DEVICE void start(int, Fragment (&c)[COUNT], Held<T> (&a)[1], ByChannel<T> b) {
    constexpr unsigned int EIGHT = TILE * VECTOR * sizeof(T), BLOCK = 128;
    const Blocks right = blocks_at(b.at, BLOCK, EIGHT);
    touch(c);
    touch(a[0]);
    begin();
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) group_held(c, a[0].at[k], further(right, 2 * k * BLOCK), T{});
    commit();
}
#elif !defined(__CUDACC_RTC__)
#define HOPPER
template <int LEFT, int COUNT>
DEVICE void finish(Fragment (&)[COUNT]) {}
template <int WIDE, class T>
DEVICE void start(int t, Fragment (&c)[TILE / 8], ByToken<T> a, ByToken<T> b) {
    clear(c);
    add_up<WIDE>(t, c, [&](int i, int k) { return a.entry(group_row(t, i), k); }, [&](int i, int k) { return b.entry(i, k); });
}
template <class T>
struct Held {
    Fragment at[TILE / 8];
};
template <class T>
DEVICE void hold(Held<T>& to, const Fragment (&from)[TILE / 8]) {
    for (int n = 0; n < TILE / 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            T rounded;
            narrow(from[n].at[i], rounded);
            to.at[n].at[i] = widen(rounded);
        }
    }
}
template <int COUNT, class T>
DEVICE void start(int t, Fragment (&c)[COUNT], const Held<T> (*a)[1], ByChannel<T> b) {
    const auto held = [&](int i, int k) { return a[t / 4 * 4 + k % 8 / 2][0].at[k / 8].at[i + k % 2]; };
    add_up<TILE>(t, c, held, [&](int i, int k) { return b.entry(i, k); });
}
#endif

#ifdef HOPPER

// --- Tiles on their way -------------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC_RTC__
// What was asked for is there, but for the last so many times; and products see it.
template <int LEFT>
DEVICE void arrived() {
    wait_asked<LEFT>();
    show_products();
}
#else
DEVICE void ask(void* to, const void* from, bool there) { there ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
DEVICE void asked() {}
template <int LEFT>
DEVICE void arrived() {}
template <class T>
DEVICE const T* kept(const T* at) { return at; }
DEVICE void before_waiting(float) {}
#endif

// The tile of tokens from `first` of N, `step` apart. Eight threads beside each other ask for eight tokens, which lie beside each other on the chip.
template <int D, int THREADS, class T>
DEVICE void ask_tile(int t, T* tile, const T* from, int first, int N, int step) {
    constexpr int LANES = Tile<T, D>::WIDE / VECTOR, TASKS = TILE * LANES;
#pragma unroll
    for (int k = 0; k < (TASKS + THREADS - 1) / THREADS; ++k) {
        const unsigned int i = t + k * THREADS, token = i / (8 * LANES) * 8 + i % 8, lane = i / 8 % LANES;
        if (i < TASKS) {
            const int pixel = first + static_cast<int>(token), c = static_cast<int>(lane) * VECTOR;
            const bool there = pixel < N && c < D;
            const T* const place = from + (there ? static_cast<unsigned int>(pixel * step + c) : 0u);
            T* const to = tile + (lane * TILE + token) * VECTOR;
#pragma unroll
            for (int part = 0; part < static_cast<int>(VECTOR * sizeof(T)); part += 16)
                ask(reinterpret_cast<unsigned char*>(to) + part, reinterpret_cast<const unsigned char*>(place) + part, there);
        }
    }
}
// As many of M numbers as a tile has tokens.
DEVICE void ask_numbers(int t, float* to, const float* from, int first, int M) {
    if (t < TILE / 4) ask(to + t * 4, from + (first < M ? first + t * 4 : 0), first < M);
}

// Where this block's head lies, and its first row.
struct PixelPlace {
    int N, H, D, M, C, head, first, sample;
    DEVICE PixelPlace(int N, int H, int D, int rows)
        : N(N), H(H), D(D), M((N + TILE - 1) / TILE * TILE), C(H * D), head(blockIdx.x % H), first(blockIdx.x / H * rows), sample(blockIdx.y) {}
    // This head's first number in a part of `parts` × C numbers of each pixel.
    DEVICE long long of(int part, int parts) const { return static_cast<long long>(sample) * N * parts * C + (part * C + head * D); }
    // A row's number.
    DEVICE long long row(int pixel) const { return (static_cast<long long>(sample) * H + head) * M + pixel; }
    // The row of this thread's numbers i and i + 1.
    DEVICE int row_at(int t, int i) const { return first + t / GROUP * TILE + group_row(t, i); }
};
enum { QUERIES, KEYS_OF, VALUES, QKV };  // parts

// A part of each of this thread's rows, of those that there are.
template <int COUNT, class T>
DEVICE void put_pixels(int t, const Fragment (&c)[COUNT], T* to, const PixelPlace& here, int part, int parts) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const int row = here.row_at(t, i);
        if (row >= here.N) continue;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) put(to + here.of(part, parts) + (row * parts * here.C + n * 8 + column_of(t, i)), c[n].at[i], c[n].at[i + 1]);
    }
}

// The blocks' groups for heads of D channels: as many as their registers let.
template <int D>
struct Groups {
    static constexpr int FORWARD = 4, BY_QUERIES = D > 40 ? 3 : 4, BY_KEYS = D > 40 ? 2 : 3;
};
// Numbers on the chip: so many tiles of each group's own, and two of columns for each that is worked on or on its way, with two numbers a column.
template <class T, int D, int GROUPS, int OWN_TILES>
struct OnChip {
    static constexpr int PER_FLOAT = sizeof(float) / sizeof(T);
    static constexpr int COUNT = (GROUPS * OWN_TILES + STAGES * 2) * Tile<T, D>::SIZE + STAGES * 2 * TILE * PER_FLOAT;
#ifdef __CUDACC_RTC__
    static constexpr int MOST = 227 << 10;
#else
    static constexpr int MOST = MOST_ON_CHIP;
#endif
    static_assert(COUNT * sizeof(T) <= MOST);
};
template <class T, int D>
using ForwardChip = OnChip<T, D, Groups<D>::FORWARD, 1>;
template <class T, int D>
using QueriesChip = OnChip<T, D, Groups<D>::BY_QUERIES, 2>;
template <class T, int D>
using KeysChip = OnChip<T, D, Groups<D>::BY_KEYS, 2>;

// A block's tiles of columns, two at a time: those worked on, and those on their way.
template <class T, int D>
struct Columns {
    static constexpr int SIZE = Tile<T, D>::SIZE;
    T* tiles;
    float* numbers;
    DEVICE explicit Columns(T* at) : tiles(at), numbers(reinterpret_cast<float*>(at + STAGES * 2 * SIZE)) {}
    DEVICE T* tile(unsigned int stage, int which) const { return tiles + (stage * 2 + which) * SIZE; }
    DEVICE float* number(unsigned int stage, int which) const { return numbers + (stage * 2 + which) * TILE; }
};
// The stage of the tile so many after that of this one; STAGES - 1 for the tile before it.
DEVICE unsigned int after(unsigned int stage, unsigned int by) { return (stage + by) % STAGES; }

// The tiles of a block's own rows, one for each group.
template <int D, int GROUPS, class T>
DEVICE void ask_own(int t, T* tiles, const T* from, const PixelPlace& here, int step) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
        ask_tile<D, GROUPS * GROUP>(t, tiles + g * Tile<T, D>::SIZE, from, here.first + g * TILE, here.N, step);
}
// The tile of keys and values from `first`; `from`: this head's keys.
template <int THREADS, class T, int D>
DEVICE void ask_keys_and_values(int t, const Columns<T, D>& columns, unsigned int stage, const T* from, const PixelPlace& here, int first) {
    ask_tile<D, THREADS>(t, columns.tile(stage, 0), from, first, here.N, QKV * here.C);
    ask_tile<D, THREADS>(t, columns.tile(stage, 1), from + here.C, first, here.N, QKV * here.C);
    asked();
}

// A block goes through its columns by steps of a tile. A step starts the last product of the step before it beside its own first ones, so that there
// is one to work on while it takes its exponentials; and leaves none on its way, which the compiler would not let go on over the end of a loop.
// Before the first step nothing is held: zeros are multiplied by a tile of zeros, the one before the first, which lies where the fourth will.
template <int THREADS, class T, int D>
DEVICE void ask_zeros(int t, const Columns<T, D>& columns, int which, const T* from) {
    ask_tile<D, THREADS>(t, columns.tile(STAGES - 1, which), from, 0, 0, 0);
}

// --- Forward ------------------------------------------------------------------------------------------------------------------------------

template <class T, int D>
DEVICE void pixels(const T* qkv, T* y, float* log, int N, int H, float scale) {
    constexpr int GROUPS = Groups<D>::FORWARD, THREADS = GROUPS * GROUP, SIZE = Tile<T, D>::SIZE, WIDE = Tile<T, D>::WIDE;
    DYNAMIC(memory);
    T* const queries = reinterpret_cast<T*>(memory);
    const Columns<T, D> columns(queries + GROUPS * SIZE);
    OWN(Fragment, scores, TILE / 8);
    OWN(Held<T>, shares, 1);
    OWN(Fragment, mixed, D / 8);
    OWN(float, upper, 1);
    OWN(float, lower, 1);
    OWN(float, most, 2);
    OWN(float, total, 2);
    const PixelPlace here(N, H, D, GROUPS * TILE);
    const T* const keys = kept(qkv + here.of(KEYS_OF, QKV));
    PHASE(t) {
        ask_own<D, GROUPS>(t, queries, qkv + here.of(QUERIES, QKV), here, QKV * here.C);
        ask_zeros<THREADS>(t, columns, 1, keys);
        ask_keys_and_values<THREADS>(t, columns, 0, keys, here, 0);
        ask_keys_and_values<THREADS>(t, columns, 1, keys, here, TILE);
        OF(shares, t)[0] = {};
        clear(OF(mixed, t));
        for (int i = 0; i < 2; ++i) {
            OF(most, t)[i] = from_bits(0xff800000u);
            OF(total, t)[i] = 0.0f;
        }
    }
    unsigned int stage = 0;
    for (int first = 0; first < N; first += TILE, stage = after(stage, 1)) {
        arrived<1>();
        SYNC();
        PHASE(t) {
            ask_keys_and_values<THREADS>(t, columns, after(stage, 2), keys, here, first + 2 * TILE);
            start<WIDE>(t, OF(scores, t), ByToken<T>{queries + t / GROUP * SIZE}, ByToken<T>{columns.tile(stage, 0)});
            start(t, OF(mixed, t), shares, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 1)});
            finish<1>(OF(scores, t));
            largest_of(t, OF(scores, t), N - first, OF(upper, t), OF(lower, t));
        }
        PHASE(t) {
            const float tile[2] = {across(upper, t, PARTNERS, larger), across(lower, t, PARTNERS, larger)};
            const float top[2] = {larger(OF(most, t)[0], tile[0]), larger(OF(most, t)[1], tile[1])};
            float sum[2][1], shrink[2];
            exponentials(OF(scores, t), top, scale, sum[0], sum[1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                shrink[i] = power_of_two((OF(most, t)[i] - top[i]) * scale);
                OF(total, t)[i] = OF(total, t)[i] * shrink[i] + sum[i][0];
                OF(most, t)[i] = top[i];
            }
            before_waiting(sum[0][0] + sum[1][0]);
            finish<0>(OF(mixed, t));
            times(OF(mixed, t), shrink);
            hold(OF(shares, t)[0], OF(scores, t));
        }
    }
    PHASE(t) {
        arrived<0>();
        start(t, OF(mixed, t), shares, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 1)});
        finish<0>(OF(mixed, t));
        OF(upper, t)[0] = OF(total, t)[0];
        OF(lower, t)[0] = OF(total, t)[1];
    }
    PHASE(t) {
        const float sum[2] = {across(upper, t, PARTNERS), across(lower, t, PARTNERS)}, by[2] = {inverse(sum[0]), inverse(sum[1])};
        times(OF(mixed, t), by);
        put_pixels(t, OF(mixed, t), y, here, 0, 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = here.row_at(t, 2 * i);
            if (t % PARTNERS == 0 && row < here.M) log[here.row(row)] = row < N ? OF(most, t)[i] * scale + log2f(sum[i]) : 0.0f;
        }
    }
}

// --- Backward -----------------------------------------------------------------------------------------------------------------------------

// By queries, into their part of dqkv; and the slants, which that by keys and values needs.
template <class T, int D>
DEVICE void pixels_back_queries(const T* qkv, const T* y, const T* dy, const float* log, float* slant, T* dqkv, int N, int H, float scale,
                                float slope) {
    constexpr int GROUPS = Groups<D>::BY_QUERIES, THREADS = GROUPS * GROUP, SIZE = Tile<T, D>::SIZE, WIDE = Tile<T, D>::WIDE;
    DYNAMIC(memory);
    T *const queries = reinterpret_cast<T*>(memory), *const slopes = queries + GROUPS * SIZE;
    const Columns<T, D> columns(slopes + GROUPS * SIZE);
    OWN(Fragment, scores, TILE / 8);
    OWN(Fragment, slants, TILE / 8);
    OWN(Held<T>, held, 1);
    OWN(Fragment, by_queries, D / 8);
    OWN(float, upper, 1);
    OWN(float, lower, 1);
    OWN(float, mean, 2);
    OWN(float, logs, 2);
    const PixelPlace here(N, H, D, GROUPS * TILE);
    const T* const keys = kept(qkv + here.of(KEYS_OF, QKV));
    PHASE(t) {
        ask_own<D, GROUPS>(t, queries, qkv + here.of(QUERIES, QKV), here, QKV * here.C);
        ask_own<D, GROUPS>(t, slopes, dy + here.of(0, 1), here, here.C);
        ask_zeros<THREADS>(t, columns, 0, keys);
        ask_keys_and_values<THREADS>(t, columns, 0, keys, here, 0);
        ask_keys_and_values<THREADS>(t, columns, 1, keys, here, TILE);
        OF(held, t)[0] = {};
        clear(OF(by_queries, t));
        // A row's Σ dy · y, by the four threads that share it.
        float sum[2] = {};
        for (int i = 0; i < 2; ++i) {
            const int row = here.row_at(t, 2 * i);
            for (int c = t % PARTNERS * VECTOR; c < D && row < N; c += PARTNERS * VECTOR) {
                float a[VECTOR], b[VECTOR];
                load(y + here.of(0, 1) + (row * here.C + c), a);
                load(dy + here.of(0, 1) + (row * here.C + c), b);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) sum[i] += a[j] * b[j];
            }
            OF(logs, t)[i] = row < N ? log[here.row(row)] : 0.0f;
        }
        OF(upper, t)[0] = sum[0];
        OF(lower, t)[0] = sum[1];
    }
    PHASE(t) {
        OF(mean, t)[0] = across(upper, t, PARTNERS) * slope;
        OF(mean, t)[1] = across(lower, t, PARTNERS) * slope;
        for (int i = 0; i < 2; ++i) {
            const int row = here.row_at(t, 2 * i);
            if (t % PARTNERS == 0 && row < here.M) slant[here.row(row)] = OF(mean, t)[i];
        }
    }
    unsigned int stage = 0;
    for (int first = 0; first < N; first += TILE, stage = after(stage, 1)) {
        arrived<1>();
        SYNC();
        PHASE(t) {
            ask_keys_and_values<THREADS>(t, columns, after(stage, 2), keys, here, first + 2 * TILE);
            start<WIDE>(t, OF(scores, t), ByToken<T>{queries + t / GROUP * SIZE}, ByToken<T>{columns.tile(stage, 0)});
            start<WIDE>(t, OF(slants, t), ByToken<T>{slopes + t / GROUP * SIZE}, ByToken<T>{columns.tile(stage, 1)});
            start(t, OF(by_queries, t), held, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 0)});
            finish<2>(OF(scores, t));
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) OF(scores, t)[n].at[i] = power_of_two(OF(scores, t)[n].at[i] * scale - OF(logs, t)[i / 2]);
            }
            // A place beyond the last pixel scores zero, which may be infinitely more than what there is.
            if (N - first < TILE) {
#pragma unroll
                for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (n * 8 + column_of(t, i) >= N - first) OF(scores, t)[n].at[i] = 0.0f;
                }
            }
            finish<1>(OF(slants, t));
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) OF(slants, t)[n].at[i] = OF(scores, t)[n].at[i] * (OF(slants, t)[n].at[i] * slope - OF(mean, t)[i / 2]);
            }
        }
        PHASE(t) {
            finish<0>(OF(by_queries, t));
            hold(OF(held, t)[0], OF(slants, t));
        }
    }
    PHASE(t) {
        arrived<0>();
        start(t, OF(by_queries, t), held, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 0)});
        finish<0>(OF(by_queries, t));
        put_pixels(t, OF(by_queries, t), dqkv, here, QUERIES, QKV);
    }
}

// By keys and values, into their parts of dqkv.
template <class T, int D>
DEVICE void pixels_back_keys(const T* qkv, const T* dy, const float* log, const float* slant, T* dqkv, int N, int H, float scale, float slope) {
    constexpr int GROUPS = Groups<D>::BY_KEYS, THREADS = GROUPS * GROUP, SIZE = Tile<T, D>::SIZE, WIDE = Tile<T, D>::WIDE;
    DYNAMIC(memory);
    T *const keys = reinterpret_cast<T*>(memory), *const values = keys + GROUPS * SIZE;
    const Columns<T, D> columns(values + GROUPS * SIZE);
    OWN(Fragment, scores, TILE / 8);
    OWN(Fragment, slants, TILE / 8);
    OWN(Held<T>, shares, 1);
    OWN(Held<T>, held, 1);
    OWN(Fragment, by_keys, D / 8);
    OWN(Fragment, by_values, D / 8);
    const PixelPlace here(N, H, D, GROUPS * TILE);
    const T *const queries = kept(qkv + here.of(QUERIES, QKV)), *const slopes = kept(dy + here.of(0, 1));
    const float *const logs_from = kept(log + here.row(0)), *const slants_from = kept(slant + here.row(0));
    const auto ask_columns = [&](int t, unsigned int stage, int first) {
        ask_tile<D, THREADS>(t, columns.tile(stage, 0), queries, first, N, QKV * here.C);
        ask_tile<D, THREADS>(t, columns.tile(stage, 1), slopes, first, N, here.C);
        ask_numbers(t, columns.number(stage, 0), logs_from, first, here.M);
        ask_numbers(t, columns.number(stage, 1), slants_from, first, here.M);
        asked();
    };
    PHASE(t) {
        ask_own<D, GROUPS>(t, keys, qkv + here.of(KEYS_OF, QKV), here, QKV * here.C);
        ask_own<D, GROUPS>(t, values, qkv + here.of(VALUES, QKV), here, QKV * here.C);
        ask_zeros<THREADS>(t, columns, 0, queries);
        ask_columns(t, 0, 0);
        ask_columns(t, 1, TILE);
        OF(held, t)[0] = {};
        clear(OF(by_keys, t));
        clear(OF(by_values, t));
    }
    unsigned int stage = 0;
    for (int first = 0; first < N; first += TILE, stage = after(stage, 1)) {
        arrived<1>();
        SYNC();
        PHASE(t) {
            ask_columns(t, after(stage, 2), first + 2 * TILE);
            start<WIDE>(t, OF(scores, t), ByToken<T>{keys + t / GROUP * SIZE}, ByToken<T>{columns.tile(stage, 0)});
            start<WIDE>(t, OF(slants, t), ByToken<T>{values + t / GROUP * SIZE}, ByToken<T>{columns.tile(stage, 1)});
            start(t, OF(by_keys, t), held, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 0)});
            finish<2>(OF(scores, t));
            const float* const logs = columns.number(stage, 0) + column_of(t, 0);
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) OF(scores, t)[n].at[i] = power_of_two(OF(scores, t)[n].at[i] * scale - logs[n * 8 + i % 2]);
            }
            hold(OF(shares, t)[0], OF(scores, t));
        }
        PHASE(t) {
            start(t, OF(by_values, t), shares, ByChannel<T>{columns.tile(stage, 1)});
            finish<2>(OF(slants, t));
            const float* const means = columns.number(stage, 1) + column_of(t, 0);
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) OF(slants, t)[n].at[i] = OF(scores, t)[n].at[i] * (OF(slants, t)[n].at[i] * slope - means[n * 8 + i % 2]);
            }
            finish<0>(OF(by_keys, t));
            finish<0>(OF(by_values, t));
            hold(OF(held, t)[0], OF(slants, t));
        }
    }
    PHASE(t) {
        arrived<0>();
        start(t, OF(by_keys, t), held, ByChannel<T>{columns.tile(after(stage, STAGES - 1), 0)});
        finish<0>(OF(by_keys, t));
        put_pixels(t, OF(by_keys, t), dqkv, here, KEYS_OF, QKV);
        put_pixels(t, OF(by_values, t), dqkv, here, VALUES, QKV);
    }
}

#endif
}  // namespace ella

#if defined(__CUDACC_RTC__) && defined(HOPPER)
#define PIXELS(T, suffix, D)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ella::Groups<D>::FORWARD * ella::GROUP, 1)                                                   \
        attention_pixels_##D##_##suffix(const T* qkv, T* y, float* log, int N, int H, float scale) {                                          \
        ella::pixels<T, D>(qkv, y, log, N, H, scale);                                                                                         \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(ella::Groups<D>::BY_QUERIES * ella::GROUP, 1) attention_pixels_back_queries_##D##_##suffix(  \
        const T* qkv, const T* y, const T* dy, const float* log, float* slant, T* dqkv, int N, int H, float scale, float slope) {             \
        ella::pixels_back_queries<T, D>(qkv, y, dy, log, slant, dqkv, N, H, scale, slope);                                                    \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(ella::Groups<D>::BY_KEYS * ella::GROUP, 1) attention_pixels_back_keys_##D##_##suffix(        \
        const T* qkv, const T* dy, const float* log, const float* slant, T* dqkv, int N, int H, float scale, float slope) {                   \
        ella::pixels_back_keys<T, D>(qkv, dy, log, slant, dqkv, N, H, scale, slope);                                                          \
    }
PIXELS(ella::bf16, bf16, 40)
PIXELS(ella::bf16, bf16, 80)
PIXELS(ella::f16, f16, 40)
PIXELS(ella::f16, f16, 80)
#endif
