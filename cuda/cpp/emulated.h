// A GPU's threads on a processor, for tests: what kernels find on a GPU, and the functions of ptx.h as the PTX ISA describes their instructions.
//
// A block's threads take turns: one goes on until it must meet others, and a warp until it must meet other warps. Blocks differ in whether their first
// or their last thread goes first, and in whether what is started (copies, products) is done at once or not before it is waited for; and what is on
// the chip is no number at a block's start. So a barrier that is missing, a wait too few, a number that nobody wrote show in what comes out. The
// order in which memory is seen by others, and speed, do not.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define DEVICE inline
#define SHARED(type, name, count) \
    static type name[count];      \
    ella::emulated::scramble_once(name, sizeof name)
#define DYNAMIC(name) unsigned char* const name = ella::emulated::chip

namespace ella {

struct Place { unsigned int x, y; };
inline Place threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
    std::abort();
}

// --- What takes its time ------------------------------------------------------------------------------------------------------------------

struct Copy {
    void* to;
    const void* from;
    bool there;

    void finish() const { there ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
};
struct Product {
    void (*multiply)(const Product&);
    Fragment* c;
    int columns;
    bool adds;
    const unsigned int* held;
    Blocks a, b;

    void finish() const { multiply(*this); }
};

// What a thread has started, in groups; each is waited for by how many groups were started after it.
template <class W>
struct Started {
    std::vector<std::pair<long, W>> waiting;
    long groups = 0;

    void start(const W& work, bool late) {
        if (late) waiting.emplace_back(groups, work);
        else work.finish();
    }
    void wait(int left) {
        size_t done = 0;
        for (; done < waiting.size() && waiting[done].first + left < groups; ++done) waiting[done].second.finish();
        waiting.erase(waiting.begin(), waiting.begin() + done);
    }
};

// --- Threads ------------------------------------------------------------------------------------------------------------------------------

// Where threads wait for each other.
struct Meeting {
    unsigned int arrived = 0;
    unsigned long long times = 0;
};
// What the threads of a warp tell each other. By turns in two places: whoever is a meeting ahead disturbs nobody who still reads.
struct Warp {
    Meeting meeting;
    const char* what = nullptr;
    alignas(16) unsigned char told[2][WARP][32];
};
// One of a block, and then of the next: it lives as long as the process.
struct Thread {
    jmp_buf place;
    std::unique_ptr<unsigned char[]> stack;
    bool done;
    unsigned int exchanges;
    Started<Copy> copies;
    Started<Product> products;
};

constexpr size_t STACK = 256 << 10;
constexpr size_t MOST_ON_CHIP = 227 << 10;
constexpr unsigned int CHIP_BEGIN = 1024;  // where it lies among what is on the chip

alignas(128) inline unsigned char chip[MOST_ON_CHIP];
inline std::set<void*> scrambled;
inline Thread threads[1024];
inline std::vector<Warp> warps;
inline Meeting everybody;
inline bool backward, late;
inline unsigned int left, idle;  // threads that are not done; turns since one of them got on
inline jmp_buf outside;
inline void (*work)(void*);
inline void* state;

inline void scramble_once(void* at, size_t bytes) {
    if (scrambled.insert(at).second) std::memset(at, 0xff, bytes);
}

void body();
// Another thread's turn: the next one's that is not done, of all or of the same warp; or nobody's. A warp goes on as long as it can: so it is as far
// ahead of the others as barriers let it.
inline void pass_on(jmp_buf& from, bool within) {
    if (_setjmp(from) != 0) return;
    if (left == 0) _longjmp(outside, 1);
    const unsigned int first = within ? threadIdx.x / WARP * WARP : 0, count = within ? std::min<unsigned int>(WARP, blockDim.x - first) : blockDim.x;
    do threadIdx.x = first + (threadIdx.x - first + (backward ? count - 1 : 1)) % count;
    while (threads[threadIdx.x].done);
    Thread& thread = threads[threadIdx.x];
    if (thread.stack) _longjmp(thread.place, 1);
    thread.stack.reset(new unsigned char[STACK]);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack = {thread.stack.get(), 0, STACK};
    start.uc_link = nullptr;
    makecontext(&start, body, 0);
    setcontext(&start);
}
inline void body() {
    for (;;) {
        work(state);
        Thread& thread = threads[threadIdx.x];
        thread.done = true;
        --left;
        idle = 0;
        pass_on(thread.place, false);
    }
}
inline void meet(Meeting& at, unsigned int count) {
    const unsigned long long now = at.times;
    idle = 0;
    if (++at.arrived == count) {
        at.arrived = 0;
        ++at.times;
        return;
    }
    while (at.times == now) {
        if (++idle > left) fail("all threads wait, some for others than they meet");
        pass_on(threads[threadIdx.x].place, &at != &everybody);
    }
}

// What each thread of this one's warp tells at the same place: there until the next exchange.
template <class V>
const V* exchange(const V& mine, const char* what) {
    static_assert(sizeof(V) <= sizeof Warp::told[0][0] && alignof(V) <= 16);
    Warp& warp = warps[threadIdx.x / WARP];
    if (warp.meeting.arrived == 0) warp.what = what;
    if (warp.what != what) fail("the threads of a warp are at different instructions");
    V* const told = reinterpret_cast<V*>(warp.told[threads[threadIdx.x].exchanges++ % 2]);
    told[threadIdx.x % WARP] = mine;
    meet(warp.meeting, std::min<unsigned int>(WARP, blockDim.x - threadIdx.x / WARP * WARP));
    return told;
}
inline unsigned int lane() { return threadIdx.x % WARP; }

inline void run_block(unsigned int x, unsigned int y, unsigned int shared) {
    blockIdx = {x, y};
    backward = (x + y) % 2;
    late = (x / 2 + y) % 2 == 0;
    warps.assign((blockDim.x + WARP - 1) / WARP, {});
    everybody = {};
    scrambled.clear();
    std::memset(chip, 0xff, sizeof chip);
    for (Thread& thread : threads) {
        thread.done = false;
        thread.exchanges = 0;
        thread.copies = {};
        thread.products = {};
    }
    left = blockDim.x;
    idle = 0;
    threadIdx = {backward ? 0 : blockDim.x - 1, 0};
    pass_on(outside, false);
    for (size_t i = shared; i < sizeof chip; ++i) {
        if (chip[i] != 0xff) fail("something was written beyond what the kernel has on the chip");
    }
}

}  // namespace emulated

// --- What every kernel finds --------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulated::meet(emulated::everybody, blockDim.x); }
template <class V>
V __shfl_xor_sync(unsigned int, V mine, int step) {
    return emulated::exchange(mine, "shfl")[emulated::lane() ^ static_cast<unsigned int>(step)];
}

// --- The functions of ptx.h ---------------------------------------------------------------------------------------------------------------

DEVICE void forget(unsigned int&) {}
DEVICE void touch(float&) {}
DEVICE void touch(unsigned int&) {}
template <class T>
DEVICE const T* kept(const T* at) { return at; }
DEVICE unsigned int place_of(const void* at) {
    const auto bytes = static_cast<const unsigned char*>(at) - emulated::chip;
    if (bytes < 0 || bytes >= static_cast<long>(sizeof emulated::chip) || bytes % 16) {
        emulated::fail("an operand that is not on the chip, or not at a multiple of 16 bytes");
    }
    return static_cast<unsigned int>(bytes) + emulated::CHIP_BEGIN;
}

template <class T>
DEVICE unsigned int pair(float first, float second, T) {
    T both[2];
    narrow(first, both[0]);
    narrow(second, both[1]);
    unsigned int word;
    std::memcpy(&word, both, sizeof word);
    return word;
}
// Number i of those that lie beside each other in words.
template <class T>
DEVICE float number_of(const unsigned int* words, int i) { return widen(reinterpret_cast<const T*>(words)[i]); }

template <int COUNT>
DEVICE void matrices(unsigned int (&to)[COUNT], const void* at) {
    const auto* const rows = emulated::exchange(at, "ldmatrix");
    for (unsigned int i = 0; i < COUNT; ++i) {
        place_of(rows[i * 8 + emulated::lane() / 4]);
        std::memcpy(&to[i], static_cast<const unsigned int*>(rows[i * 8 + emulated::lane() / 4]) + emulated::lane() % 4, 4);
    }
}
template <int COUNT>
DEVICE void turned(unsigned int (&to)[COUNT], const void* at) {
    const auto* const rows = emulated::exchange(at, "ldmatrix.trans");
    for (unsigned int i = 0; i < COUNT; ++i) {
        unsigned short both[2];
        for (unsigned int j = 0; j < 2; ++j) {
            const void* const row = rows[i * 8 + emulated::lane() % 4 * 2 + j];
            place_of(row);
            both[j] = static_cast<const unsigned short*>(row)[emulated::lane() / 4];
        }
        std::memcpy(&to[i], both, 4);
    }
}

// What a thread gives to a product of its warp, of 16 × 16 and 16 × 8.
struct Operands { unsigned int left[4], right[2]; };
template <class T>
DEVICE float left_number(const Operands* of, unsigned int row, unsigned int k) {
    return number_of<T>(&of[row % 8 * 4 + k % 8 / 2].left[k / 8 * 2 + row / 8], k % 2);
}
template <class T>
DEVICE void multiply_add(Fragment& c, const unsigned int (&a)[4], const unsigned int* b, T) {
    const auto* const of = emulated::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, "mma");
    for (unsigned int i = 0; i < 4; ++i) {
        const unsigned int row = emulated::lane() / 4 + i / 2 * 8, column = emulated::lane() % 4 * 2 + i % 2;
        for (unsigned int k = 0; k < 16; ++k) {
            c.at[i] += left_number<T>(of, row, k) * number_of<T>(&of[column * 4 + k % 8 / 2].right[k / 8], k % 2);
        }
    }
}

inline void ask(void* to, const void* from, bool there) {
    place_of(to);
    if (reinterpret_cast<size_t>(from) % 16) emulated::fail("a copy from no multiple of 16 bytes");
    emulated::threads[threadIdx.x].copies.start({to, from, there}, emulated::late);
}
inline void asked() { ++emulated::threads[threadIdx.x].copies.groups; }
template <int LEFT>
DEVICE void wait_asked() { emulated::threads[threadIdx.x].copies.wait(LEFT); }

DEVICE void show_products() {}
DEVICE void begin() {}
DEVICE void before_waiting(float) {}
inline void commit() { ++emulated::threads[threadIdx.x].products.groups; }
template <int LEFT>
DEVICE void wait() { emulated::threads[threadIdx.x].products.wait(LEFT); }

// An operand on the chip, without a swizzle, by its descriptor: blocks of 8 × 16 bytes, whose lines are of what is added up over or, turned, of rows.
template <class T>
DEVICE float block_number(Blocks of, unsigned int i, unsigned int k, bool turned) {
    const unsigned int place = (of.place & 0x3fff) << 4, along = (of.place >> 16 & 0x3fff) << 4, across = (of.across & 0x3fff) << 4;
    const unsigned int line = turned ? k % 8 : i % 8, number = turned ? i % 8 : k % 8;
    const unsigned int at = place + i / 8 * across + k / 8 * along + line * 16 + number * sizeof(T) - emulated::CHIP_BEGIN;
    if (at >= sizeof emulated::chip) emulated::fail("a product's operand that is not on the chip");
    return widen(*reinterpret_cast<const T*>(emulated::chip + at));
}
template <class T>
DEVICE void group_multiply(const emulated::Product& product) {
    const Operands* held = nullptr;
    if (const unsigned int* const a = product.held) held = emulated::exchange(Operands{{a[0], a[1], a[2], a[3]}, {}}, "wgmma");
    for (int n = 0; n < product.columns / 8; ++n) {
        for (unsigned int i = 0; i < 4; ++i) {
            const unsigned int row = emulated::lane() / 4 + i / 2 * 8, column = n * 8 + emulated::lane() % 4 * 2 + i % 2;
            float sum = product.adds ? product.c[n].at[i] : 0.0f;
            for (unsigned int k = 0; k < 16; ++k) {
                const float left = held ? left_number<T>(held, row, k) : block_number<T>(product.a, threadIdx.x / WARP % 4 * 16 + row, k, false);
                sum += left * block_number<T>(product.b, column, k, held != nullptr);
            }
            product.c[n].at[i] = sum;
        }
    }
}
inline void start(const emulated::Product& product) { emulated::threads[threadIdx.x].products.start(product, emulated::late); }
template <class T>
DEVICE void group_first(Fragment (&c)[8], Blocks a, Blocks b, T) { start({group_multiply<T>, c, 64, false, nullptr, a, b}); }
template <class T>
DEVICE void group_more(Fragment (&c)[8], Blocks a, Blocks b, T) { start({group_multiply<T>, c, 64, true, nullptr, a, b}); }
template <int COUNT, class T>
DEVICE void group_held(Fragment (&c)[COUNT], const unsigned int (&a)[4], Blocks b, T) {
    start({group_multiply<T>, c, COUNT * 8, true, a, {}, b});
}

}  // namespace ella
