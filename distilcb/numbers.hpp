// fp32 and bf16 as C++ reads and writes them.

#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace
