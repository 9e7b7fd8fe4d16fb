// Attention of many queries to many keys: in the windows of Swin, and of the decoder's queries to pixels.
//
// Logits are made with queries along the lanes, so that their maximum and sum need no work across lanes and biases and
// masks are read as rows; outputs with channels along the lanes, so that they are stored as they are. Both products
// keep a tile of results in registers. Keys and values are copied before: their rows lie far apart, in few cache sets.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int QUERY_VECTORS = 4;
constexpr int QUERIES = QUERY_VECTORS * LANES;  // worked on at a time
constexpr int KEY_TILE = 5;                     // keys of whose logits are in registers at a time
constexpr int ROW_TILE = 8;                     // queries of whose outputs are in registers at a time
constexpr int KEYS = 60;                        // of a block of a long sequence; a multiple of KEY_TILE

int round_up(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

template <typename T>
void copy_row(float* to, const T* from, int dim) {
    for (int d = 0; d < dim; d += LANES) store(to + d, load(from + d));
}

// Scaled queries by channel: (dim, QUERIES), of which there are `count`; null rows are zero.
template <typename T>
void transpose_queries(float* transposed, const T* const* rows, int count, int dim) {
    const float scale = 1 / std::sqrt(float(dim));
    for (int q = 0; q < count; ++q)
        for (int d = 0; d < dim; ++d) transposed[d * QUERIES + q] = to_float(rows[q][d]) * scale;
    for (int d = 0; d < dim; ++d) std::fill(transposed + d * QUERIES + count, transposed + (d + 1) * QUERIES, 0.0f);
}

// logits[key] += queries . key, for all keys, of which the buffers hold a multiple of KEY_TILE.
void add_logits(float* logits, const float* queries, const float* keys, int count, int dim) {
    for (int first = 0; first < count; first += KEY_TILE) {
        Vec tile[KEY_TILE][QUERY_VECTORS];
        for (int k = 0; k < KEY_TILE; ++k)
            for (int i = 0; i < QUERY_VECTORS; ++i) tile[k][i] = load(logits + (first + k) * QUERIES + i * LANES);
        for (int d = 0; d < dim; ++d) {
            Vec query[QUERY_VECTORS];
            for (int i = 0; i < QUERY_VECTORS; ++i) query[i] = load(queries + d * QUERIES + i * LANES);
            for (int k = 0; k < KEY_TILE; ++k) {
                const float key = keys[(first + k) * dim + d];
                for (int i = 0; i < QUERY_VECTORS; ++i) tile[k][i] += query[i] * key;
            }
        }
        for (int k = 0; k < KEY_TILE; ++k)
            for (int i = 0; i < QUERY_VECTORS; ++i) store(logits + (first + k) * QUERIES + i * LANES, tile[k][i]);
    }
}

// output[query] = output[query] * factor[query] + sum of weights[key][query] * values[key]; `rows` queries of QUERIES.
void add_values(float* output, const float* factors, const float* weights, const float* values, int rows, int keys,
                int dim) {
    for (int first = 0; first < rows; first += ROW_TILE)
        for (int channel = 0; channel < dim; channel += 2 * LANES) {
            const int second = channel + LANES < dim ? LANES : 0;  // where there is no other half, the same again
            Vec tile[ROW_TILE][2];
            for (int q = 0; q < ROW_TILE; ++q) {
                tile[q][0] = load(output + (first + q) * dim + channel) * factors[first + q];
                tile[q][1] = load(output + (first + q) * dim + channel + second) * factors[first + q];
            }
            for (int k = 0; k < keys; ++k) {
                const Vec left = load(values + k * dim + channel), right = load(values + k * dim + channel + second);
                for (int q = 0; q < ROW_TILE; ++q) {
                    const float weight = weights[k * QUERIES + first + q];
                    tile[q][0] += left * weight;
                    tile[q][1] += right * weight;
                }
            }
            for (int q = 0; q < ROW_TILE; ++q) {
                store(output + (first + q) * dim + channel, tile[q][0]);
                store(output + (first + q) * dim + channel + second, tile[q][1]);
            }
        }
}

// Softmax over keys so far: logits become weights of the new maximum, `factors` what older sums are multiplied by then.
void update_softmax(float* logits, int keys, float* maxima, float* sums, float* factors) {
    for (int i = 0; i < QUERY_VECTORS; ++i) {
        float* column = logits + i * LANES;
        const Vec before = load(maxima + i * LANES);
        Vec highest = before;
        for (int k = 0; k < keys; ++k) highest = maximum(highest, load(column + k * QUERIES));
        // where all keys are blocked so far there is no maximum; any number serves then
        const Vec reference = highest == broadcast(-INFINITY) ? Vec{} : highest;
        const Vec factor = exp(before - reference);
        Vec total = load(sums + i * LANES) * factor;
        for (int k = 0; k < keys; ++k) {
            const Vec weight = exp(load(column + k * QUERIES) - reference);
            store(column + k * QUERIES, weight);
            total += weight;
        }
        store(maxima + i * LANES, highest);
        store(sums + i * LANES, total);
        store(factors + i * LANES, factor);
    }
}

template <typename T>
void window_attention_of(int threads, const T* qkv, const T* qkv_bias, const float* position_bias, T* output,
                         int64_t batch, int height, int width, int heads, int dim, int side, int shift) {
    const int count = side * side, key_room = round_up(count, KEY_TILE), channels = heads * dim;
    const int blocks = (count + QUERIES - 1) / QUERIES;
    const int rows = (height + side - 1) / side, columns = (width + side - 1) / side;
    const int padded_height = rows * side, padded_width = columns * side;

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tokens(count * 3 * channels);  // queries, keys and values of a window
        std::vector<int64_t> place(count);                // of the token in the map; -1 in the padding
        std::vector<int> region(blocks * QUERIES);
        std::vector<float> keys(key_room * dim), values(key_room * dim), queries(dim * QUERIES);
        std::vector<float> logits(key_room * QUERIES), attended(QUERIES * dim);
        const float* query_rows[QUERIES];
        float maxima[QUERIES], sums[QUERIES], factors[QUERIES];

#pragma omp for collapse(3)
        for (int64_t frame = 0; frame < batch; ++frame)
            for (int row = 0; row < rows; ++row)
                for (int column = 0; column < columns; ++column) {
                    for (int i = 0; i < count; ++i) {
                        const int y = row * side + i / side, x = column * side + i % side;  // of the shifted map
                        const int from_y = (y + shift) % padded_height, from_x = (x + shift) % padded_width;
                        const bool inside = from_y < height && from_x < width;
                        place[i] = inside ? (frame * height + from_y) * width + from_x : -1;
                        const T* token = inside ? qkv + place[i] * 3 * channels : qkv_bias;
                        copy_row(&tokens[i * 3 * channels], token, 3 * channels);
                        region[i] = (y >= padded_height - shift ? 2 : 0) + (x >= padded_width - shift ? 1 : 0);
                    }
                    const bool mixed = shift > 0 && (row == rows - 1 || column == columns - 1);

                    for (int head = 0; head < heads; ++head) {
                        for (int k = 0; k < count; ++k) {
                            copy_row(&keys[k * dim], &tokens[(3 * k + 1) * channels + head * dim], dim);
                            copy_row(&values[k * dim], &tokens[(3 * k + 2) * channels + head * dim], dim);
                        }
                        for (int block = 0; block < blocks; ++block) {
                            const int first = block * QUERIES, present = std::min(count - first, QUERIES);
                            const float* bias = position_bias + int64_t(head * blocks + block) * count * QUERIES;
                            std::copy(bias, bias + count * QUERIES, logits.begin());
                            if (mixed)
                                for (int k = 0; k < count; ++k)
                                    for (int q = 0; q < present; ++q)
                                        if (region[k] != region[first + q]) logits[k * QUERIES + q] -= 100;
                            for (int q = 0; q < present; ++q)
                                query_rows[q] = &tokens[3 * (first + q) * channels + head * dim];
                            transpose_queries(queries.data(), query_rows, present, dim);
                            add_logits(logits.data(), queries.data(), keys.data(), count, dim);
                            std::fill(maxima, maxima + QUERIES, -INFINITY);
                            std::fill(sums, sums + QUERIES, 0.0f);
                            update_softmax(logits.data(), count, maxima, sums, factors);
                            std::fill(attended.begin(), attended.end(), 0.0f);
                            add_values(attended.data(), factors, logits.data(), values.data(), present, count, dim);
                            for (int q = 0; q < present; ++q)
                                if (place[first + q] >= 0) {
                                    T* to = output + place[first + q] * channels + head * dim;
                                    const float scale = 1 / sums[q];
                                    for (int d = 0; d < dim; d += LANES)
                                        store(to + d, load(&attended[q * dim + d]) * scale);
                                }
                        }
                    }
                }
    }
}

// Whether a query sees some key: whether a mask logit is not negative.
template <typename T>
bool sees_any(const T* mask_logits, int64_t keys) {
    int seen = 0;
    for (int64_t k = 0; k < keys; ++k) seen |= !(to_float(mask_logits[k]) < 0);
    return seen;
}

// What the softmax of QUERIES queries over keys so far has come to.
struct State {
    float maxima[QUERIES], sums[QUERIES], factors[QUERIES];
    std::vector<float> attended;  // (QUERIES, dim), to be divided by the sums

    explicit State(int dim) : attended(QUERIES * dim) {
        std::fill(maxima, maxima + QUERIES, -INFINITY);
        std::fill(sums, sums + QUERIES, 0.0f);
    }
};

template <typename T>
void masked_attention_of(int threads, const T* query, const T* key, const T* value, const T* mask_logits, T* output,
                         int64_t batch, int queries, int64_t keys, int heads, int dim) {
    const int channels = heads * dim, blocks = (queries + QUERIES - 1) / QUERIES;
    std::vector<float> bias_of_blocked(batch * queries);
    for (int64_t row = 0; row < batch * queries; ++row)
        bias_of_blocked[row] = sees_any(mask_logits + row * keys, keys) ? -INFINITY : 0;
    // a thread goes through the keys once for several heads, whose channels lie side by side
    const int groups = std::min<int>(heads, std::max<int64_t>((threads + batch - 1) / batch, 1));

#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b)
        for (int group = 0; group < groups; ++group) {
            const int first_head = heads * group / groups, last_head = heads * (group + 1) / groups;
            const int group_dim = (last_head - first_head) * dim;
            std::vector<float> rows_of_keys(KEYS * group_dim), head_keys(KEYS * dim), head_values(KEYS * dim);
            std::vector<float> rows_of_values(KEYS * group_dim), logits(KEYS * QUERIES);
            std::vector<float> biases(blocks * KEYS * QUERIES);
            std::vector<float> transposed((last_head - first_head) * blocks * dim * QUERIES);
            std::vector<State> states((last_head - first_head) * blocks, State(dim));
            const auto present_in = [&](int block) { return std::min(queries - block * QUERIES, QUERIES); };

            const T* query_rows[QUERIES];
            for (int head = first_head; head < last_head; ++head)
                for (int block = 0; block < blocks; ++block) {
                    for (int q = 0; q < present_in(block); ++q)
                        query_rows[q] = query + (b * queries + block * QUERIES + q) * channels + head * dim;
                    const int index = (head - first_head) * blocks + block;
                    transpose_queries(&transposed[index * dim * QUERIES], query_rows, present_in(block), dim);
                }

            for (int64_t start = 0; start < keys; start += KEYS) {
                const int count = std::min<int64_t>(keys - start, KEYS);
                for (int k = 0; k < count; ++k) {
                    const int64_t row = (b * keys + start + k) * channels + first_head * dim;
                    copy_row(&rows_of_keys[k * group_dim], key + row, group_dim);
                    copy_row(&rows_of_values[k * group_dim], value + row, group_dim);
                }
                for (int q = 0; q < queries; ++q) {
                    const T* mask = mask_logits + (b * queries + q) * keys + start;
                    float* column = &biases[(q / QUERIES) * KEYS * QUERIES + q % QUERIES];
                    const float bias = bias_of_blocked[b * queries + q];
                    for (int k = 0; k < count; ++k) column[k * QUERIES] = to_float(mask[k]) < 0 ? bias : 0;
                }
                for (int head = first_head; head < last_head; ++head) {
                    const int channel = (head - first_head) * dim;
                    for (int k = 0; k < count; ++k) {
                        copy_row(&head_keys[k * dim], &rows_of_keys[k * group_dim + channel], dim);
                        copy_row(&head_values[k * dim], &rows_of_values[k * group_dim + channel], dim);
                    }
                    for (int block = 0; block < blocks; ++block) {
                        const int index = (head - first_head) * blocks + block;
                        State& state = states[index];
                        const float* bias = &biases[block * KEYS * QUERIES];
                        std::copy(bias, bias + count * QUERIES, logits.begin());
                        add_logits(logits.data(), &transposed[index * dim * QUERIES], head_keys.data(), count, dim);
                        update_softmax(logits.data(), count, state.maxima, state.sums, state.factors);
                        add_values(state.attended.data(), state.factors, logits.data(), head_values.data(),
                                   present_in(block), count, dim);
                    }
                }
            }
            for (int head = first_head; head < last_head; ++head)
                for (int block = 0; block < blocks; ++block) {
                    const State& state = states[(head - first_head) * blocks + block];
                    for (int q = 0; q < present_in(block); ++q) {
                        T* to = output + (b * queries + block * QUERIES + q) * channels + head * dim;
                        const float scale = 1 / state.sums[q];
                        for (int d = 0; d < dim; d += LANES) store(to + d, load(&state.attended[q * dim + d]) * scale);
                    }
                }
        }
}

}  // namespace

// Swin's attention in (shifted) windows of a map, without cutting it up: qkv (batch, height, width, 3 heads dim) to
// output (batch, height, width, heads dim). Tokens beyond the map, whose qkv is the projection's bias, are attended to.
// position_bias is (heads, blocks of QUERIES queries, keys, QUERIES); dim a multiple of LANES.
EXPORT void window_attention(int64_t dtype, int64_t threads, const void* qkv, const void* qkv_bias,
                             const float* position_bias, void* output, int64_t batch, int64_t height, int64_t width,
                             int64_t heads, int64_t dim, int64_t side, int64_t shift) {
    if (dtype == 0)
        window_attention_of<float>(threads, (const float*)qkv, (const float*)qkv_bias, position_bias, (float*)output,
                                   batch, height, width, heads, dim, side, shift);
    else
        window_attention_of<bfloat16>(threads, (const bfloat16*)qkv, (const bfloat16*)qkv_bias, position_bias,
                                      (bfloat16*)output, batch, height, width, heads, dim, side, shift);
}

// Masked attention: query (batch, queries, heads dim), key and value (batch, keys, heads dim), mask_logits (batch,
// queries, keys). A query attends to keys whose logit is not negative, to all where there is none; dim as above.
EXPORT void masked_attention(int64_t dtype, int64_t threads, const void* query, const void* key, const void* value,
                             const void* mask_logits, void* output, int64_t batch, int64_t queries, int64_t keys,
                             int64_t heads, int64_t dim) {
    if (dtype == 0)
        masked_attention_of<float>(threads, (const float*)query, (const float*)key, (const float*)value,
                                   (const float*)mask_logits, (float*)output, batch, queries, keys, heads, dim);
    else
        masked_attention_of<bfloat16>(threads, (const bfloat16*)query, (const bfloat16*)key, (const bfloat16*)value,
                                      (const bfloat16*)mask_logits, (bfloat16*)output, batch, queries, keys, heads,
                                      dim);
}
