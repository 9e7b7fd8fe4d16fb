// Attention of many queries to many keys: in the windows of Swin, and of the decoder's queries to pixels.
//
// Logits are made with queries along the lanes, so that their maximum and sum need no work across lanes and biases are
// read as rows; outputs with channels along the lanes, so that they are stored as they are. Both products keep a tile
// of results in registers and work on words, see vector.h: in bfloat16, logits come from pairs of channels and outputs
// from pairs of keys, whose weights are rounded for it.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "vector.h"

namespace {

constexpr int QUERY_VECTORS = 4;                // at most
constexpr int QUERIES = QUERY_VECTORS * LANES;  // worked on at a time
constexpr int KEY_TILE = 5;                     // keys of whose logits are in registers at a time
constexpr int KEY_STEP = 2 * KEY_TILE;          // keys are filled up to whole tiles and words
constexpr int ROW_TILE = 8;                     // queries of whose outputs are in registers at a time, at most
constexpr int CHANNEL_STEP = 2 * LANES;         // channels of outputs are filled up to it
constexpr int KEYS = 60;                        // of a block of a long sequence; a multiple of KEY_STEP

int round_up(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

int blocks_of(int queries) { return (queries + QUERIES - 1) / QUERIES; }

int vectors_of(int queries) { return std::min((queries + LANES - 1) / LANES, QUERY_VECTORS); }

// --- words

inline Bits load_words(const float* from) { return read<Bits>(from); }

// Of the first `count` numbers, which may be more than there is room for; the rest is zero.
template <typename T>
inline Bits load_words(const T* from, int count) {
    if (count >= LANES * PER_WORD<T>) return read<Bits>(from);
    Bits words = {};
    std::memcpy(&words, from, count * sizeof(T));
    return words;
}

inline void store_words(float* to, Bits words) { write(to, words); }

inline void unpack(Vec (&numbers)[1], Bits words) { numbers[0] = (Vec)words; }

inline void unpack(Vec (&numbers)[2], Bits words) {
    numbers[0] = (Vec)(words << 16);
    numbers[1] = (Vec)(words & 0xffff0000u);
}

inline Bits pack(const Vec (&numbers)[1]) { return (Bits)numbers[0]; }

inline Bits pack(const Vec (&numbers)[2]) {  // rounded to the nearest
    return (((Bits)numbers[0] + 0x8000u) >> 16) | (((Bits)numbers[1] + 0x8000u) & 0xffff0000u);
}

// Lanes FIRST to FIRST + 7 of both, in turn.
template <int FIRST>
inline Bits interleave(Bits a, Bits b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, FIRST, FIRST + 16, FIRST + 1, FIRST + 17, FIRST + 2, FIRST + 18, FIRST + 3,
                                   FIRST + 19, FIRST + 4, FIRST + 20, FIRST + 5, FIRST + 21, FIRST + 6, FIRST + 22,
                                   FIRST + 7, FIRST + 23);
#else
    return __builtin_shuffle(a, b, Int{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23} + FIRST);
#endif
}

// Each round moves the bits of row and lane, one number of eight bits, round by one: four let them change places.
inline void transpose(Bits (&rows)[LANES]) {
    for (int round = 0; round < 4; ++round) {
        Bits mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            mixed[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2]);
            mixed[2 * i + 1] = interleave<8>(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
    }
}

// Words of LANES rows of `count` numbers: use(word, its Bits with a row in each lane).
template <typename T, typename Use>
inline void for_columns(const T* const* rows, int64_t offset, int count, Use use) {
    for (int first = 0; first < count; first += LANES * PER_WORD<T>) {
        Bits words[LANES];
        for (int i = 0; i < LANES; ++i) words[i] = load_words(rows[i] + offset + first, count - first);
        transpose(words);
        const int present = std::min(LANES, (count - first + PER_WORD<T> - 1) / PER_WORD<T>);
        for (int i = 0; i < present; ++i) use(first / PER_WORD<T> + i, words[i]);
    }
}

// Queries' words by channel: (dim / PER_WORD, QUERIES).
template <typename T>
void transpose_queries(float* words, const T* const* rows, int64_t offset, int vectors, int dim) {
    for (int i = 0; i < vectors; ++i)
        for_columns(rows + i * LANES, offset, dim,
                    [&](int word, Bits queries) { store_words(words + word * QUERIES + i * LANES, queries); });
}

// Has the row fetched meanwhile, from where no loop is seen to go.
template <typename T>
inline void prefetch(const T* row, int dim) {
    for (int d = 0; d < dim; d += 64 / int(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

template <typename T>
void copy_row(T* to, const T* from, int dim) {
    for (int d = 0; d < dim; d += LANES) std::memcpy(to + d, from + d, LANES * sizeof(T));
}

// Words of the values of PER_WORD keys by channel, of each 2 LANES channels in the order of a Pair.
inline void pack_values(float* words, const float* const* rows, int64_t offset, int dim) {
    copy_row(words, rows[0] + offset, dim);
}

inline void pack_values(float* words, const bfloat16* const* rows, int64_t offset, int dim) {
    for (int d = 0; d < dim; d += CHANNEL_STEP) {
        const Bits first = load_words(rows[0] + offset + d, dim - d);
        const Bits second = load_words(rows[1] + offset + d, dim - d);
        store_words(words + d, (first & 0xffffu) | (second << 16));
        store_words(words + d + LANES, (first >> 16) | (second & 0xffff0000u));
    }
}

// --- attention of up to QUERIES queries

// What the softmax of queries over keys so far has come to.
struct Softmax {
    float maxima[QUERIES], sums[QUERIES], factors[QUERIES];

    Softmax() {
        std::fill(maxima, maxima + QUERIES, -INFINITY);
        std::fill(sums, sums + QUERIES, 0.0f);
    }
};

// logits[key] = biases[key] + queries . key, for a multiple of KEY_TILE keys, and the maxima of all so far.
template <int VECTORS, typename T>
void make_logits(float* logits, const float* biases, const float* queries, const T* keys, int count, int dim,
                 float* maxima) {
    Vec highest[VECTORS];
    for (int i = 0; i < VECTORS; ++i) highest[i] = load(maxima + i * LANES);
    for (int first = 0; first < count; first += KEY_TILE) {
        Vec tile[KEY_TILE][VECTORS];
        for (int k = 0; k < KEY_TILE; ++k)
            for (int i = 0; i < VECTORS; ++i) tile[k][i] = load(biases + (first + k) * QUERIES + i * LANES);
        int d = 0;
        do {  // at least once: a way round the loop makes the compiler keep the tile twice
            Bits query[VECTORS];
            for (int i = 0; i < VECTORS; ++i) query[i] = load_words(queries + d / PER_WORD<T> * QUERIES + i * LANES);
            for (int k = 0; k < KEY_TILE; ++k) {
                const uint32_t key = word_at(keys + (first + k) * dim + d);
                for (int i = 0; i < VECTORS; ++i) tile[k][i] = add_product(tile[k][i], key, query[i], T{});
            }
        } while ((d += PER_WORD<T>) < dim);
        for (int k = 0; k < KEY_TILE; ++k)
            for (int i = 0; i < VECTORS; ++i) {
                store(logits + (first + k) * QUERIES + i * LANES, tile[k][i]);
                highest[i] = maximum(tile[k][i], highest[i]);
            }
    }
    for (int i = 0; i < VECTORS; ++i) store(maxima + i * LANES, highest[i]);
}

// Logits become words of the weights of PER_WORD keys, 2^(scale * (logit - maximum)). Their sums are kept up, and
// `factors` become what older sums and outputs are multiplied by.
template <typename T>
void weigh(float* logits, int count, int vectors, float scale, const float* older_maxima, Softmax& softmax) {
    const auto power = [](Vec x) { return power_of_two<sizeof(T) < sizeof(float)>(x); };
    for (int i = 0; i < vectors; ++i) {
        float* column = logits + i * LANES;
        const Vec highest = load(softmax.maxima + i * LANES);
        // where all keys are blocked so far there is no maximum; any number serves then
        const Vec base = highest == broadcast(-INFINITY) ? Vec{} : highest, reference = base * scale;
        // exactly 1 where the maximum stays, or the error would grow with each block of keys
        const Vec factor = power_of_two((load(older_maxima + i * LANES) - base) * scale);
        Vec sum = load(softmax.sums + i * LANES) * factor;
        for (int k = 0; k < count; k += PER_WORD<T>) {
            Vec weights[PER_WORD<T>];
            for (int j = 0; j < PER_WORD<T>; ++j) {
                weights[j] = power(load(column + (k + j) * QUERIES) * scale - reference);
                sum += weights[j];
            }
            store_words(column + k / PER_WORD<T> * QUERIES, pack(weights));
        }
        store(softmax.sums + i * LANES, sum);
        store(softmax.factors + i * LANES, factor);
    }
}

// attended[query] = attended[query] * factor[query] + sum of weights[key][query] * values[key], by words of keys.
// Without factors, nothing was attended to before. `room` is the channels, filled up to whole pairs.
template <int ROWS, typename T>
void add_values_to(float* attended, const float* factors, const float* weights, const float* values, int words,
                   int room) {
    for (int channel = 0; channel < room; channel += CHANNEL_STEP) {
        Vec tile[ROWS][2] = {};
        if (factors)
            for (int q = 0; q < ROWS; ++q) {
                tile[q][0] = load(attended + q * room + channel) * factors[q];
                tile[q][1] = load(attended + q * room + channel + LANES) * factors[q];
            }
        for (int k = 0; k < words; ++k) {
            const Bits first = load_words(values + k * room + channel);
            const Bits second = load_words(values + k * room + channel + LANES);
            for (int q = 0; q < ROWS; ++q) {
                const uint32_t weight = word_at(weights + k * QUERIES + q);
                tile[q][0] = add_product(tile[q][0], weight, first, T{});
                tile[q][1] = add_product(tile[q][1], weight, second, T{});
            }
        }
        for (int q = 0; q < ROWS; ++q) {
            store(attended + q * room + channel, tile[q][0]);
            store(attended + q * room + channel + LANES, tile[q][1]);
        }
    }
}

// The same for up to ROWS queries.
template <int ROWS, typename T>
void add_values_to_some(int rows, float* attended, const float* factors, const float* weights, const float* values,
                        int words, int room) {
    if (rows == ROWS)
        add_values_to<ROWS, T>(attended, factors, weights, values, words, room);
    else if constexpr (ROWS > 1)
        add_values_to_some<ROWS - 1, T>(rows, attended, factors, weights, values, words, room);
}

// Adds to softmax and attended values of queries those of a multiple of KEY_STEP keys.
template <typename T>
void attend(int queries, const float* query_words, const float* biases, const T* keys, const float* values, int count,
            int dim, bool is_first, float* logits, Softmax& softmax, float* attended) {
    const int vectors = vectors_of(queries), room = round_up(dim, CHANNEL_STEP);
    float older_maxima[QUERIES];
    std::copy(softmax.maxima, softmax.maxima + QUERIES, older_maxima);
    switch (vectors) {
        case 1: make_logits<1>(logits, biases, query_words, keys, count, dim, softmax.maxima); break;
        case 2: make_logits<2>(logits, biases, query_words, keys, count, dim, softmax.maxima); break;
        case 3: make_logits<3>(logits, biases, query_words, keys, count, dim, softmax.maxima); break;
        default: make_logits<4>(logits, biases, query_words, keys, count, dim, softmax.maxima);
    }
    weigh<T>(logits, count, vectors, 1.44269504f / std::sqrt(float(dim)), older_maxima, softmax);
    const int tiles = (queries + ROW_TILE - 1) / ROW_TILE;
    for (int tile = 0; tile < tiles; ++tile) {  // of as many rows each as can be
        const int first = queries * tile / tiles, rows = queries * (tile + 1) / tiles - first;
        add_values_to_some<ROW_TILE, T>(rows, attended + first * room, is_first ? nullptr : softmax.factors + first,
                                        logits + first, values, count / PER_WORD<T>, room);
    }
}

// What a query attended to, divided by the sum of its weights.
template <typename T>
void finish(T* output, const float* attended, float sum, int dim) {
    const float scale = 1 / sum;
    for (int d = 0; d < dim; d += CHANNEL_STEP) {
        const Pair pair{load(attended + d) * scale, load(attended + d + LANES) * scale};
        if (dim - d >= CHANNEL_STEP) {
            store_pair(output + d, pair);
        } else {
            T part[CHANNEL_STEP];
            store_pair(part, pair);
            std::memcpy(output + d, part, LANES * sizeof(T));
        }
    }
}

// Biases of LANES queries from `query` on, as `attend` adds them to logits that are not divided by sqrt(dim) yet: from
// (queries, keys, heads) to (heads, blocks of QUERIES queries, key_room, QUERIES). Keys beyond `count` get no weight.
template <typename T>
void lay_out_biases(float* biases, const T* position_bias, int query, int count, int key_room, int heads, int dim) {
    const T* rows[LANES];  // the last again in lanes that are left
    for (int i = 0; i < LANES; ++i) rows[i] = position_bias + std::min(query + i, count - 1) * count * heads;
    const auto place = [&](int key, int head) {
        return biases + ((head * blocks_of(count) + query / QUERIES) * int64_t(key_room) + key) * QUERIES +
               query % QUERIES;
    };
    const float scale = std::sqrt(float(dim));
    for_columns(rows, 0, count * heads, [&](int word, Bits words) {
        Vec numbers[PER_WORD<T>];
        unpack(numbers, words);
        for (int j = 0; j < PER_WORD<T>; ++j) {
            const int column = word * PER_WORD<T> + j;
            if (column < count * heads) store(place(column / heads, column % heads), numbers[j] * scale);
        }
    });
    for (int head = 0; head < heads; ++head)
        for (int key = count; key < key_room; ++key) store(place(key, head), broadcast(-INFINITY));
}

template <typename T>
void window_attention_of(int threads, const T* qkv, const T* qkv_bias, const T* position_bias, T* output,
                         int64_t batch, int height, int width, int heads, int dim, int side, int shift) {
    const int count = side * side, key_room = round_up(count, KEY_STEP), channels = heads * dim;
    const int blocks = blocks_of(count), room = std::max(key_room, blocks * QUERIES);
    const int dim_room = round_up(dim, CHANNEL_STEP);
    const int rows = (height + side - 1) / side, columns = (width + side - 1) / side;
    const int padded_height = rows * side, padded_width = columns * side;
    const Vec other_region = broadcast(-100 * std::sqrt(float(dim)));  // what is added to logits of another region
    const std::vector<T> zeros(3 * channels);
    const std::unique_ptr<float[]> all_biases(new float[int64_t(heads) * blocks * key_room * QUERIES]);

#pragma omp parallel num_threads(threads)
    {
        std::vector<const T*> tokens(room, zeros.data());  // queries, keys and values of a window
        std::vector<int64_t> place(count);                 // of the token in the map; -1 in the padding
        std::vector<float> region(room);
        std::vector<T> keys(key_room * dim);
        std::vector<float> values(key_room / PER_WORD<T> * dim_room), queries(dim / PER_WORD<T> * QUERIES);
        std::vector<float> biases(key_room * QUERIES), logits(key_room * QUERIES), attended(QUERIES * dim_room);

#pragma omp for
        for (int query = 0; query < count; query += LANES)
            lay_out_biases(all_biases.get(), position_bias, query, count, key_room, heads, dim);

#pragma omp for collapse(3)
        for (int64_t frame = 0; frame < batch; ++frame)
            for (int row = 0; row < rows; ++row)
                for (int column = 0; column < columns; ++column) {
                    for (int i = 0; i < count; ++i) {
                        const int y = row * side + i / side, x = column * side + i % side;  // of the shifted map
                        const int from_y = (y + shift) % padded_height, from_x = (x + shift) % padded_width;
                        const bool inside = from_y < height && from_x < width;
                        place[i] = inside ? (frame * height + from_y) * width + from_x : -1;
                        tokens[i] = inside ? qkv + place[i] * 3 * channels : qkv_bias;
                        region[i] = (y >= padded_height - shift ? 2 : 0) + (x >= padded_width - shift ? 1 : 0);
                    }
                    const bool mixed = shift > 0 && (row == rows - 1 || column == columns - 1);

                    for (int head = 0; head < heads; ++head) {
                        const int query_at = head * dim, key_at = query_at + channels, value_at = key_at + channels;
                        if (head + 1 < heads)
                            for (int i = 0; i < count; ++i)
                                for (const int at : {query_at, key_at, value_at}) prefetch(tokens[i] + at + dim, dim);
                        for (int k = 0; k < key_room; ++k) copy_row(&keys[k * dim], tokens[k] + key_at, dim);
                        for (int k = 0; k < key_room; k += PER_WORD<T>)
                            pack_values(&values[k / PER_WORD<T> * dim_room], &tokens[k], value_at, dim);
                        for (int block = 0; block < blocks; ++block) {
                            const int first = block * QUERIES, present = std::min(count - first, QUERIES);
                            const int vectors = vectors_of(present);
                            const float* bias = &all_biases[int64_t(head * blocks + block) * key_room * QUERIES];
                            if (mixed) {
                                for (int k = 0; k < key_room; ++k)
                                    for (int q = 0; q < vectors * LANES; q += LANES) {
                                        const auto same = load(&region[first + q]) == broadcast(region[k]);
                                        const Vec added = same ? Vec{} : other_region;
                                        store(&biases[k * QUERIES + q], load(bias + k * QUERIES + q) + added);
                                    }
                                bias = biases.data();
                            }
                            transpose_queries(queries.data(), &tokens[first], query_at, vectors, dim);
                            Softmax softmax;
                            attend(present, queries.data(), bias, keys.data(), values.data(), key_room, dim, true,
                                   logits.data(), softmax, attended.data());
                            for (int q = 0; q < present; ++q)
                                if (place[first + q] >= 0)
                                    finish(output + place[first + q] * channels + query_at, &attended[q * dim_room],
                                           softmax.sums[q], dim);
                        }
                    }
                }
    }
}

// Whether a query sees some key: whether a mask logit is not negative.
template <typename T>
bool sees_any(const T* mask_logits, int64_t keys) {
    constexpr int64_t STRETCH = 512;  // without a branch
    for (int64_t start = 0; start < keys; start += STRETCH) {
        int seen = 0;
        for (int64_t k = start; k < std::min(start + STRETCH, keys); ++k) seen |= !(to_float(mask_logits[k]) < 0);
        if (seen) return true;
    }
    return false;
}

template <typename T>
void masked_attention_of(int threads, const T* query, const T* key, const T* value, const T* mask_logits, T* output,
                         int64_t batch, int queries, int64_t keys, int heads, int dim) {
    const int channels = heads * dim, blocks = blocks_of(queries), dim_room = round_up(dim, CHANNEL_STEP);
    const int lanes = round_up(queries, LANES);
    const int key_room = round_up(KEYS, LANES * PER_WORD<T>);  // of biases, which are made of whole vectors
    const auto present_in = [&](int block) { return std::min(queries - block * QUERIES, QUERIES); };
    const std::vector<T> zeros(dim);
    std::vector<float> bias_of_blocked(batch * lanes);
    // a thread goes through the keys once for several heads, whose channels lie side by side
    const int groups = std::min<int>(heads, std::max<int64_t>((threads + batch - 1) / batch, 1));

#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int q = 0; q < queries; ++q)
                bias_of_blocked[b * lanes + q] = sees_any(mask_logits + (b * queries + q) * keys, keys) ? -INFINITY : 0;

#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int group = 0; group < groups; ++group) {
                const int first_head = heads * group / groups, group_heads = heads * (group + 1) / groups - first_head;
                std::vector<T> head_keys(KEYS * dim);
                std::vector<float> head_values(KEYS / PER_WORD<T> * dim_room), logits(KEYS * QUERIES);
                std::vector<float> biases(blocks * key_room * QUERIES);
                const int query_size = dim / PER_WORD<T> * QUERIES, attended_size = QUERIES * dim_room;
                std::vector<float> query_words(group_heads * blocks * query_size);
                std::vector<float> attended(group_heads * blocks * attended_size);
                std::vector<Softmax> softmaxes(group_heads * blocks);

                std::vector<const T*> query_rows(lanes), mask_rows(lanes);  // the last again in lanes that are left
                for (int q = 0; q < lanes; ++q) {
                    const int64_t row = b * queries + std::min(q, queries - 1);
                    query_rows[q] = query + row * channels;
                    mask_rows[q] = mask_logits + row * keys;
                }
                for (int head = 0; head < group_heads; ++head)
                    for (int block = 0; block < blocks; ++block)
                        transpose_queries(&query_words[(head * blocks + block) * query_size],
                                          &query_rows[block * QUERIES], (first_head + head) * dim,
                                          vectors_of(present_in(block)), dim);

                for (int64_t start = 0; start < keys; start += KEYS) {
                    const int count = std::min<int64_t>(keys - start, KEYS), filled = round_up(count, KEY_STEP);
                    for (int q = 0; q < lanes; q += LANES) {
                        float* column = &biases[q / QUERIES * key_room * QUERIES + q % QUERIES];
                        const Vec blocked = load(&bias_of_blocked[b * lanes + q]);
                        for_columns(&mask_rows[q], start, count, [&](int word, Bits words) {
                            Vec masks[PER_WORD<T>];
                            unpack(masks, words);
                            for (int j = 0; j < PER_WORD<T>; ++j)
                                store(column + (word * PER_WORD<T> + j) * QUERIES, masks[j] < 0 ? blocked : Vec{});
                        });
                        for (int k = count; k < filled; ++k) store(column + k * QUERIES, broadcast(-INFINITY));
                    }
                    for (int head = 0; head < group_heads; ++head) {
                        const T *key_rows[KEYS], *value_rows[KEYS];
                        for (int k = 0; k < filled; ++k) {
                            const int64_t row = (b * keys + start + k) * channels + (first_head + head) * dim;
                            key_rows[k] = k < count ? key + row : zeros.data();
                            value_rows[k] = k < count ? value + row : zeros.data();
                            if (start + KEYS + k < keys) {
                                prefetch(key + row + KEYS * channels, dim);
                                prefetch(value + row + KEYS * channels, dim);
                            }
                        }
                        for (int k = 0; k < filled; ++k) copy_row(&head_keys[k * dim], key_rows[k], dim);
                        for (int k = 0; k < filled; k += PER_WORD<T>)
                            pack_values(&head_values[k / PER_WORD<T> * dim_room], &value_rows[k], 0, dim);
                        for (int block = 0; block < blocks; ++block) {
                            const int index = head * blocks + block;
                            attend(present_in(block), &query_words[index * query_size],
                                   &biases[block * key_room * QUERIES], head_keys.data(), head_values.data(), filled,
                                   dim, start == 0, logits.data(), softmaxes[index], &attended[index * attended_size]);
                        }
                    }
                }
                for (int head = 0; head < group_heads; ++head)
                    for (int q = 0; q < queries; ++q) {
                        const int index = head * blocks + q / QUERIES, row = q % QUERIES;
                        finish(output + (b * queries + q) * channels + (first_head + head) * dim,
                               &attended[index * attended_size + row * dim_room], softmaxes[index].sums[row], dim);
                    }
            }
    }
}

}  // namespace

// Swin's attention in (shifted) windows of a map, without cutting it up: qkv (batch, height, width, 3 heads dim) to
// output (batch, height, width, heads dim). Tokens beyond the map, whose qkv is the projection's bias, are attended to.
// position_bias is (queries, keys, heads), each side * side of them; dim is a multiple of LANES.
EXPORT void window_attention(int64_t dtype, int64_t threads, const void* qkv, const void* qkv_bias,
                             const void* position_bias, void* output, int64_t batch, int64_t height, int64_t width,
                             int64_t heads, int64_t dim, int64_t side, int64_t shift) {
    if (dtype == 0)
        window_attention_of<float>(threads, (const float*)qkv, (const float*)qkv_bias, (const float*)position_bias,
                                   (float*)output, batch, height, width, heads, dim, side, shift);
    else
        window_attention_of<bfloat16>(threads, (const bfloat16*)qkv, (const bfloat16*)qkv_bias,
                                      (const bfloat16*)position_bias, (bfloat16*)output, batch, height, width, heads,
                                      dim, side, shift);
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
