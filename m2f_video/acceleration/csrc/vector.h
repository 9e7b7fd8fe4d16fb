// Vectors of 16 floats, and arrays of float or bfloat16 to read them from. All sums are in float.
//
// GCC and Clang turn these into whatever the machine has: one AVX-512 register, two of AVX2, four of NEON.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>  // for its two instructions, which no operators stand for
#endif

#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t HalfBits __attribute__((vector_size(32)));

struct bfloat16 {
    uint16_t bits;
};

// A vector at any address, in one move. A memcpy becomes moves as wide as the compiler prefers, which on some machines
// is half a vector; and what was just written in halves is read as a whole slowly.
template <typename V>
struct __attribute__((packed, may_alias)) Unaligned {
    V vector;
};

template <typename V>
inline V read(const void* from) {
    return ((const Unaligned<V>*)from)->vector;
}

template <typename V>
inline void write(void* to, V x) {
    ((Unaligned<V>*)to)->vector = x;
}

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

inline Vec load(const float* from) { return read<Vec>(from); }

inline Vec load(const bfloat16* from) {
    return (Vec)(__builtin_convertvector(read<HalfBits>(from), Bits) << 16);
}

inline void store(float* to, Vec x) { write(to, x); }

inline void store(int32_t* to, Int x) { write(to, x); }

inline void store(bfloat16* to, Vec x) {  // rounded to the nearest, ties to even
#if defined(__AVX512BF16__)
    const auto half = _mm512_cvtneps_pbh((__m512)x);
#else
    const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const HalfBits half = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0u, HalfBits);
#endif
    write(to, half);
}

// 32 neighbours in the order that costs least: one after the other in float, but in bfloat16 the even ones, then
// the odd ones, which are halves of the same words: they need shifts and masks, but no shuffles.
struct Pair {
    Vec first, second;
};

inline Pair load_pair(const float* from) { return {load(from), load(from + LANES)}; }

inline Pair load_pair(const bfloat16* from) {
    const Bits words = read<Bits>(from);
    return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
}

inline void store_pair(float* to, const Pair& pair) {
    store(to, pair.first);
    store(to + LANES, pair.second);
}

// Of what is to be cut off after the upper half, to the nearest, ties to even. A NaN does not overflow: it comes from
// bfloat16 or from arithmetic, and the lower half of its bits is zero.
inline Bits rounded(Vec x) { return (Bits)x + 0x7fffu + (((Bits)x >> 16) & 1u); }

inline void store_pair(bfloat16* to, const Pair& pair) {
    const Bits words = (rounded(pair.first) >> 16) | (rounded(pair.second) & 0xffff0000u);
    write(to, words);
}

// The first `count` of 16; the rest is zero, or stays as it is.
template <typename T>
inline Vec load(const T* from, int count) {
    T part[LANES] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store(T* to, Vec x, int count) {
    T part[LANES];
    store(part, x);
    std::memcpy(to, part, count * sizeof(T));
}

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Lane i is what lane i + STEP was, counted round.
template <int STEP>
inline Vec rotated(Vec x) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, STEP, STEP + 1, STEP + 2, STEP + 3, STEP + 4, STEP + 5, STEP + 6, STEP + 7,
                                   STEP + 8, STEP + 9, STEP + 10, STEP + 11, STEP + 12, STEP + 13, STEP + 14,
                                   STEP + 15);
#else
    return __builtin_shuffle(x, Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + STEP);
#endif
}

// Over all lanes, in every lane; in registers, since a sum lane by lane would wait for each addition.
inline Vec total(Vec x) {
    x += rotated<8>(x);
    x += rotated<4>(x);
    x += rotated<2>(x);
    return x + rotated<1>(x);
}

// 2^x for x up to 127, to about one unit in the last place, 1 of 0; 0 from -127 down, and NaN of NaN. Coarsely it is
// within 8e-5 of itself, which is much less than is lost where the result is rounded to bfloat16.
template <bool COARSE = false>
inline Vec power_of_two(Vec x) {
    const Vec lowest = broadcast(-127);
    x = x < lowest ? lowest : x;
    const float to_integer = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to integers; 127 is exponents' zero
    const Vec shifted = x + to_integer, r = x - (shifted - to_integer);  // |r| is at most 0.5
    Vec p;
    if (COARSE) {
        p = r * 0.0551716672f + 0.242611122f;
        p = p * r + 0.693260986f;
        p = p * r + 0.999928074f;
    } else {
        p = r * 0.00132764718f + 0.00967554133f;
        p = p * r + 0.0555071327f;
        p = p * r + 0.240221197f;
        p = p * r + 0.693146967f;
        p = p * r + 1.0f;
    }
    return p * (Vec)((Bits)shifted << 23);
}

// Words of 32 bits, of what an instruction multiplies at a time: a float, or two bfloat16, the first in the lower half.
template <typename T>
constexpr int PER_WORD = sizeof(uint32_t) / sizeof(T);

template <typename T>
inline uint32_t word_at(const T* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
}

// sum + left * right, or sum + both products of pairs.
inline Vec add_product(Vec sum, uint32_t left, Bits right, float) { return sum + (Vec)(Bits{} + left) * (Vec)right; }

inline Vec add_product(Vec sum, uint32_t left, Bits right, bfloat16) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Bits{} + left), (__m512bh)right);
#else
    sum += (Vec)(Bits{} + (left << 16)) * (Vec)(right << 16);
    return sum + (Vec)(Bits{} + (left & 0xffff0000u)) * (Vec)(right & 0xffff0000u);
#endif
}
