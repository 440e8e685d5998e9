// fp32 and bf16 as C++ reads and writes them, and what both .cpp files take of rows of them.
//
// Loops are written so that a compiler vectorises them, and functions with loops are not inlined: gcc 12 then no longer
// does so, and a chunk of logits takes three times as long.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define APART __attribute__((noinline))

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A bf16 is the upper half of an fp32.
struct BFloat16 {
    uint16_t bits;
    operator float() const { return from_bits(uint32_t(bits) << 16); }
    void set(float value) {  // to the nearest, of two the even one; NaN, whose bits could carry over, stays one
        const uint32_t exact = to_bits(value);
        const uint32_t rounded = (exact + 0x7fff + ((exact >> 16) & 1)) >> 16;
        bits = uint16_t(value != value ? 0x7fc0 : rounded);
    }
};

struct Float32 {
    float value;
    operator float() const { return value; }
    void set(float other) { value = other; }
};

// e^x for x <= 0, to 2 units in the last place: x = n ln 2 + r, and a polynomial for e^r, |r| <= ln 2 / 2 (its Taylor
// series to r^7). Below -87 it stays at e^-87, 1.6e-38: there fp32's normal numbers end. NaN gives NaN.
inline float exponential(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are n
    const float n = shifted - 12582912.0f;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const float power = from_bits((to_bits(shifted) + 127) << 23);
    return sum * power;
}

template <class Number>
APART float largest(const Number* row, int64_t vocab) {
    float found = -INFINITY;
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < vocab; ++i) {
        const float value = row[i];
        found = value > found ? value : found;
    }
    return found;
}

}  // namespace
