// What kernels are written in. They are one text for two compilers: NVRTC makes GPU code of it at run time, and the C++ compiler functions that go
// through a block's threads one after the other, for machines without a GPU. For tests the C++ compiler makes a third thing of it: the GPU's half once
// more, by an emulator of its threads (emulated.h). So all that runs on a GPU, but for the instructions of ptx.h, is tested where there is none.

namespace ella {

constexpr int VECTOR = 8;         // numbers that a thread moves at once
constexpr int MAX_THREADS = 512;  // of a block
constexpr int WARP = 32;

// bfloat16 and IEEE half, as they lie in memory.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

// A thread's part of a product's eight columns: it has rows p / 4 and p / 4 + 8 of sixteen, p being its place in its warp, and of them columns 2 (p % 4)
// and the next.
struct Fragment {
    float at[4];
};

// Where a matrix of 8 × 8 blocks lies on the chip, each of 128 bytes: its place (14 bits) and how far the next block is along what is added up over (from bit
// 16), and how far it is across that. In units of 16 bytes.
struct Blocks {
    unsigned int place, across;
};

}  // namespace ella

#ifdef __CUDACC_RTC__
#ifdef ELLA_EMULATED
#include "emulated.h"
#else
#define PTX
#define DEVICE __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#define SYNC() __syncthreads()
// What stands in a PHASE is done by every thread of the block; nothing of it but what is SHARED, or a thread's OWN, lives on to the next one.
// OWNED is that as a function takes it. DYNAMIC is what a kernel is given on the chip when it is launched.
#define PHASE(t) if ([[maybe_unused]] const int t = threadIdx.x; true)
#define OWN(type, name, count) type name[count]
#define OWNED(type, name, count) type(&name)[count]
#define OF(name, t) name
#else
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
namespace ella {
struct Place { int x, y; };
inline thread_local Place blockIdx, blockDim, gridDim;
constexpr int MOST_ON_CHIP = 320 << 10;
struct alignas(16) Sixteen { unsigned char at[16]; };
}  // namespace ella
#define DEVICE inline
// Of each thread of the processor, and not beside its stack, which may be small.
#define HELD_BY_THREAD(type, name, memory)                                 \
    static thread_local const std::unique_ptr<type> name##_memory(memory); \
    auto* const name = name##_memory.get()
#define SHARED(type, name, count) HELD_BY_THREAD(type[], name, new type[count])
#define DYNAMIC(name) ella::Sixteen* const name = ella::on_chip()
#define SYNC()
#define PHASE(t) for (int t = 0; t < blockDim.x; ++t)
#define OWN(type, name, count) HELD_BY_THREAD(type[][count], name, new type[ella::MAX_THREADS][count])
#define OWNED(type, name, count) type(*name)[count]
#define OF(name, t) name[t]
namespace ella {
// One for all kernels.
inline Sixteen* on_chip() {
    SHARED(Sixteen, memory, MOST_ON_CHIP / 16);
    return memory;
}
}  // namespace ella
#endif

namespace ella {

#ifdef PTX
DEVICE float from_bits(unsigned int bits) { return __uint_as_float(bits); }
DEVICE unsigned int to_bits(float x) { return __float_as_uint(x); }
DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE void narrow(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
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
    // Subnormal ones come out right too: the product moves the exponent, and is exact. Without a branch, so that many are widened at a time.
    const unsigned int finite = to_bits(from_bits(rest << 13) * from_bits(0x77800000u)), other = 0x7f800000u | (rest & 0x3ffu) << 13;
    return from_bits(sign | (rest >= 0x7c00u ? other : finite));  // other: infinity, not a number
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
DEVICE float power_of_two(float x) { return std::exp2(x); }
DEVICE float inverse(float x) { return 1.0f / x; }
using std::erf;
using std::exp;
using std::min;
using std::sqrt;
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

}  // namespace ella
