// Multi-scale deformable attention (arXiv 2010.04159, equation 3), from what a module predicts to the weighted sums.
//
// B batch, N tokens of all levels, Q queries, M heads, D channels of a head, S = L P samples of a head.
#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

constexpr int CORNERS = 4;

// Of the samples of a head, 16 at a time: the same for all queries. What fills up the last 16 is never read from.
struct Samples {
    Vec width, height;  // of their levels, in pixels
    Int columns, rows;  // the same
    Int first;          // token of their level's first pixel
};

// Where to read 16 samples, and by what to multiply: upper left, upper right, lower left, lower right.
struct Corners {
    int32_t row[CORNERS][LANES];  // of a head's values, of which row 0 is zero and stands for all outside of the level
    float weight[CORNERS][LANES];
};

// Queries whose corners are found before the first of them is summed: numbers that were just stored as vectors are slow
// to read one by one.
constexpr int BLOCK = 8;

inline Vec highest(Vec x) {
    x = maximum(x, rotated<8>(x));
    x = maximum(x, rotated<4>(x));
    x = maximum(x, rotated<2>(x));
    return maximum(x, rotated<1>(x));
}

// The next 16, or what is left before the end: a full load is much faster, and reads what follows in the tensor.
template <typename T>
inline Vec load_before(const T* end, const T* from) {
    const int64_t left = end - from;
    return left >= LANES ? load(from) : load(from, int(left));
}

// 16 pairs (x, y).
inline void load_pairs(const float* from, Vec& x, Vec& y) {
    float parts[2][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        parts[0][lane] = from[2 * lane];
        parts[1][lane] = from[2 * lane + 1];
    }
    x = load(parts[0]);
    y = load(parts[1]);
}

inline void load_pairs(const bfloat16* from, Vec& x, Vec& y) {
    Bits pairs;  // x in the lower half, and a bfloat16 is the upper half of a float
    std::memcpy(&pairs, from, sizeof pairs);
    x = (Vec)(pairs << 16);
    y = (Vec)(pairs & 0xffff0000u);
}

// The next 16 pairs before the end, as `load_before`.
template <typename T>
inline void load_pairs_before(const T* end, const T* from, Vec& x, Vec& y) {
    if (end - from >= 2 * LANES) return load_pairs(from, x, y);
    T rest[2 * LANES] = {};
    std::memcpy(rest, from, (end - from) * sizeof(T));
    load_pairs(rest, x, y);
}

// Of positions in pixels, 0 being the centre of the level's first. Beyond the border, or where it is no number, a
// position moves to -1 or the size, where all that counts is outside; so any position has integers.
inline void find_corners(Vec x, Vec y, Vec weight, const Samples& samples, Corners& corners) {
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
    store(corners.row[0], (token + 1) & in_upper & in_left);
    store(corners.row[1], (token + 2) & in_upper & in_right);
    store(corners.row[2], (lower + 1) & in_lower & in_left);
    store(corners.row[3], (lower + 2) & in_lower & in_right);
    const Vec lower_left = left * below, lower_right = right * below;
    store(corners.weight[0], left - lower_left);
    store(corners.weight[1], right - lower_right);
    store(corners.weight[2], lower_left);
    store(corners.weight[3], lower_right);
}

// Calls `add(values of the corner, weight, whether it is a lower one)` for the corners of all samples.
template <typename T, typename Add>
inline void for_corners(const Corners* corners, int64_t samples, const T* values, int64_t D, Add add) {
    for (; samples > 0; samples -= LANES, ++corners)
        for (int lane = 0; lane < std::min<int64_t>(samples, LANES); ++lane)
            for (int corner = 0; corner < CORNERS; ++corner)
                add(values + corners->row[corner][lane] * D, corners->weight[corner][lane], corner / 2);
}

// Sums over all corners, times `scale`: of D channels, 32 at a time. Upper and lower corners are summed apart, so that
// an addition does not wait for the one before it.
template <typename T>
inline void sum_corners(const Corners* corners, int64_t samples, const T* values, float scale, T* output,
                               int64_t D) {
    int64_t channel = 0;
    for (; channel + 2 * LANES <= D; channel += 2 * LANES) {
        Pair sums[2] = {};
        for_corners(corners, samples, values + channel, D, [&](const T* from, float weight, int half) {
            const Pair read = load_pair(from);
            sums[half].first += read.first * weight;
            sums[half].second += read.second * weight;
        });
        const Vec first = sums[0].first + sums[1].first, second = sums[0].second + sums[1].second;
        store_pair(output + channel, {first * scale, second * scale});
    }
    for (; channel < D; channel += LANES) {
        const int count = std::min<int64_t>(D - channel, LANES);
        Vec sums[2] = {};
        for_corners(corners, samples, values + channel, D, [&](const T* from, float weight, int half) {
            sums[half] += load(from, count) * weight;
        });
        store(output + channel, (sums[0] + sums[1]) * scale, count);
    }
}

struct alignas(64) Line {  // of a cache; not set to zero
    Line() {}
    char bytes[64];
};

struct Sizes {
    int64_t B, N, Q, M, D, L, P;
};

std::vector<Samples> samples_of_a_head(const int64_t* shapes, int64_t L, int64_t P) {
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
inline float exponentials(std::vector<Vec>& logits, const std::vector<Samples>& samples) {
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
void attend(int64_t threads, const T* value, const int64_t* shapes, const float* references,
                   const Position* positions, const T* weights, T* output, const Sizes& sizes) {
    const auto [B, N, Q, M, D, L, P] = sizes;
    const int64_t S = L * P, vectors = (S + LANES - 1) / LANES;
    const Position* positions_end = positions + B * Q * M * S * 2;
    const T* weights_end = weights + B * Q * M * S;
    const std::vector<Samples> samples = samples_of_a_head(shapes, L, P);

    // A thread takes all queries of a head, or a part of them where there are more threads than heads.
    const int64_t parts = std::max<int64_t>((threads + B * M - 1) / (B * M), 1);

#pragma omp parallel num_threads(threads)
    {
        // The values of the head one after the other, below a row of zeros: as they come, 128 bytes of each 1024 as a
        // rule, they would use an eighth of a cache's sets.
        std::vector<Line> room(((N + 1) * D * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
        T* const values = (T*)room.data();
        std::fill(values, values + D, T{});
        std::vector<Corners> corners(BLOCK * vectors);
        std::vector<Vec> shares(vectors);
        float scales[BLOCK];
        std::fill(scales, scales + BLOCK, 1.0f);
#pragma omp for collapse(3)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t m = 0; m < M; ++m)
                for (int64_t part = 0; part < parts; ++part) {
                    for (int64_t n = 0; n < N; ++n)
                        std::copy_n(value + ((b * N + n) * M + m) * D, D, values + (n + 1) * D);
                    const int64_t last = Q * (part + 1) / parts;
                    for (int64_t block = Q * part / parts; block < last; block += BLOCK) {
                        const int64_t end = std::min(block + BLOCK, last);
                        for (int64_t q = block; q < end; ++q) {
                            const int64_t first = ((b * Q + q) * M + m) * S;
                            for (int64_t v = 0; v < vectors; ++v)
                                shares[v] = load_before(weights_end, weights + first + v * LANES);
                            if (PREDICTED) scales[q - block] = exponentials(shares, samples);
                            for (int64_t v = 0; v < vectors; ++v) {
                                Vec x, y;
                                load_pairs_before(positions_end, positions + (first + v * LANES) * 2, x, y);
                                const Samples& of = samples[v];
                                x = PREDICTED ? x + (references[2 * q] * of.width - 0.5f) : x * of.width - 0.5f;
                                y = PREDICTED ? y + (references[2 * q + 1] * of.height - 0.5f) : y * of.height - 0.5f;
                                find_corners(x, y, shares[v], of, corners[(q - block) * vectors + v]);
                            }
                        }
                        for (int64_t q = block; q < end; ++q)
                            sum_corners(&corners[(q - block) * vectors], S, values, scales[q - block],
                                        output + ((b * Q + q) * M + m) * D, D);
                    }
                }
    }
}

}  // namespace

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
