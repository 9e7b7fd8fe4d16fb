// The layer norm of a row.
//
// Sums are taken of differences from a number near the mean: the squares of values far from zero that differ by little
// would lose the variance in rounding.
#pragma once

#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 2 * LANES;  // channels of a pair of vectors

template <typename T>
std::vector<Pair> to_pairs(const T* channels, int64_t blocks) {
    std::vector<Pair> pairs(blocks);
    for (int64_t i = 0; i < blocks; ++i) pairs[i] = load_pair(channels + i * BLOCK);
    return pairs;
}

template <typename T>
inline void store_one(T* to, float x) {
    store(to, broadcast(x), 1);
}

template <typename T>
struct LayerNorm {
    const T *weight, *bias;
    float eps;
    int64_t channels;
    int64_t blocks = channels / BLOCK;  // the channels after these are taken one by one
    std::vector<Pair> weights = to_pairs(weight, blocks), biases = to_pairs(bias, blocks);

    // Normalises a row, in place if output is x.
    void operator()(const T* x, T* output) const {
        // The mean of some of the values is at most sqrt(channels / their number) standard deviations from that of all.
        float shift = to_float(x[0]);
        if (blocks) {
            const Pair pair = load_pair(x);
            shift = total(pair.first + pair.second)[0] / BLOCK;
        }
        Pair sums{}, squares{};
        for (int64_t i = 0; i < blocks; ++i) {
            const Pair pair = load_pair(x + i * BLOCK);
            const Vec first = pair.first - shift, second = pair.second - shift;
            sums.first += first;
            sums.second += second;
            squares.first += first * first;
            squares.second += second * second;
        }
        float sum = total(sums.first + sums.second)[0], square = total(squares.first + squares.second)[0];
        for (int64_t c = blocks * BLOCK; c < channels; ++c) {
            const float difference = to_float(x[c]) - shift;
            sum += difference;
            square += difference * difference;
        }
        const float share = 1.0f / channels, mean = sum * share, variance = square * share - mean * mean;
        const float scale = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);  // NaN stays
        const float offset = -mean * scale;
        for (int64_t i = 0; i < blocks; ++i) {
            const Pair pair = load_pair(x + i * BLOCK), &w = weights[i], &b = biases[i];
            store_pair(output + i * BLOCK, {((pair.first - shift) * scale + offset) * w.first + b.first,
                                            ((pair.second - shift) * scale + offset) * w.second + b.second});
        }
        for (int64_t c = blocks * BLOCK; c < channels; ++c) {
            const float normalised = (to_float(x[c]) - shift) * scale + offset;
            store_one(output + c, normalised * to_float(weight[c]) + to_float(bias[c]));
        }
    }
};

}  // namespace
