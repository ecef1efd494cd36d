// The GPU's instructions that C++ has no words for, one function each. emulated.h has the same functions for tests.

namespace ella {

// The compiler takes a word for another one than it knew.
DEVICE void forget(unsigned int& word) { asm volatile("" : "+r"(word)); }
// What was written to a register is there, and nothing reads it before now.
DEVICE void touch(float& number) { asm volatile("" : "+f"(number)::"memory"); }
DEVICE void touch(unsigned int& word) { asm volatile("" : "+r"(word)::"memory"); }
// What the compiler keeps, and does not make again at every step.
template <class T>
DEVICE const T* kept(const T* at) {
    asm volatile("" : "+l"(at));
    return at;
}
// Where something lies on the chip, in bytes.
DEVICE unsigned int place_of(const void* at) { return static_cast<unsigned int>(__cvta_generic_to_shared(at)); }

#if __CUDA_ARCH__ >= 800
// Two numbers rounded, the second above the first.
DEVICE unsigned int pair(float first, float second, bf16) {
    unsigned int both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
DEVICE unsigned int pair(float first, float second, f16) {
    unsigned int both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// --- A warp's products (PTX ISA, "Matrix multiply-accumulate using mma") ---------------------------------------------------------------------

// Four or two matrices of 8 × 8 numbers of 16 bits: thread p gets numbers 2 (p % 4) and the next of row p / 4 of each. Thread i says where row i % 8 of
// matrix i / 8 lies.
#define MATRICES(count, suffix, outputs, at, ...)                                                                                         \
    asm volatile("ldmatrix.sync.aligned.m8n8.x" #count suffix ".shared.b16 {" outputs "}, [%" #count "];" : __VA_ARGS__ : "r"(place_of(at)))
#define FOUR(suffix) MATRICES(4, suffix, "%0, %1, %2, %3", at, "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]))
#define TWO(suffix) MATRICES(2, suffix, "%0, %1", at, "=r"(to[0]), "=r"(to[1]))
DEVICE void matrices(unsigned int (&to)[4], const void* at) { FOUR(""); }
DEVICE void matrices(unsigned int (&to)[2], const void* at) { TWO(""); }
// The same matrices, turned: their columns for rows.
DEVICE void turned(unsigned int (&to)[4], const void* at) { FOUR(".trans"); }
DEVICE void turned(unsigned int (&to)[2], const void* at) { TWO(".trans"); }

// c += a b, of 16 × 16 and 16 × 8.
#define MULTIPLY(type, name)                                                                                                          \
    DEVICE void multiply_add(Fragment& c, const unsigned int (&a)[4], const unsigned int* b, type) {                                  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "     \
                     "{%0, %1, %2, %3};"                                                                                              \
                     : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                             \
    }
MULTIPLY(bf16, "bf16")
MULTIPLY(f16, "f16")

// --- Copies on their way ------------------------------------------------------------------------------------------------------------------

// 16 bytes onto the chip, or so many zeros.
DEVICE void ask(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place_of(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// What was asked for is there, but for the last so many times.
template <int LEFT>
DEVICE void wait_asked() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// --- Hopper's products of a group of four warps (PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate") ------------------------

// What was written on the chip is seen by the products that are started from now on.
DEVICE void show_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// What `number` is made of is there before a product is waited for: the compiler would wait first, and make it then. No number has these bits.
DEVICE void before_waiting(float number) {
    if (__any_sync(0xffffffffu, to_bits(number) == 0xffc12345u)) asm volatile("nanosleep.u32 0;");
}

// As the instructions take it.
DEVICE unsigned long long words(Blocks of) {
    unsigned long long both;
    asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(of.place), "r"(of.across));
    return both;
}

#define IN4(n) "+f"(c[n].at[0]), "+f"(c[n].at[1]), "+f"(c[n].at[2]), "+f"(c[n].at[3])
#define IN20 IN4(0), IN4(1), IN4(2), IN4(3), IN4(4)
#define IN32 IN20, IN4(5), IN4(6), IN4(7)
#define IN40 IN32, IN4(8), IN4(9)
#define OUT4(n) "=f"(c[n].at[0]), "=f"(c[n].at[1]), "=f"(c[n].at[2]), "=f"(c[n].at[3])
#define OUT32 OUT4(0), OUT4(1), OUT4(2), OUT4(3), OUT4(4), OUT4(5), OUT4(6), OUT4(7)
#define REG20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define REG32 REG20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REG40 REG32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA(n, name) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name
// c = a bᵀ or c += a bᵀ, of 64 × 16 and 64 × 16, both on the chip, what is added up over lying beside each other; and c += a b, of 64 × 16 in registers
// and 16 × 40 or 16 × 80, whose columns lie beside each other.
#define ON_CHIP(type, name)                                                                                                       \
    DEVICE void group_first(Fragment (&c)[8], Blocks a, Blocks b, type) {                                                         \
        asm volatile("{" WGMMA(64, name) " {" REG32 "}, %32, %33, 0, 1, 1, 0, 0;}" : OUT32 : "l"(words(a)), "l"(words(b)));     \
    }                                                                                                                             \
    DEVICE void group_more(Fragment (&c)[8], Blocks a, Blocks b, type) {                                                          \
        asm volatile("{" WGMMA(64, name) " {" REG32 "}, %32, %33, 1, 1, 1, 0, 0;}" : IN32 : "l"(words(a)), "l"(words(b)));      \
    }
#define HELD_LEFT(type, name, n, count, in, regs, a0, a1, a2, a3, b0)                                                             \
    DEVICE void group_held(Fragment (&c)[count], const unsigned int (&a)[4], Blocks b, type) {                                    \
        asm volatile("{" WGMMA(n, name) " {" regs "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, 1;}"           \
                     : in : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(words(b)));                                          \
    }
#define GROUP_MULTIPLY(type, name)                                         \
    ON_CHIP(type, name)                                                    \
    HELD_LEFT(type, name, 40, 5, IN20, REG20, 20, 21, 22, 23, 24)          \
    HELD_LEFT(type, name, 80, 10, IN40, REG40, 40, 41, 42, 43, 44)
GROUP_MULTIPLY(bf16, "bf16")
GROUP_MULTIPLY(f16, "f16")
#endif

}  // namespace ella
