// 3x3 convolution with zeros around the map, of maps whose channels come last, by F(4x4, 3x3) of
// arXiv 1509.09308: each tile of 4x4 results is A^T [ sum over channels of U * (B^T d B) ] A of the 6x6 inputs d.
//
// The points are 0, a, -a, b, -b and infinity. B^T has the coefficients of the product of (x - q) over the other
// finite points q in the row of a point, A^T the powers of a point in its column; the divisors are in the weights U.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

constexpr int SIZE = 4, INPUTS = SIZE + 2, PRODUCTS = INPUTS * INPUTS;
constexpr float a = 0.6875f, b = 1.5f;  // under half the error of 1 and 2
constexpr float a2 = a * a, b2 = b * b;

constexpr int ROWS = 12, COLUMNS = 2 * LANES;  // of the result of a matrix product that stay in registers
constexpr int TILES = 48;                      // transformed at a time: many enough to share each read of the weights
constexpr int DEPTH = 32;                      // of sums term by term, which round most of a float result's error
static_assert(TILES % ROWS == 0);

struct alignas(64) Lanes {
    float values[LANES] = {};
};

inline void transform_input(const Vec* d, int stride, Vec* to) {
    const Vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
    const Vec even_a = d4 - b2 * d2, odd_a = a * (d3 - b2 * d1);
    const Vec even_b = d4 - a2 * d2, odd_b = b * (d3 - a2 * d1);
    to[0] = d4 - (a2 + b2) * d2 + (a2 * b2) * d0;
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = d5 - (a2 + b2) * d3 + (a2 * b2) * d1;
}

inline void transform_output(const Vec* m, int stride, Vec* to) {
    const Vec plus_a = m[stride] + m[2 * stride], minus_a = m[stride] - m[2 * stride];
    const Vec plus_b = m[3 * stride] + m[4 * stride], minus_b = m[3 * stride] - m[4 * stride];
    to[0] = m[0] + plus_a + plus_b;
    to[1] = a * minus_a + b * minus_b;
    to[2] = a2 * plus_a + b2 * plus_b;
    to[3] = (a2 * a) * minus_a + (b2 * b) * minus_b + m[5 * stride];
}

struct Map {
    int64_t height, width, tile_rows, tile_columns;

    struct Tile {
        int64_t batch, y, x;  // of its first result
    };

    Tile tile(int64_t index) const {
        const int64_t row = index / tile_columns;
        return {row / tile_rows, row % tile_rows * SIZE, index % tile_columns * SIZE};
    }

    int64_t pixel(Tile tile, int y, int x) const { return (tile.batch * height + tile.y + y) * width + tile.x + x; }

    bool contains(Tile tile, int y, int x) const {
        return tile.y + y >= 0 && tile.y + y < height && tile.x + x >= 0 && tile.x + x < width;
    }
};

// B^T d B of a tile, its numbers `step` floats apart; zeros are what lies outside the map.
template <typename T>
void read_tile(const Map& map, Map::Tile tile, const T* input, int64_t channels, const T* zeros, float* to,
               int64_t step) {
    const T* pixels[PRODUCTS];
    for (int i = 0; i < PRODUCTS; ++i) {
        const int y = i / INPUTS - 1, x = i % INPUTS - 1;
        pixels[i] = map.contains(tile, y, x) ? input + map.pixel(tile, y, x) * channels : zeros;
    }
    for (int64_t channel = 0; channel < channels; channel += LANES) {
        Vec columns[PRODUCTS], rows[INPUTS];
        for (int i = 0; i < INPUTS; ++i) {
            Vec d[INPUTS];
            for (int k = 0; k < INPUTS; ++k) d[k] = load(pixels[i * INPUTS + k] + channel);
            transform_input(d, 1, columns + i * INPUTS);
        }
        for (int k = 0; k < INPUTS; ++k) {
            transform_input(columns + k, INPUTS, rows);
            for (int i = 0; i < INPUTS; ++i) store(to + (i * INPUTS + k) * step + channel, rows[i]);
        }
    }
}

// A^T m A of `COLUMNS` channels of a tile, those of them and of its pixels that are in the result.
template <typename T>
void write_tile(const Map& map, Map::Tile tile, const float* products, int64_t step, T* output, int64_t channels,
                int64_t channel) {
    for (int lanes = 0; lanes < COLUMNS && channel + lanes < channels; lanes += LANES) {
        Vec columns[INPUTS * SIZE], rows[SIZE];
        for (int i = 0; i < INPUTS; ++i) {
            Vec m[INPUTS];
            for (int k = 0; k < INPUTS; ++k) m[k] = load(products + (i * INPUTS + k) * step + lanes);
            transform_output(m, 1, columns + i * SIZE);
        }
        for (int x = 0; x < SIZE; ++x) {
            transform_output(columns + x, SIZE, rows);
            for (int y = 0; y < SIZE; ++y)
                if (map.contains(tile, y, x))
                    store(output + map.pixel(tile, y, x) * channels + channel + lanes, rows[y]);
        }
    }
}

// `ROWS` rows of a matrix times a panel (depth, COLUMNS), `part` terms at a time, to rows of `COLUMNS`.
void multiply(const float* matrix, int64_t row_step, const float* panel, int64_t depth, int64_t part, float* to) {
    for (int64_t start = 0; start < depth; start += part) {
        const int64_t end = std::min(start + part, depth);
        Vec sums[ROWS][2] = {};
        for (int64_t k = start; k < end; ++k) {
            const Vec left = load(panel + k * COLUMNS), right = load(panel + k * COLUMNS + LANES);
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; ++row) {
                const Vec factor = broadcast(matrix[row * row_step + k]);
                sums[row][0] += factor * left;
                sums[row][1] += factor * right;
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            float* at = to + row * COLUMNS;
            store(at, start ? load(at) + sums[row][0] : sums[row][0]);
            store(at + LANES, start ? load(at + LANES) + sums[row][1] : sums[row][1]);
        }
    }
}

template <typename T>
void convolve(int64_t threads, const T* input, const float* weight, T* output, const Map& map, int64_t batch,
              int64_t channels, int64_t outputs) {
    const int64_t tiles = batch * map.tile_rows * map.tile_columns;
    const int64_t row_step = channels + LANES;  // no power of two, at which rows would evict each other from a cache
    const int64_t part = std::is_same<T, float>::value ? DEPTH : channels;
    const std::vector<T> zeros(channels);
#pragma omp parallel num_threads(std::min(threads, (tiles + TILES - 1) / TILES))
    {
        // full-sized, so that products of whole `ROWS` may read and write past the last tile: zeros or earlier tiles
        std::vector<Lanes> transformed(PRODUCTS * TILES * row_step / LANES);
        std::vector<Lanes> multiplied(PRODUCTS * TILES * COLUMNS / LANES);
        float* const factors = transformed[0].values;
        float* const products = multiplied[0].values;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tiles; first += TILES) {
            const int64_t count = std::min<int64_t>(TILES, tiles - first);
            for (int64_t i = 0; i < count; ++i)
                read_tile(map, map.tile(first + i), input, channels, zeros.data(), factors + i * row_step,
                          TILES * row_step);
            const float* panel = weight;
            for (int64_t channel = 0; channel < outputs; channel += COLUMNS) {
                for (int product = 0; product < PRODUCTS; ++product, panel += channels * COLUMNS)
                    for (int64_t i = 0; i < count; i += ROWS)
                        multiply(factors + (product * TILES + i) * row_step, row_step, panel, channels, part,
                                 products + (product * TILES + i) * COLUMNS);
                for (int64_t i = 0; i < count; ++i)
                    write_tile(map, map.tile(first + i), products + i * COLUMNS, TILES * COLUMNS, output, outputs,
                               channel);
            }
        }
    }
}

}  // namespace

// input (batch, height, width, channels), weight (panels, PRODUCTS, channels, COLUMNS) of as many panels as have all
// outputs -> output (batch, height, width, outputs). Channels and outputs are multiples of 16.
EXPORT void winograd_convolution(int64_t dtype, int64_t threads, const void* input, const float* weight, void* output,
                                 int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs) {
    const Map map{height, width, (height + SIZE - 1) / SIZE, (width + SIZE - 1) / SIZE};
    if (dtype == 0)
        convolve(threads, (const float*)input, weight, (float*)output, map, batch, channels, outputs);
    else
        convolve(threads, (const bfloat16*)input, weight, (bfloat16*)output, map, batch, channels, outputs);
}
