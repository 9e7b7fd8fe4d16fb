// Layer norms and group norms, with what is added before or after, in as few passes over memory as there can be.
//
// Sums are taken of differences from a number near the mean, see layer_norm.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layer_norm.h"

namespace {

constexpr int64_t PIXELS = 128;       // whose sums are taken in float; these sums are added in double

// Where a pair of values of this type has a channel of its block.
inline int position(int channel, float) { return channel; }
inline int position(int channel, bfloat16) { return channel % 2 * LANES + channel / 2; }

template <typename T>
Pair arranged(const float* channels) {
    float values[BLOCK];
    for (int channel = 0; channel < BLOCK; ++channel) values[position(channel, T{})] = channels[channel];
    return load_pair(values);
}

template <typename T>
std::vector<float> to_channels(const std::vector<Pair>& pairs) {
    std::vector<float> channels;
    for (const Pair& pair : pairs) {
        float values[BLOCK];
        store_pair(values, pair);
        for (int channel = 0; channel < BLOCK; ++channel) channels.push_back(values[position(channel, T{})]);
    }
    return channels;
}

template <typename T>
void add_rows(const T* a, const T* b, T* sum, int64_t channels) {
    int64_t c = 0;
    for (; c + BLOCK <= channels; c += BLOCK) {
        const Pair x = load_pair(a + c), y = load_pair(b + c);
        store_pair(sum + c, {x.first + y.first, x.second + y.second});
    }
    for (; c < channels; ++c) store_one(sum + c, to_float(a[c]) + to_float(b[c]));
}

template <typename T>
void layer_norm(int64_t threads, const T* x, const T* branch, const LayerNorm<T>& norm, T* output,
                int64_t rows) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t start = row * norm.channels;
        const T* values = x + start;
        if (branch) {
            add_rows(values, branch + start, output + start, norm.channels);
            values = output + start;  // the sum, as it was rounded
        }
        norm(values, output + start);
    }
}

// Not inlined: GCC would take two pixels at a time, and memory that is not read in order is read more slowly.
template <typename T>
__attribute__((noinline)) void add_pixel(const T* x, const Pair* shifts, Pair* values, Pair* squares, int64_t blocks) {
    for (int64_t i = 0; i < blocks; ++i) {
        const Pair pair = load_pair(x + i * BLOCK), &shift = shifts[i];
        const Vec first = pair.first - shift.first, second = pair.second - shift.second;
        values[i].first += first;
        values[i].second += second;
        squares[i].first += first * first;
        squares[i].second += second * second;
    }
}

// Sums of values and of their squares over pixels, of every group: (groups, 2).
template <typename T>
void group_sums(const T* x, int64_t pixels, int64_t blocks, int64_t groups, double* sums) {
    const int64_t channels = blocks * BLOCK;
    const std::vector<Pair> shifts = to_pairs(x, blocks);  // the first pixel
    std::vector<Pair> values(blocks), squares(blocks);
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        add_pixel(x + pixel * channels, shifts.data(), values.data(), squares.data(), blocks);
    const std::vector<float> value_of = to_channels<T>(values), square_of = to_channels<T>(squares);
    std::fill(sums, sums + 2 * groups, 0.0);
    for (int64_t c = 0; c < channels; ++c) {
        const double shift = to_float(x[c]), value = value_of[c];
        double* group = sums + c * groups / channels * 2;
        group[0] += value + pixels * shift;
        group[1] += square_of[c] + 2 * shift * value + pixels * shift * shift;
    }
}

// How a block of channels is normalised: (x - centre) * scale + offset; the centre is the mean, rounded.
struct Affine {
    Pair centre, scale, offset;
};

// From the sums (parts, groups, 2) of an image's pixels to all of its blocks.
template <typename T>
std::vector<Affine> affine_of(const double* sums, int64_t parts, int64_t pixels, int64_t blocks, int64_t groups,
                              const T* weight, const T* bias, float eps) {
    const int64_t channels = blocks * BLOCK, width = channels / groups;
    std::vector<float> centres(channels), scales(channels), offsets(channels);
    for (int64_t group = 0; group < groups; ++group) {
        double value = 0, square = 0;
        for (int64_t part = 0; part < parts; ++part) {
            value += sums[(part * groups + group) * 2];
            square += sums[(part * groups + group) * 2 + 1];
        }
        const double mean = value / (pixels * width), variance = square / (pixels * width) - mean * mean;
        const double inverse = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
            const double scale = inverse * to_float(weight[c]);
            scales[c] = float(scale);
            centres[c] = float(mean);
            offsets[c] = float(to_float(bias[c]) + (centres[c] - mean) * scale);
        }
    }
    std::vector<Affine> affine(blocks);
    for (int64_t i = 0; i < blocks; ++i)
        affine[i] = {arranged<T>(&centres[i * BLOCK]), arranged<T>(&scales[i * BLOCK]),
                     arranged<T>(&offsets[i * BLOCK])};
    return affine;
}

// Which samples bilinear resizing from `inputs` to `outputs` reads; the outer edges of both are in one place.
struct Neighbours {
    int64_t lower, upper;
    float fraction;  // of the upper one

    Neighbours(int64_t output, int64_t outputs, int64_t inputs) {
        const double position = std::max((output + 0.5) * inputs / outputs - 0.5, 0.0);
        lower = std::min(int64_t(position), inputs - 1);
        upper = std::min(lower + 1, inputs - 1);
        fraction = float(position - lower);
    }
};

inline Pair between(const Pair& lower, const Pair& upper, float fraction) {
    const float rest = 1 - fraction;
    return {lower.first * rest + upper.first * fraction, lower.second * rest + upper.second * fraction};
}

template <typename T>
void normalise_pixel(const T* x, const Affine* affine, float lowest, T* output, int64_t blocks) {
    const Vec floor = broadcast(lowest);
    for (int64_t i = 0; i < blocks; ++i) {
        const Pair pair = load_pair(x + i * BLOCK), &centre = affine[i].centre, &scale = affine[i].scale,
                   &offset = affine[i].offset;
        store_pair(output + i * BLOCK, {maximum(floor, (pair.first - centre.first) * scale.first + offset.first),
                                        maximum(floor, (pair.second - centre.second) * scale.second + offset.second)});
    }
}

template <typename T>
void normalise_and_add(const T* x, const Affine* affine, float lowest, const Pair* left, const Pair* right,
                       float fraction, T* output, int64_t blocks) {
    const Vec floor = broadcast(lowest);
    for (int64_t i = 0; i < blocks; ++i) {
        const Pair pair = load_pair(x + i * BLOCK), &centre = affine[i].centre, &scale = affine[i].scale,
                   &offset = affine[i].offset;
        const Pair added = between(left[i], right[i], fraction);
        store_pair(output + i * BLOCK,
                   {maximum(floor, (pair.first - centre.first) * scale.first + offset.first + added.first),
                    maximum(floor, (pair.second - centre.second) * scale.second + offset.second + added.second)});
    }
}

template <typename T>
void group_norm(int64_t threads, const T* x, const T* weight, const T* bias, float eps, T* output, int64_t batch,
                int64_t height, int64_t width, int64_t channels, int64_t groups, int64_t relu, const T* coarse,
                int64_t coarse_stride, int64_t coarse_height, int64_t coarse_width) {
    const int64_t pixels = height * width, parts = (pixels + PIXELS - 1) / PIXELS, blocks = channels / BLOCK;
    const float lowest = relu ? 0 : -INFINITY;
    std::vector<double> sums(batch * parts * groups * 2);
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < batch * parts; ++part) {
        const int64_t first = part % parts * PIXELS, count = std::min(PIXELS, pixels - first);
        group_sums(x + (part / parts * pixels + first) * channels, count, blocks, groups, &sums[part * groups * 2]);
    }
    std::vector<std::vector<Affine>> affines;
    for (int64_t image = 0; image < batch; ++image)
        affines.push_back(
            affine_of(&sums[image * parts * groups * 2], parts, pixels, blocks, groups, weight, bias, eps));
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> blend(coarse ? coarse_width * blocks : 0);  // of the two coarse rows that are next to a row
#pragma omp for
        for (int64_t row = 0; row < batch * height; ++row) {
            const Affine* affine = affines[row / height].data();
            const int64_t start = row * width * channels;
            if (!coarse) {
                for (int64_t i = start; i < start + width * channels; i += channels)
                    normalise_pixel(x + i, affine, lowest, output + i, blocks);
                continue;
            }
            const Neighbours vertical(row % height, height, coarse_height);
            const T *image = coarse + row / height * coarse_stride,
                    *above = image + vertical.lower * coarse_width * channels,
                    *below = image + vertical.upper * coarse_width * channels;
            for (int64_t i = 0; i < coarse_width * blocks; ++i)
                blend[i] = between(load_pair(above + i * BLOCK), load_pair(below + i * BLOCK), vertical.fraction);
            for (int64_t column = 0; column < width; ++column) {
                const Neighbours near(column, width, coarse_width);
                const int64_t i = start + column * channels;
                normalise_and_add(x + i, affine, lowest, &blend[near.lower * blocks], &blend[near.upper * blocks],
                                  near.fraction, output + i, blocks);
            }
        }
    }
}

}  // namespace

// Normalises rows of `channels` values of x, to which `branch` is added before unless it is null.
EXPORT void layer_norm(int64_t dtype, int64_t threads, const void* x, const void* branch, const void* weight,
                       const void* bias, float eps, void* output, int64_t rows, int64_t channels) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        const LayerNorm<T> norm{(const T*)weight, (const T*)bias, eps, channels};
        layer_norm(threads, (const T*)x, (const T*)branch, norm, (T*)output, rows);
    };
    dtype ? run(bfloat16{}) : run(0.0f);
}

// Normalises groups of channels of maps (batch, height, width, channels) to `output`, which may be x. Then, unless
// `coarse` is null, its maps (coarse_height, coarse_width, channels), which begin every `coarse_stride` values, are
// resized and added, and a ReLU may follow. `channels` is a multiple of 32 and of `groups`.
EXPORT void group_norm(int64_t dtype, int64_t threads, const void* x, const void* weight, const void* bias, float eps,
                       void* output, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t groups,
                       int64_t relu, const void* coarse, int64_t coarse_stride, int64_t coarse_height,
                       int64_t coarse_width) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        group_norm(threads, (const T*)x, (const T*)weight, (const T*)bias, eps, (T*)output, batch, height, width,
                   channels, groups, relu, (const T*)coarse, coarse_stride, coarse_height, coarse_width);
    };
    dtype ? run(bfloat16{}) : run(0.0f);
}
