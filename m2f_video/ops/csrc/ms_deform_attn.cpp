// Multi-scale deformable attention (arXiv 2010.04159, equation 3), from what a module predicts to the weighted sums.
//
// B batch, N tokens of all levels, Q queries, M heads, D channels of a head, S = L P samples of a head.
#include <algorithm>
#include <vector>

#include "vector.h"

typedef int32_t Int __attribute__((vector_size(64)));

constexpr int CORNERS = 4;

// Of the samples of a head, 16 at a time: the same for all queries. What fills up the last 16 is never read from.
struct Samples {
    Vec width, height;  // of their levels, in pixels
    Int columns, rows;  // the same
    Int first;          // token of their level's first pixel
};

// Where to read 16 samples, and by what to multiply: upper left, upper right, lower left, lower right.
struct Corners {
    int32_t token[CORNERS][LANES];  // -1 outside of the level
    float weight[CORNERS][LANES];
};

static inline void store(int32_t* to, Int x) { std::memcpy(to, &x, sizeof x); }

// Lane i is what lane i + STEP was, counted round.
template <int STEP>
static inline Vec rotated(Vec x) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, STEP, STEP + 1, STEP + 2, STEP + 3, STEP + 4, STEP + 5, STEP + 6, STEP + 7,
                                   STEP + 8, STEP + 9, STEP + 10, STEP + 11, STEP + 12, STEP + 13, STEP + 14,
                                   STEP + 15);
#else
    return __builtin_shuffle(x, Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + STEP);
#endif
}

// Over all lanes, in every lane; in registers, since a sum lane by lane would wait for each addition.
static inline Vec total(Vec x) {
    x += rotated<8>(x);
    x += rotated<4>(x);
    x += rotated<2>(x);
    return x + rotated<1>(x);
}

static inline Vec highest(Vec x) {
    x = maximum(x, rotated<8>(x));
    x = maximum(x, rotated<4>(x));
    x = maximum(x, rotated<2>(x));
    return maximum(x, rotated<1>(x));
}

// The next 16, or what is left before the end: a full load is much faster, and reads what follows in the tensor.
template <typename T>
static inline Vec load_before(const T* end, const T* from) {
    const int64_t left = end - from;
    return left >= LANES ? load(from) : load(from, int(left));
}

// 16 pairs (x, y).
static inline void load_pairs(const float* from, Vec& x, Vec& y) {
    float parts[2][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        parts[0][lane] = from[2 * lane];
        parts[1][lane] = from[2 * lane + 1];
    }
    x = load(parts[0]);
    y = load(parts[1]);
}

static inline void load_pairs(const bfloat16* from, Vec& x, Vec& y) {
    Bits pairs;  // x in the lower half, and a bfloat16 is the upper half of a float
    std::memcpy(&pairs, from, sizeof pairs);
    x = (Vec)(pairs << 16);
    y = (Vec)(pairs & 0xffff0000u);
}

// The next 16 pairs before the end, as `load_before`.
template <typename T>
static inline void load_pairs_before(const T* end, const T* from, Vec& x, Vec& y) {
    if (end - from >= 2 * LANES) return load_pairs(from, x, y);
    T rest[2 * LANES] = {};
    std::memcpy(rest, from, (end - from) * sizeof(T));
    load_pairs(rest, x, y);
}

// Of positions in pixels, 0 being the centre of the level's first. Beyond the border, or where it is no number, a
// position moves to -1 or the size, where all that counts is outside; so any position has integers.
static inline void find_corners(Vec x, Vec y, Vec weight, const Samples& samples, Corners& corners) {
    x = maximum(x, broadcast(-1));
    y = maximum(y, broadcast(-1));
    x = x < samples.width ? x : samples.width;
    y = y < samples.height ? y : samples.height;
    Int column = __builtin_convertvector(x, Int), row = __builtin_convertvector(y, Int);
    column += x < __builtin_convertvector(column, Vec);  // true is -1: rounded down, not to zero
    row += y < __builtin_convertvector(row, Vec);
    const Vec right = (x - __builtin_convertvector(column, Vec)) * weight, left = weight - right;
    const Vec below = y - __builtin_convertvector(row, Vec);

    // as unsigned numbers, those before the first are beyond the last
    const Int in_left = (Bits)column < (Bits)samples.columns, in_right = (Bits)(column + 1) < (Bits)samples.columns;
    const Int in_upper = (Bits)row < (Bits)samples.rows, in_lower = (Bits)(row + 1) < (Bits)samples.rows;
    const Int token = samples.first + row * samples.columns + column, lower = token + samples.columns;
    store(corners.token[0], token | ~(in_upper & in_left));
    store(corners.token[1], (token + 1) | ~(in_upper & in_right));
    store(corners.token[2], lower | ~(in_lower & in_left));
    store(corners.token[3], (lower + 1) | ~(in_lower & in_right));
    const Vec lower_left = left * below, lower_right = right * below;
    store(corners.weight[0], left - lower_left);
    store(corners.weight[1], right - lower_right);
    store(corners.weight[2], lower_left);
    store(corners.weight[3], lower_right);
}

// Sums over all corners of 16 channels, or `VECTORS` times as many; of the first `count` where VECTORS is 0.
template <int VECTORS, typename T>
static inline void sum_corners(const Corners* corners, int64_t samples, const T* image, int64_t stride,
                               const T* zeros, float scale, T* output, int count = LANES) {
    constexpr int PARTS = std::max(VECTORS, 1);
    Vec sums[2][PARTS] = {};  // of upper and lower corners: additions that do not wait for each other
    for (int64_t sample = 0; sample < samples; ++sample) {
        const Corners& at = corners[sample / LANES];
        for (int corner = 0; corner < CORNERS; ++corner) {
            const int64_t token = at.token[corner][sample % LANES];
            const float weight = at.weight[corner][sample % LANES];
            const T* from = token < 0 ? zeros : image + token * stride;
            for (int part = 0; part < PARTS; ++part) {
                const Vec read = VECTORS ? load(from + part * LANES) : load(from, count);
                sums[corner / 2][part] += read * weight;
            }
        }
    }
    for (int part = 0; part < PARTS; ++part) {
        const Vec sum = (sums[0][part] + sums[1][part]) * scale;
        VECTORS ? store(output + part * LANES, sum) : store(output, sum, count);
    }
}

template <typename T>
static inline void sum_corners(const Corners* corners, int64_t samples, const T* image, int64_t stride,
                               const T* zeros, float scale, T* output, int64_t D) {
    int64_t channel = 0;
    for (; channel + 4 * LANES <= D; channel += 4 * LANES)
        sum_corners<4>(corners, samples, image + channel, stride, zeros, scale, output + channel);
    for (; channel + 2 * LANES <= D; channel += 2 * LANES)
        sum_corners<2>(corners, samples, image + channel, stride, zeros, scale, output + channel);
    for (; channel + LANES <= D; channel += LANES)
        sum_corners<1>(corners, samples, image + channel, stride, zeros, scale, output + channel);
    if (channel < D)
        sum_corners<0>(corners, samples, image + channel, stride, zeros, scale, output + channel, int(D - channel));
}

struct Sizes {
    int64_t B, N, Q, M, D, L, P;
};

static std::vector<Samples> samples_of_a_head(const int64_t* shapes, int64_t L, int64_t P) {
    std::vector<Samples> samples((L * P + LANES - 1) / LANES);
    int64_t first = 0;
    for (int64_t level = 0; level < L; ++level) {
        const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
        for (int64_t sample = level * P; sample < (level + 1) * P; ++sample) {
            Samples& of = samples[sample / LANES];
            const int lane = sample % LANES;
            of.width[lane] = of.columns[lane] = width;
            of.height[lane] = of.rows[lane] = height;
            of.first[lane] = first;
        }
        first += height * width;
    }
    return samples;
}

// Of the logits of a head, less the highest; returns what to multiply their sum with to make them a softmax.
static inline float exponentials(std::vector<Vec>& logits, const std::vector<Samples>& samples) {
    const Vec none = broadcast(-__builtin_inff());
    Vec most = none, sum = {};
    for (size_t v = 0; v < logits.size(); ++v) {
        logits[v] = samples[v].columns != 0 ? logits[v] : none;
        most = maximum(logits[v], most);
    }
    most = highest(most);
    for (Vec& logit : logits) sum += logit = exp(logit - most);
    return 1 / total(sum)[0];
}

// PREDICTED: positions are offsets in pixels from reference points, and weights are logits. Otherwise positions are
// relative to the level, 0 to 1, and weights are what they are.
template <bool PREDICTED, typename T, typename Position>
static void attend(int64_t threads, const T* value, const int64_t* shapes, const float* references,
                   const Position* positions, const T* weights, T* output, const Sizes& sizes) {
    const auto [B, N, Q, M, D, L, P] = sizes;
    const int64_t S = L * P, vectors = (S + LANES - 1) / LANES, stride = M * D;
    const Position* positions_end = positions + B * Q * M * S * 2;
    const T* weights_end = weights + B * Q * M * S;
    const std::vector<Samples> samples = samples_of_a_head(shapes, L, P);
    const std::vector<T> zeros(D);

#pragma omp parallel num_threads(threads)
    {
        std::vector<Corners> corners(M * vectors);
        std::vector<Vec> shares(vectors);
        std::vector<float> scales(M, 1.0f);
#pragma omp for
        for (int64_t query = 0; query < B * Q; ++query) {
            const int64_t b = query / Q, q = query % Q;
            // First where all heads look, then what is there: numbers that were just stored as vectors are slow to read.
            for (int64_t m = 0; m < M; ++m) {
                const int64_t first = (query * M + m) * S;
                for (int64_t v = 0; v < vectors; ++v) shares[v] = load_before(weights_end, weights + first + v * LANES);
                if (PREDICTED) scales[m] = exponentials(shares, samples);
                for (int64_t v = 0; v < vectors; ++v) {
                    Vec x, y;
                    load_pairs_before(positions_end, positions + (first + v * LANES) * 2, x, y);
                    const Samples& of = samples[v];
                    x = PREDICTED ? x + (references[2 * q] * of.width - 0.5f) : x * of.width - 0.5f;
                    y = PREDICTED ? y + (references[2 * q + 1] * of.height - 0.5f) : y * of.height - 0.5f;
                    find_corners(x, y, shares[v], of, corners[m * vectors + v]);
                }
            }
            for (int64_t m = 0; m < M; ++m)
                sum_corners(&corners[m * vectors], S, value + (b * N * M + m) * D, stride, zeros.data(), scales[m],
                            output + (query * M + m) * D, D);
        }
    }
}

// value (B, N, M, D), shapes (L, 2) as (height, width), references (Q, 2) as (x, y), offsets (B, Q, M, L, P, 2) as
// (x, y) in pixels, logits (B, Q, M, L, P), output (B, Q, M, D)
EXPORT void ms_deform_attn_from_offsets(int64_t dtype, int64_t threads, const void* value, const int64_t* shapes,
                                        const float* references, const void* offsets, const void* logits,
                                        void* output, int64_t B, int64_t N, int64_t Q, int64_t M, int64_t D, int64_t L,
                                        int64_t P) {
    const Sizes sizes = {B, N, Q, M, D, L, P};
    if (dtype == 0)
        attend<true>(threads, (const float*)value, shapes, references, (const float*)offsets, (const float*)logits,
                     (float*)output, sizes);
    else
        attend<true>(threads, (const bfloat16*)value, shapes, references, (const bfloat16*)offsets,
                     (const bfloat16*)logits, (bfloat16*)output, sizes);
}

// locations (B, Q, M, L, P, 2) as (x, y), 0 and 1 being the level's outer edges: float in any dtype of the others,
// since bfloat16 cannot tell the pixels of a map apart; weights (B, Q, M, L, P)
EXPORT void ms_deform_attn(int64_t dtype, int64_t threads, const void* value, const int64_t* shapes,
                           const float* locations, const void* weights, void* output, int64_t B, int64_t N, int64_t Q,
                           int64_t M, int64_t D, int64_t L, int64_t P) {
    const Sizes sizes = {B, N, Q, M, D, L, P};
    if (dtype == 0)
        attend<false>(threads, (const float*)value, shapes, nullptr, locations, (const float*)weights, (float*)output,
                      sizes);
    else
        attend<false>(threads, (const bfloat16*)value, shapes, nullptr, locations, (const bfloat16*)weights,
                      (bfloat16*)output, sizes);
}
