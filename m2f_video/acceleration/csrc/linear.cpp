// Linear layers and feed-forward networks over rows, with the layer norm before and the sum and layer norm after them.
//
// A thread takes a block of rows through all of it: what lies between the first product and the output stays in its own
// cache. Both products keep a tile of results in registers, ROW_TILE rows by PANEL columns, while they go along the
// inputs; weights are packed in that order. In bfloat16 an instruction multiplies two neighbouring inputs and adds both
// products, where the machine has one.
#include <algorithm>
#include <vector>

#include "layer_norm.h"

namespace {

constexpr int ROW_TILE = 6;
constexpr int PANEL_VECTORS = 4;
constexpr int PANEL = PANEL_VECTORS * LANES;  // outputs whose weights lie together
constexpr int64_t ROWS = 96;                  // at most of a block
constexpr int64_t DEPTH = 64;                 // of sums term by term, which round most of a float result's error

enum Activation : int64_t { NONE, RELU, GELU };

// x P(x), where P is the normal distribution's. P = 1 / (1 + 2^y), and y, the binary logarithm of (1 - P) / P, is
// nearly an odd polynomial: fitted for |x| up to 6, it leaves an error of 1.5e-7 in the result; below -6 that is 6e-9.
inline Vec gelu(Vec x) {
    const Vec lowest = broadcast(-6), highest = broadcast(6);
    const Vec floored = x < lowest ? lowest : x, limited = floored > highest ? highest : floored;  // NaN stays
    const Vec square = limited * limited;
    Vec p = square * -4.31028068e-09f + 3.47964225e-07f;
    p = p * square + -1.0901115e-05f;
    p = p * square + 0.000155695544f;
    p = p * square + 0.000106953927f;
    p = p * square + -0.104852985f;
    p = p * square + -2.30220187f;
    return floored / (1 + power_of_two(p * limited));
}

// What becomes of sums: activation(sum + bias), to which a residual may be added.
template <typename T>
struct Finish {
    const float* bias;
    Activation activation;
    const T* residual;  // null: nothing is added
    T* output;
    int64_t stride;  // of rows of residual and output

    template <int TILE, int VECTORS>
    inline void operator()(Vec (&sums)[TILE][VECTORS], int64_t row, int64_t column) const {
        Vec biases[VECTORS];
        for (int j = 0; j < VECTORS; ++j) biases[j] = load(bias + column + j * LANES);
        if (activation == GELU) {
            float values[TILE * VECTORS * LANES];  // in memory, so that there is one gelu and not one for each register
            for (int i = 0; i < TILE; ++i)
                for (int j = 0; j < VECTORS; ++j) store(&values[(i * VECTORS + j) * LANES], sums[i][j] + biases[j]);
#pragma GCC unroll 1
            for (int k = 0; k < TILE * VECTORS; ++k)
                finish(row + k / VECTORS, column + k % VECTORS * LANES, gelu(load(&values[k * LANES])));
            return;
        }
        const Vec lowest = broadcast(activation == RELU ? 0 : -INFINITY);
        for (int i = 0; i < TILE; ++i)
            for (int j = 0; j < VECTORS; ++j) {
                const Vec x = sums[i][j] + biases[j];
                finish(row + i, column + j * LANES, x < lowest ? lowest : x);  // NaN stays
            }
    }

    inline void finish(int64_t row, int64_t column, Vec x) const {
        const int64_t place = row * stride + column;
        store(output + place, residual ? x + load(residual + place) : x);
    }
};

template <int TILE, int VECTORS, typename T>
inline void multiply_tile(const T* x, int64_t inputs, const T* weights, const Finish<T>& finish, int64_t row,
                          int64_t column) {
    constexpr int STEP = PER_WORD<T>;
    const int64_t part = STEP == 1 ? DEPTH : inputs;
    Vec totals[TILE][VECTORS];  // set by the first part
    for (int64_t start = 0; start < inputs; start += part) {
        Vec sums[TILE][VECTORS] = {};
        for (int64_t k = start; k < std::min(start + part, inputs); k += STEP) {
            Bits columns[VECTORS];
            for (int j = 0; j < VECTORS; ++j) columns[j] = read<Bits>(weights + k * PANEL + j * STEP * LANES);
            for (int i = 0; i < TILE; ++i) {
                const uint32_t word = word_at(x + i * inputs + k);
                for (int j = 0; j < VECTORS; ++j) sums[i][j] = add_product(sums[i][j], word, columns[j], T{});
            }
        }
        for (int i = 0; i < TILE; ++i)
            for (int j = 0; j < VECTORS; ++j) totals[i][j] = start ? totals[i][j] + sums[i][j] : sums[i][j];
    }
    finish(totals, row, column);
}

template <int VECTORS, typename T>
void multiply_panel(const T* x, int64_t rows, int64_t inputs, const T* weights, const Finish<T>& finish,
                    int64_t column) {
    int64_t row = 0;
    for (; row + ROW_TILE <= rows; row += ROW_TILE)
        multiply_tile<ROW_TILE, VECTORS>(x + row * inputs, inputs, weights, finish, row, column);
    if (row + ROW_TILE / 2 <= rows) {
        multiply_tile<ROW_TILE / 2, VECTORS>(x + row * inputs, inputs, weights, finish, row, column);
        row += ROW_TILE / 2;
    }
    for (; row < rows; ++row) multiply_tile<1, VECTORS>(x + row * inputs, inputs, weights, finish, row, column);
}

// x (rows, inputs) by packed weights (panels, inputs / PER_WORD, PANEL, PER_WORD).
template <typename T>
void multiply(const T* x, int64_t rows, int64_t inputs, const T* weights, int64_t outputs, const Finish<T>& finish) {
    for (int64_t column = 0; column < outputs; column += PANEL) {
        const T* panel = weights + column * inputs;
        switch (std::min<int64_t>((outputs - column) / LANES, PANEL_VECTORS)) {
            case 1: multiply_panel<1>(x, rows, inputs, panel, finish, column); break;
            case 2: multiply_panel<2>(x, rows, inputs, panel, finish, column); break;
            case 3: multiply_panel<3>(x, rows, inputs, panel, finish, column); break;
            default: multiply_panel<PANEL_VECTORS>(x, rows, inputs, panel, finish, column);
        }
    }
}

template <typename T>
struct Layer {
    const T* weights;  // packed; null: there is no such layer
    int64_t outputs;
    std::vector<float> bias;

    Layer(const void* weights, const void* bias_, int64_t outputs)
        : weights((const T*)weights), outputs(outputs), bias(outputs) {
        if (bias_)
            for (int64_t i = 0; i < outputs; ++i) bias[i] = to_float(((const T*)bias_)[i]);
    }
};

template <typename T>
void linear_layers_of(int64_t threads, const T* x, const LayerNorm<T>& before, const Layer<T>& first,
                      const Layer<T>& second, Activation activation, const T* residual, const LayerNorm<T>& after,
                      T* output, int64_t rows, int64_t inputs) {
    // as many blocks for each thread, of as many rows, as can be
    int64_t blocks = (rows + ROWS - 1) / ROWS;
    blocks = (blocks + threads - 1) / threads * threads;
    const int64_t block_rows = ((rows + blocks - 1) / blocks + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    const int64_t outputs = second.outputs;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> normalised(before.weight ? block_rows * inputs : 0);
        std::vector<T> hidden(first.weights ? block_rows * first.outputs : 0);
#pragma omp for schedule(dynamic)
        for (int64_t start = 0; start < rows; start += block_rows) {
            const int64_t count = std::min(block_rows, rows - start);
            const T* values = x + start * inputs;
            if (before.weight) {
                for (int64_t row = 0; row < count; ++row) before(values + row * inputs, &normalised[row * inputs]);
                values = normalised.data();
            }
            int64_t width = inputs;
            if (first.weights) {
                const Finish<T> activate{first.bias.data(), activation, nullptr, hidden.data(), first.outputs};
                multiply(values, count, inputs, first.weights, first.outputs, activate);
                values = hidden.data();
                width = first.outputs;
            }
            T* to = output + start * outputs;
            const T* added = residual ? residual + start * outputs : nullptr;
            const Finish<T> finish{second.bias.data(), first.weights ? NONE : activation, added, to, outputs};
            multiply(values, count, width, second.weights, outputs, finish);
            if (after.weight)
                for (int64_t row = 0; row < count; ++row) after(to + row * outputs, to + row * outputs);
        }
    }
}

}  // namespace

// Whether products of this type are worth it: with AVX-512, and in bfloat16 unless there are matrix instructions, which
// this file does not use. Without products of pairs, too: oneDNN takes more than twice as long then.
EXPORT int64_t fast_products(int64_t dtype) {
#if defined(__AVX512F__) && !defined(__AMX_BF16__)
    return 1;
#elif defined(__AVX512F__)
    return dtype == 0;
#else
    return 0;
#endif
}

// after(residual + second(activation(first(before(x))))), where norms, the first layer and the residual may be null; in
// the absence of the first, the activation is the second's. x (rows, inputs), weights packed as in `multiply`, residual
// and output (rows, outputs). `hidden` and `outputs` are multiples of LANES, widths of bfloat16 are even.
EXPORT void linear_layers(int64_t dtype, int64_t threads, const void* x, const void* before_weight,
                          const void* before_bias, float before_eps, const void* first_weight, const void* first_bias,
                          const void* second_weight, const void* second_bias, int64_t activation, const void* residual,
                          const void* after_weight, const void* after_bias, float after_eps, void* output,
                          int64_t rows, int64_t inputs, int64_t hidden, int64_t outputs) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        const auto norm = [](const void* weight, const void* bias, float eps, int64_t channels) {
            return LayerNorm<T>{(const T*)weight, (const T*)bias, eps, weight ? channels : 0};
        };
        linear_layers_of(threads, (const T*)x, norm(before_weight, before_bias, before_eps, inputs),
                         Layer<T>(first_weight, first_bias, first_weight ? hidden : 0),
                         Layer<T>(second_weight, second_bias, outputs), Activation(activation), (const T*)residual,
                         norm(after_weight, after_bias, after_eps, outputs), (T*)output, rows, inputs);
    };
    dtype ? run(bfloat16{}) : run(0.0f);
}
