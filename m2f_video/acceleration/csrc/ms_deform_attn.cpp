// Multi-scale deformable attention (arXiv 2010.04159, equation 3), from what a module predicts to the weighted sums.
//
// B batch, N tokens of all levels, Q queries, M heads, D channels of a head, S = L P samples of a head.
#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

// The values of a head are copied into a table of cells, one after the other: as they come, 64 bytes of each 512 as a
// rule, they would use an eighth of a cache's sets. A level has a cell for each pixel and, before each row, one of
// zeros, which is also what is right of the row before. The first cell of all is zeros and stands for what is above or
// below a level. A cell has a word for each channel, see vector.h: a float of its pixel, or two bfloat16 of its pixel
// and of the one to the right of it, so that one instruction adds what both contribute.
template <typename T>
constexpr int PIXELS = PER_WORD<T>;  // that a cell has numbers of

// Of the samples of a head, 16 at a time: the same for all queries. What fills up the last 16 is never read from.
struct Samples {
    Vec width, height;            // of their levels, in pixels
    Vec past_right, past_bottom;  // the first positions beyond them, see `find_corners`
    Int columns, rows;            // of their levels, in cells
    Int above;                    // cell one row above their level's first
};

// Where to read 16 samples, and by what to multiply: the upper two pixels, the lower two.
template <typename T>
struct Corners {
    int32_t cell[2][LANES];                     // of the left pixel
    uint32_t weights[2][2 / PIXELS<T>][LANES];  // words as those of cells: for left, then right, or for both
};

// Queries whose corners are found before the first of them is summed: numbers that were just stored as vectors are slow
// to read one by one. As many as a vector has lanes, see `over_lanes`.
constexpr int BLOCK = LANES;

struct alignas(64) Line {  // of a cache; not set to zero
    Line() {}
    char bytes[64];
};

// Starts to bring numbers into the cache that are needed, or written, soon: a head's are too far apart for the machine
// to foresee the next ones.
template <bool TO_WRITE = false, typename T>
inline void prefetch(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += sizeof(Line) / sizeof(T)) __builtin_prefetch(from + i, TO_WRITE);
    __builtin_prefetch(from + count - 1, TO_WRITE);
}

// In lanes whose number has the bit STEP, two lanes of b joined, otherwise two of a: together all of both.
template <int STEP, typename Join>
inline Vec joined(Vec a, Vec b, Join join) {
    const Int of_b = (Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & STEP) != 0;
    return join(of_b ? b : a, rotated<STEP>(of_b ? a : b));
}

// In lane i, all lanes of vector i joined: their sum, say. Each vector alone would be more than twice the work.
template <typename Join>
inline Vec over_lanes(const Vec (&vectors)[LANES], Join join) {
    Vec pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i) pairs[i] = joined<1>(vectors[2 * i], vectors[2 * i + 1], join);
    for (int i = 0; i < 4; ++i) fours[i] = joined<2>(pairs[2 * i], pairs[2 * i + 1], join);
    for (int i = 0; i < 2; ++i) eights[i] = joined<4>(fours[2 * i], fours[2 * i + 1], join);
    return joined<8>(eights[0], eights[1], join);
}

// The next 16, or what is left before the end: a full load is much faster, and reads what follows in the tensor.
template <typename T>
inline Vec load_before(const T* end, const T* from) {
    const int64_t left = end - from;
    return left >= LANES ? load(from) : load(from, int(left));
}

// Every second of 32, from FIRST.
template <int FIRST>
inline Vec alternate(Vec a, Vec b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, FIRST, FIRST + 2, FIRST + 4, FIRST + 6, FIRST + 8, FIRST + 10, FIRST + 12,
                                   FIRST + 14, FIRST + 16, FIRST + 18, FIRST + 20, FIRST + 22, FIRST + 24, FIRST + 26,
                                   FIRST + 28, FIRST + 30);
#else
    return __builtin_shuffle(a, b, Int{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30} + FIRST);
#endif
}

// 16 pairs (x, y).
inline void load_pairs(const float* from, Vec& x, Vec& y) {
    const Vec first = load(from), last = load(from + LANES);
    x = alternate<0>(first, last);
    y = alternate<1>(first, last);
}

inline void load_pairs(const bfloat16* from, Vec& x, Vec& y) {
    const Bits pairs = read<Bits>(from);  // x in the lower half, and a bfloat16 is the upper half of a float
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

// Words of the weights of 16 left and right pixels; in bfloat16 rounded, as in the way by `embedding_bag`.
inline void store_weights(uint32_t (&words)[2][LANES], Vec left, Vec right) {
    store((float*)words[0], left);
    store((float*)words[1], right);
}

inline void store_weights(uint32_t (&words)[1][LANES], Vec left, Vec right) {
    const Bits pairs = (rounded(left) >> 16) | (rounded(right) & 0xffff0000u);
    write(words[0], pairs);
}

// Of positions in pixels, 0 being the centre of one that would come before the level's first. Beyond the border, or
// where it is no number, a position moves to 0 or the size plus 1, where all that counts is outside; so any position
// has integers.
template <typename T>
inline void find_corners(Vec x, Vec y, Vec weight, const Samples& samples, Corners<T>& corners) {
    x = maximum(x, Vec{});
    y = maximum(y, Vec{});
    x = x < samples.past_right ? x : samples.past_right;
    y = y < samples.past_bottom ? y : samples.past_bottom;
    const Int column = __builtin_convertvector(x, Int), row = __builtin_convertvector(y, Int);
    const Vec right = (x - __builtin_convertvector(column, Vec)) * weight, left = weight - right;
    const Vec below = y - __builtin_convertvector(row, Vec);

    // as unsigned numbers, those before the first are beyond the last
    const Int in_columns = column < samples.columns;
    const Int in_upper = (Bits)(row - 1) < (Bits)samples.rows, in_lower = row < samples.rows;
    const Int cell = samples.above + row * samples.columns + column;
    store(corners.cell[0], cell & in_columns & in_upper);
    store(corners.cell[1], (cell + samples.columns) & in_columns & in_lower);
    const Vec lower_left = left * below, lower_right = right * below;
    store_weights(corners.weights[0], left - lower_left, right - lower_right);
    store_weights(corners.weights[1], lower_left, lower_right);
}

// Sums over all corners, times `scale`, of the channels at the start of the cells, of which the next is `words` later.
// Upper and lower corners are summed apart, so that an addition does not wait for the one before it.
template <int VECTORS, typename T>
inline void sum_corners(const Corners<T>* corners, int64_t samples, const uint32_t* table, int64_t words, float scale,
                        Vec (&results)[VECTORS]) {
    Vec sums[2][VECTORS] = {};
    for (; samples > 0; samples -= LANES, ++corners)
        for (int lane = 0; lane < std::min<int64_t>(samples, LANES); ++lane)
            for (int half = 0; half < 2; ++half) {
                const uint32_t* from = table + corners->cell[half][lane] * words;
                for (int side = 0; side < 2 / PIXELS<T>; ++side, from += words)
                    for (int v = 0; v < VECTORS; ++v) {
                        const auto cell = read<Bits>(from + v * LANES);
                        sums[half][v] = add_product(sums[half][v], corners->weights[half][side][lane], cell, T{});
                    }
            }
    for (int v = 0; v < VECTORS; ++v) results[v] = (sums[0][v] + sums[1][v]) * scale;
}

// The same of all D channels: 32 at a time, and at the end 16 or what is left.
template <typename T>
inline void attend_to_corners(const Corners<T>* corners, int64_t samples, const uint32_t* table, int64_t words,
                              float scale, T* output, int64_t D) {
    int64_t channel = 0;
    for (; channel + 2 * LANES <= D; channel += 2 * LANES) {
        Vec sums[2];
        sum_corners(corners, samples, table + channel, words, scale, sums);
        store(output + channel, sums[0]);
        store(output + channel + LANES, sums[1]);
    }
    for (; channel < D; channel += LANES) {
        Vec sums[1];
        sum_corners(corners, samples, table + channel, words, scale, sums);
        store(output + channel, sums[0], std::min<int64_t>(D - channel, LANES));
    }
}

// 16 words of a cell, from its pixel and the one to the right of it.
inline Bits words_of(Vec pixel, Vec, float) { return (Bits)pixel; }

inline Bits words_of(Vec pixel, Vec right, bfloat16) { return ((Bits)pixel >> 16) | (Bits)right; }

// Fills the table of a head, `words` to a cell, but for its first and last cell. `value` are the head's D channels of
// the first of N tokens; those of the next one are `step` later.
template <typename T>
void fill_table(const T* value, int64_t N, int64_t step, const int64_t* shapes, int64_t L, int64_t D, uint32_t* table,
                int64_t words) {
    constexpr int64_t AHEAD = 16;  // tokens
    const auto load_channels = [&](int64_t token, int64_t channel) {
        return load_before(value + token * step + D, value + token * step + channel);
    };
    uint32_t* cell = table + words;
    int64_t next = 0;  // token: right of the cell's pixel, or after the last one of the row
    for (int64_t level = 0; level < L; ++level)
        for (int64_t row = 0; row < shapes[2 * level]; ++row)
            for (int64_t column = 0, width = shapes[2 * level + 1]; column <= width; ++column, cell += words) {
                prefetch(value + std::min(next + AHEAD, N - 1) * step, D);
                for (int64_t channel = 0; channel < D; channel += LANES) {
                    const Vec pixel = column > 0 ? load_channels(next - 1, channel) : Vec{};
                    const Vec right = column < width ? load_channels(next, channel) : Vec{};
                    const Bits both = words_of(pixel, right, T{});
                    write(cell + channel, both);
                }
                next += column < width;
            }
}

struct Sizes {
    int64_t B, N, Q, M, D, L, P;
};

std::vector<Samples> samples_of_a_head(const int64_t* shapes, int64_t L, int64_t P) {
    std::vector<Samples> samples((L * P + LANES - 1) / LANES);
    int64_t first = 1;
    for (int64_t level = 0; level < L; ++level) {
        const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
        for (int64_t sample = level * P; sample < (level + 1) * P; ++sample) {
            Samples& of = samples[sample / LANES];
            const int lane = sample % LANES;
            of.width[lane] = width;
            of.height[lane] = of.rows[lane] = height;
            of.past_right[lane] = of.columns[lane] = width + 1;
            of.past_bottom[lane] = height + 1;
            of.above[lane] = first - (width + 1);
        }
        first += height * (width + 1);
    }
    return samples;
}

// Of the logits of a block, each query's less its highest, and by what to multiply their sum to make them a softmax.
template <typename T>
inline void exponentials(std::vector<Vec>& logits, const std::vector<Samples>& samples, float (&scales)[BLOCK]) {
    const int64_t vectors = samples.size();
    const Vec none = broadcast(-__builtin_inff());
    Vec of_query[BLOCK];
    for (int query = 0; query < BLOCK; ++query) {
        of_query[query] = none;
        for (int64_t v = 0; v < vectors; ++v) {
            Vec& logit = logits[query * vectors + v];
            logit = samples[v].columns != 0 ? logit : none;
            of_query[query] = maximum(logit, of_query[query]);
        }
    }
    float highest[BLOCK];
    store(highest, over_lanes(of_query, maximum));
    for (int query = 0; query < BLOCK; ++query) {
        of_query[query] = Vec{};
        for (int64_t v = 0; v < vectors; ++v) {
            Vec& logit = logits[query * vectors + v];
            logit = power_of_two<PIXELS<T> == 2>((logit - highest[query]) * 1.44269504f);  // log2(e)
            of_query[query] += logit;
        }
    }
    store(scales, 1.0f / over_lanes(of_query, [](Vec a, Vec b) { return a + b; }));
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

    const int64_t lines = (D + LANES - 1) / LANES, words = lines * LANES;  // of a cell
    int64_t cells = 2;  // those before and after the levels
    for (int64_t level = 0; level < L; ++level) cells += shapes[2 * level] * (shapes[2 * level + 1] + 1);

    // A thread takes all queries of a head, or a part of them where there are more threads than heads.
    const int64_t parts = std::max<int64_t>((threads + B * M - 1) / (B * M), 1);

#pragma omp parallel num_threads(threads)
    {
        std::vector<Line> room(cells * lines);
        uint32_t* const table = (uint32_t*)room.data();
        std::fill_n(table, words, 0);
        std::fill_n(table + (cells - 1) * words, words, 0);
        std::vector<Corners<T>> corners(BLOCK * vectors);
        std::vector<Vec> shares(BLOCK * vectors);
        float scales[BLOCK];
        std::fill(scales, scales + BLOCK, 1.0f);
#pragma omp for collapse(3)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t m = 0; m < M; ++m)
                for (int64_t part = 0; part < parts; ++part) {
                    fill_table(value + (b * N * M + m) * D, N, M * D, shapes, L, D, table, words);
                    const int64_t last = Q * (part + 1) / parts;
                    for (int64_t block = Q * part / parts; block < last; block += BLOCK) {
                        const int64_t count = std::min<int64_t>(BLOCK, last - block);
                        // row of a query of this block in positions, weights and output, or of one of the next block
                        const auto of_head = [&](int64_t q) { return (b * Q + block + q) * M + m; };
                        const auto later = [&](int64_t q) { return of_head(std::min(q + BLOCK, Q - 1 - block)); };
                        for (int64_t q = 0; q < count; ++q)
                            for (int64_t v = 0; v < vectors; ++v)
                                shares[q * vectors + v] =
                                    load_before(weights_end, weights + of_head(q) * S + v * LANES);
                        if (PREDICTED) exponentials<T>(shares, samples, scales);
                        for (int64_t q = 0; q < count; ++q) {
                            prefetch(weights + later(q) * S, S);
                            prefetch<true>(output + of_head(q) * D, D);
                            for (int64_t v = 0; v < vectors; ++v) {
                                Vec x, y;
                                load_pairs_before(positions_end, positions + (of_head(q) * S + v * LANES) * 2, x, y);
                                const Samples& of = samples[v];
                                const int64_t point = 2 * (block + q);
                                x = PREDICTED ? x + (references[point] * of.width + 0.5f) : x * of.width + 0.5f;
                                y = PREDICTED ? y + (references[point + 1] * of.height + 0.5f) : y * of.height + 0.5f;
                                find_corners(x, y, shares[q * vectors + v], of, corners[q * vectors + v]);
                            }
                        }
                        for (int64_t q = 0; q < count; ++q) {
                            prefetch(positions + later(q) * S * 2, S * 2);
                            attend_to_corners(&corners[q * vectors], S, table, words, scales[q],
                                              output + of_head(q) * D, D);
                        }
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
