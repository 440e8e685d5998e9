// distilcb.models.dropout for a CPU: a softmax, dropout after it, and the gradient of both.
//
// Plain C++ without torch's headers, as logit_rows.cpp. distilcb/models/dropout.py calls it.

#include <cstdint>
#include <cstring>
#include <vector>

#include "../numbers.hpp"

namespace {

// 64 random bits of a place: SplitMix64 (Steele, Lea and Flood, 2014), whose states are a seed and the place.
inline uint64_t bits_of(uint64_t seed, uint64_t place) {
    uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Four numbers of 16 bits at once: the top bit of each is set where its other 15, by chance, are below `drops`.
inline uint64_t signs_of(uint64_t bits, uint64_t four_drops) {
    constexpr uint64_t TOP = 0x8000800080008000u;
    return ~((bits | TOP) - four_drops) & TOP;
}

// What was dropped says nothing, be it infinite.
inline float kept(float weight, float gradient) { return weight > 0 ? weight * gradient : 0.0f; }

// gradient, by weight, becomes that by score: p (g - sum of p g), p the weight's size and g 0 where it was dropped.
template <class Number>
APART void backward_of_row(Number* gradient, const Number* weights, int64_t length) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) sum += kept(weights[i], gradient[i]);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
        const float weight = weights[i], size = weight < 0 ? -weight : weight;
        gradient[i].set(kept(weight, gradient[i]) - size * sum);
    }
}

template <class Number>
void softmax_backward(Number* gradient, const Number* weights, int64_t rows, int64_t length, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        backward_of_row(gradient + row * length, weights + row * length, length);
}

// score becomes e^score over the sum of the row's; below -87 from the largest 0, as bf16 and fp32 hardly go further.
template <class Number>
APART void softmax_of_row(Number* scores, int64_t length, float* exps) {
    const float top = largest(scores, length);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) {
        const float below = scores[i] - top, each = below < -87.0f ? 0.0f : exponential(below);
        exps[i] = each;
        sum += each;
    }
    const float factor = 1 / sum;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) scores[i].set(exps[i] * factor);
}

template <class Number>
void softmax(Number* scores, int64_t rows, int64_t length, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> exps(length);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) softmax_of_row(scores + row * length, length, exps.data());
    }
}

}  // namespace

// Of `count` numbers of 16 bits, none negative, the sign is set where chance drops them.
extern "C" void distilcb_sign_16_bits(uint16_t* values, int64_t count, uint64_t seed, uint64_t drops, int threads) {
    const uint64_t four_drops = drops * 0x0001000100010001u;
    const int64_t whole = count / 4;
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t place = 0; place < whole; ++place) {
        uint64_t four;
        std::memcpy(&four, values + 4 * place, sizeof four);
        four |= signs_of(bits_of(seed, place), four_drops);
        std::memcpy(values + 4 * place, &four, sizeof four);
    }
    const uint64_t last = signs_of(bits_of(seed, whole), four_drops);
    for (int64_t i = 4 * whole; i < count; ++i) values[i] |= uint16_t(last >> 16 * (i % 4)) & 0x8000;
}

// The same of numbers of 32 bits.
extern "C" void distilcb_sign_32_bits(uint32_t* values, int64_t count, uint64_t seed, uint64_t drops, int threads) {
    const uint64_t four_drops = drops * 0x0001000100010001u;
    const int64_t whole = count / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t place = 0; place < whole; ++place) {
        const uint64_t signs = signs_of(bits_of(seed, place), four_drops);
        for (int i = 0; i < 4; ++i) values[4 * place + i] |= uint32_t(signs >> 16 * i << 16) & 0x80000000u;
    }
    const uint64_t last = signs_of(bits_of(seed, whole), four_drops);
    for (int64_t i = 4 * whole; i < count; ++i) values[i] |= uint32_t(last >> 16 * (i % 4) << 16) & 0x80000000u;
}

extern "C" void distilcb_softmax_backward_bf16(void* gradient, const void* weights, int64_t rows, int64_t length,
                                               int threads) {
    softmax_backward(static_cast<BFloat16*>(gradient), static_cast<const BFloat16*>(weights), rows, length, threads);
}

extern "C" void distilcb_softmax_backward_fp32(void* gradient, const void* weights, int64_t rows, int64_t length,
                                               int threads) {
    softmax_backward(static_cast<Float32*>(gradient), static_cast<const Float32*>(weights), rows, length, threads);
}

extern "C" void distilcb_softmax_bf16(void* scores, int64_t rows, int64_t length, int threads) {
    softmax(static_cast<BFloat16*>(scores), rows, length, threads);
}

extern "C" void distilcb_softmax_fp32(void* scores, int64_t rows, int64_t length, int threads) {
    softmax(static_cast<Float32*>(scores), rows, length, threads);
}
