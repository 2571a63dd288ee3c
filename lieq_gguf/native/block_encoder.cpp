// Encodes blocks for the output of a matrix. block_encoder.py says what for.
//
// Rows of the matrix lie side by side in the lanes of vectors, since each is encoded on its own. Loops over lanes have a
// constant length and no branches, so that compilers turn them into vector instructions without help.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int N_LANES = 32;
constexpr int MOST_COLUMNS = 256;
constexpr int MOST_PARTS = 16;
constexpr int TOGETHER = 8;  // columns that are multiplied together, and weights of a codebook entry
constexpr float LEAST_FACTOR = 0.8f;  // of a block's scale
constexpr float MOST_HALF = 65504.0f;

using Lanes = float[N_LANES];

// As in code_layouts.py; most_scale and most_minimum are 0 if the parts have none.
struct Layout {
    int32_t n_columns, n_parts, n_entries, entry_width, n_signs, n_deltas, n_factors, most_scale, most_minimum;
    float unit, first;
    const float* entries;
};

struct Problem {
    int64_t n_rows;
    const float *exact, *before, *wanted;          // [n_columns][n_rows]
    const float *moments, *coupling;               // [n_columns][n_columns]
    const float *pivots, *importance;              // [n_columns]
};

struct Blocks {
    uint32_t* codes;                               // [n_rows][n_codes]
    float *scales, *minima, *factors, *deltas;     // [n_rows][n_parts] twice, [n_rows][2], [n_rows][n_deltas]
    float* decoded;                                // [n_columns][n_rows]
};

// The same blocks of a few rows, and what is found out about them.
struct Tile {
    Lanes exact[MOST_COLUMNS], before[MOST_COLUMNS], wanted[MOST_COLUMNS];
    Lanes level[MOST_COLUMNS], delta[MOST_COLUMNS], found[MOST_COLUMNS], product[MOST_COLUMNS];
    Lanes scale[MOST_PARTS], minimum[MOST_PARTS], factor[2];
    uint32_t code[MOST_COLUMNS][N_LANES];
};

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The nearest half-precision number, ties to even; numbers out of its range become the largest.
float to_half(float x) {
    const float size = std::min(std::fabs(x), MOST_HALF);
    const uint32_t bits = bits_of(size);
    const float normal = float_of((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
    const float small = std::nearbyint(size * 16777216.0f) / 16777216.0f;  // below 2^-14 they are 2^-24 apart
    return std::copysign(size < 6.103515625e-5f ? small : normal, x);
}

// Adds the products of N columns of a matrix [n][stride], from the given one, with rows of lanes.
template <int N>
void add_products(const float* matrix, int stride, const Lanes* rows, int n, Lanes* sums) {
    float sum[N][N_LANES];
    for (int j = 0; j < N; ++j)
        for (int r = 0; r < N_LANES; ++r) sum[j][r] = sums[j][r];
    for (int i = 0; i < n; ++i) {
        const float* numbers = matrix + static_cast<int64_t>(i) * stride;
        for (int j = 0; j < N; ++j) {
            const float number = numbers[j];
            for (int r = 0; r < N_LANES; ++r) sum[j][r] += number * rows[i][r];
        }
    }
    for (int j = 0; j < N; ++j)
        for (int r = 0; r < N_LANES; ++r) sums[j][r] = sum[j][r];
}

class Encoder {
  public:
    Encoder(const Layout& layout, const Problem& problem)
        : layout_(layout),
          problem_(problem),
          n_(layout.n_columns),
          width_(layout.n_columns / layout.n_parts),
          n_together_(layout.entry_width > 1 ? TOGETHER : 1),
          has_minima_(layout.n_factors > 1),
          tile_(new Tile()),
          columns_(layout.n_entries * layout.entry_width),
          weighted_(layout.n_entries * (layout.entry_width + 1)),
          sums_(layout.n_parts) {
        while (1 << index_bits_ < layout.n_entries) ++index_bits_;
        is_even_ = layout.entry_width == 1;
        for (int e = 1; e < layout.n_entries && is_even_; ++e) is_even_ = entry(e) - entry(e - 1) == 1;
        for (int e = 0; e < layout.n_entries; ++e)
            for (int j = 0; j < layout.entry_width; ++j)
                columns_[j * layout.n_entries + e] = entry(e * layout.entry_width + j);
        for (int part = 0; part < layout.n_parts; ++part)
            for (int i = part * width_; i < (part + 1) * width_; ++i)
                for (int j = part * width_; j < (part + 1) * width_; ++j) sums_[part] += problem.moments[i * n_ + j];
    }

    void run(const Blocks& blocks, bool from_start, int n_rounds) {
        for (int64_t row = 0; row < problem_.n_rows; row += N_LANES) {
            const int n_rows = static_cast<int>(std::min<int64_t>(N_LANES, problem_.n_rows - row));
            load(blocks, row, n_rows);
            if (from_start)
                choose_scales();
            else
                find_start();
            for (int round = 0; round < n_rounds; ++round) {
                choose_codes();
                choose_scales();
            }
            store(blocks, row, n_rows);
        }
    }

  private:
    const Layout& layout_;
    const Problem& problem_;
    const int n_, width_, n_together_;
    const bool has_minima_;
    int index_bits_ = 0;
    bool is_even_;
    std::unique_ptr<Tile> tile_;
    std::vector<float> columns_;   // of the codebook, [entry_width][n_entries]
    std::vector<float> weighted_;  // the same times importance, and minus half of what each entry weighs
    std::vector<float> sums_;      // of the moments inside each part

    float entry(int e) const { return layout_.entries[e]; }

    float coupled(int i, int j) const { return problem_.coupling[i * n_ + j]; }

    void load(const Blocks& blocks, int64_t row, int n_rows) {
        Tile& t = *tile_;
        std::memset(static_cast<void*>(&t), 0, sizeof t);  // lanes without a row have weights of zero
        for (int c = 0; c < n_; ++c)
            for (int r = 0; r < n_rows; ++r) {
                const int64_t at = c * problem_.n_rows + row + r;
                t.exact[c][r] = problem_.exact[at];
                t.before[c][r] = problem_.before[at];
                t.wanted[c][r] = problem_.wanted[at];
            }
        const int n_codes = n_ / n_together_, of_delta = layout_.n_deltas ? n_ / layout_.n_deltas : n_;
        for (int r = 0; r < n_rows; ++r) {
            for (int part = 0; part < layout_.n_parts; ++part) {
                t.scale[part][r] = blocks.scales[(row + r) * layout_.n_parts + part];
                t.minimum[part][r] = blocks.minima[(row + r) * layout_.n_parts + part];
            }
            for (int which = 0; which < 2; ++which) t.factor[which][r] = blocks.factors[(row + r) * 2 + which];
            if (layout_.n_deltas)
                for (int c = 0; c < n_; ++c)
                    t.delta[c][r] = blocks.deltas[(row + r) * layout_.n_deltas + c / of_delta];
            for (int k = 0; k < n_codes; ++k) {
                t.code[k][r] = blocks.codes[(row + r) * n_codes + k];
                read_levels(t.code[k][r], k * n_together_, r);
            }
        }
    }

    void store(const Blocks& blocks, int64_t row, int n_rows) {
        Tile& t = *tile_;
        decode();
        const int n_codes = n_ / n_together_;
        for (int c = 0; c < n_; ++c)
            for (int r = 0; r < n_rows; ++r) blocks.decoded[c * problem_.n_rows + row + r] = t.found[c][r];
        for (int r = 0; r < n_rows; ++r) {
            for (int k = 0; k < n_codes; ++k) blocks.codes[(row + r) * n_codes + k] = t.code[k][r];
            for (int part = 0; part < layout_.n_parts; ++part) {
                blocks.scales[(row + r) * layout_.n_parts + part] = t.scale[part][r];
                blocks.minima[(row + r) * layout_.n_parts + part] = t.minimum[part][r];
            }
            for (int which = 0; which < 2; ++which) blocks.factors[(row + r) * 2 + which] = t.factor[which][r];
        }
    }

    void read_levels(uint32_t code, int column, int r) {
        if (n_together_ == 1) {
            tile_->level[column][r] = entry(static_cast<int>(code));
            return;
        }
        const int n_indices = TOGETHER / layout_.entry_width;
        const uint32_t mask = (1u << index_bits_) - 1, signs = code >> n_indices * index_bits_;
        int n_negative = 0;
        for (int j = 0; j < TOGETHER; ++j) {
            const uint32_t index = code >> j / layout_.entry_width * index_bits_ & mask;
            bool is_negative = j < layout_.n_signs && (signs >> j & 1);
            if (layout_.n_signs == 7 && j == 7) is_negative = n_negative % 2;
            n_negative += is_negative;
            const float level = entry(static_cast<int>(index) * layout_.entry_width + j % layout_.entry_width);
            tile_->level[column + j][r] = is_negative ? -level : level;
        }
    }

    // The weights that the blocks stand for, or the part of them without minima, or that of minima.
    void decode(bool with_levels = true, bool with_minima = true) {
        Tile& t = *tile_;
        const float levels = with_levels ? 1.0f : 0.0f, minima = with_minima ? 1.0f : 0.0f;
        for (int c = 0; c < n_; ++c) {
            const int part = c / width_;
            for (int r = 0; r < N_LANES; ++r) {
                const float step = t.factor[0][r] * (layout_.unit * (layout_.first + t.scale[part][r]));
                t.found[c][r] = levels * step * (t.level[c][r] + t.delta[c][r]) -
                                minima * t.factor[1][r] * t.minimum[part][r];
            }
        }
    }

    void multiply(const Lanes* rows) {
        Tile& t = *tile_;
        std::memset(t.product, 0, sizeof(Lanes) * n_);
        for (int c = 0; c < n_; c += TOGETHER)
            add_products<TOGETHER>(problem_.moments + c, n_, rows, n_, t.product + c);
    }

    // Scales and minima with which each part alone comes closest to what is wanted, by trying some steps.
    void find_start() {
        Tile& t = *tile_;
        Lanes steps[MOST_PARTS], lows[MOST_PARTS], of_steps[MOST_PARTS], of_lows[MOST_PARTS];
        for (int part = 0; part < layout_.n_parts; ++part) {
            Lanes size = {}, low = {}, high = {}, least = {};
            for (int c = part * width_; c < (part + 1) * width_; ++c)
                for (int r = 0; r < N_LANES; ++r) {
                    size[r] += t.wanted[c][r] * t.wanted[c][r] / width_;
                    low[r] = std::min(low[r], t.wanted[c][r]);
                    high[r] = std::max(high[r], t.wanted[c][r]);
                }
            for (Lanes* lanes : {steps, lows, of_steps, of_lows}) std::memset(lanes[part], 0, sizeof(Lanes));
            const Fit best{least, steps[part], lows[part], of_steps[part], of_lows[part]};
            Lanes step, from = {};
            if (has_minima_) {
                for (float share : {1.0f, 0.7f})  // the lowest level may lie above the lowest weight
                    for (float more : {-1.0f, -0.5f, 0.0f, 0.5f}) {
                        for (int r = 0; r < N_LANES; ++r) {
                            from[r] = share * low[r];
                            step[r] = (high[r] - from[r]) / (static_cast<float>(layout_.n_entries - 1) + more);
                        }
                        try_step(part, step, from, best);
                    }
                continue;
            }
            for (float factor : spreads()) {
                for (int r = 0; r < N_LANES; ++r)
                    step[r] = factor * (n_together_ > 1 ? std::sqrt(size[r]) : std::max(high[r], -low[r]));
                try_step(part, step, from, best);
                if (n_together_ > 1) continue;  // the signs of codes make those of steps superfluous
                for (int r = 0; r < N_LANES; ++r) step[r] = -step[r];
                try_step(part, step, from, best);
            }
        }
        for (int r = 0; r < N_LANES; ++r) {
            t.factor[0][r] = steps[0][r];
            t.factor[1][r] = -lows[0][r];
            if (layout_.most_scale) {
                const float step = best_unit(steps, of_steps, r, layout_.first, layout_.most_scale);
                t.factor[0][r] = step / layout_.unit;
                for (int part = 0; part < layout_.n_parts; ++part)
                    t.scale[part][r] = number(steps[part][r], step, layout_.first, layout_.most_scale);
            }
            if (layout_.most_minimum) {
                t.factor[1][r] = -best_unit(lows, of_lows, r, 0, layout_.most_minimum);
                for (int part = 0; part < layout_.n_parts; ++part)
                    t.minimum[part][r] = number(lows[part][r], -t.factor[1][r], 0, layout_.most_minimum);
            }
            for (int which = 0; which < 2; ++which) t.factor[which][r] = to_half(t.factor[which][r]);
        }
    }

    // Steps to try: as shares of the root mean square of eight weights, or of the largest weight.
    std::vector<float> spreads() const {
        std::vector<float> result;
        const auto add = [&](float low, float high, int n, float unit) {
            for (int i = 0; i < n; ++i) result.push_back((low + (high - low) * i / (n - 1)) / unit);
        };
        if (n_together_ > 1) {
            double square = 0;
            const int n = layout_.n_entries * layout_.entry_width;
            for (int i = 0; i < n; ++i) square += entry(i) * entry(i) / n;
            const float unit = static_cast<float>(std::sqrt(square));
            if (layout_.entry_width == 8)
                add(0.85f, 1.25f, 3, unit);
            else
                add(0.9f, 1.6f, 5, unit);
        } else {
            const float unit = std::max(-entry(0), entry(layout_.n_entries - 1));
            if (layout_.n_entries <= 4)
                add(0.5f, 2.2f, 12, unit);
            else if (layout_.n_entries <= 16)
                add(0.65f, 1.1f, 8, unit);
            else
                add(0.95f, 1.05f, 11, unit);
        }
        return result;
    }

    // The best so far, for every row: what it gains, step and lowest level of a part, and what an error in them costs.
    struct Fit {
        float *gain, *step, *low, *of_step, *of_low;
    };

    // Levels for a step and a lowest level, and by least squares the step and the lowest level that fit them best.
    void try_step(int part, const Lanes& step, const Lanes& from, const Fit& best) {
        Tile& t = *tile_;
        Lanes levels = {}, squares = {}, wanted = {}, products = {};  // sums over the part, weighted
        float weight = 0;
        for (int c = part * width_; c < (part + 1) * width_; c += n_together_) {
            Lanes values[TOGETHER] = {};
            for (int j = 0; j < n_together_; ++j)
                for (int r = 0; r < N_LANES; ++r)
                    values[j][r] = step[r] != 0 ? (t.wanted[c + j][r] - from[r]) / step[r] : 0;
            if (n_together_ > 1)
                nearest_entries(c, problem_.importance + c, values);
            else
                nearest_level(c, values[0]);
            for (int j = 0; j < n_together_; ++j) {
                const float importance = problem_.importance[c + j];
                weight += importance;
                for (int r = 0; r < N_LANES; ++r) {
                    const float level = t.level[c + j][r], exact = t.wanted[c + j][r];
                    levels[r] += importance * level;
                    squares[r] += importance * level * level;
                    wanted[r] += importance * exact;
                    products[r] += importance * level * exact;
                }
            }
        }
        for (int r = 0; r < N_LANES; ++r) {
            float fitted = squares[r] > 0 ? products[r] / squares[r] : 0, low = 0;
            const float determinant = weight * squares[r] - levels[r] * levels[r];
            if (has_minima_ && determinant > 0) {
                const float offset = (squares[r] * wanted[r] - levels[r] * products[r]) / determinant;
                if (offset <= 0 || !layout_.most_minimum) {  // numbers of minima are not negative
                    low = offset;
                    fitted = (weight * products[r] - levels[r] * wanted[r]) / determinant;
                }
            }
            const float gain = 2 * (fitted * products[r] + low * wanted[r]) - fitted * fitted * squares[r] -
                               2 * fitted * low * levels[r] - low * low * weight;
            if (gain > best.gain[r]) {
                best.gain[r] = gain;
                best.step[r] = fitted;
                best.low[r] = low;
                best.of_step[r] = squares[r];
                best.of_low[r] = weight;
            }
        }
    }

    static float number(float wanted, float unit, float first, int most) {
        if (unit == 0) return 0;
        return std::min(std::max(std::nearbyint(wanted / unit - first), 0.0f), static_cast<float>(most));
    }

    // The unit whose multiples, from ``first`` on, come closest to what the parts of a row want.
    float best_unit(const Lanes* wanted, const Lanes* weights, int r, float first, int most) const {
        float largest = 0;
        for (int part = 0; part < layout_.n_parts; ++part)
            if (std::fabs(wanted[part][r]) > std::fabs(largest)) largest = wanted[part][r];
        float best = largest / (first < 0 ? first : first + static_cast<float>(most)), least = INFINITY;
        const float reaching = best;
        for (float factor : {0.96f, 1.0f, 1.04f, 1.08f, 1.12f, 1.16f, 1.2f}) {
            float along = 0, length = 0, error = 0;
            for (int part = 0; part < layout_.n_parts; ++part) {
                const float n = first + number(wanted[part][r], factor * reaching, first, most);
                along += weights[part][r] * n * wanted[part][r];
                length += weights[part][r] * n * n;
            }
            const float unit = length > 0 ? along / length : 0;
            for (int part = 0; part < layout_.n_parts; ++part) {
                const float off = wanted[part][r] - unit * (first + number(wanted[part][r], unit, first, most));
                error += weights[part][r] * off * off;
            }
            if (error < least) {
                least = error;
                best = unit;
            }
        }
        return best;
    }

    void choose_scales() {
        choose_factor();
        if (layout_.most_scale) {
            choose_parts();
            choose_factor();
        }
    }

    // The factors that are best for every block: of its weights without minima, and of the minima.
    void choose_factor() {
        Tile& t = *tile_;
        Lanes along[2] = {}, square[2] = {}, mixed = {};
        for (int which = 0; which < layout_.n_factors; ++which) {
            decode(which == 0, which == 1);
            multiply(t.found);
            for (int c = 0; c < n_; ++c)
                for (int r = 0; r < N_LANES; ++r) {
                    along[which][r] += t.product[c][r] * t.wanted[c][r];
                    square[which][r] += t.product[c][r] * t.found[c][r];
                }
        }
        if (has_minima_) {  // the product is that of the minima here
            decode(true, false);
            for (int c = 0; c < n_; ++c)
                for (int r = 0; r < N_LANES; ++r) mixed[r] += t.product[c][r] * t.found[c][r];
        }
        for (int r = 0; r < N_LANES; ++r) {
            const float determinant = square[0][r] * square[1][r] - mixed[r] * mixed[r];
            float by[2];
            if (determinant > 1e-3f * square[0][r] * square[1][r]) {
                by[0] = (along[0][r] * square[1][r] - along[1][r] * mixed[r]) / determinant;
                by[1] = (along[1][r] * square[0][r] - along[0][r] * mixed[r]) / determinant;
            } else {  // one factor for both
                const float all = square[0][r] + square[1][r] + 2 * mixed[r];
                by[0] = by[1] = all > 0 ? (along[0][r] + along[1][r]) / all : 1;
            }
            for (int which = 0; which < 2; ++which)
                t.factor[which][r] =
                    to_half(t.factor[which][r] * std::min(std::max(by[which], LEAST_FACTOR), 1 / LEAST_FACTOR));
        }
    }

    // Every part's scale and minimum changed by one at most, the parts in order.
    void choose_parts() {
        Tile& t = *tile_;
        decode();
        for (int c = 0; c < n_; ++c)
            for (int r = 0; r < N_LANES; ++r) t.found[c][r] -= t.wanted[c][r];
        multiply(t.found);
        Lanes* pull = t.product;
        Lanes unit[MOST_COLUMNS], weighted[MOST_COLUMNS];
        for (int part = 0; part < layout_.n_parts; ++part) {
            const int begin = part * width_, end = begin + width_;
            const float* inside = problem_.moments + begin * n_ + begin;
            for (int c = 0; c < width_; ++c)
                for (int r = 0; r < N_LANES; ++r)
                    unit[c][r] = t.factor[0][r] * layout_.unit * (t.level[begin + c][r] + t.delta[begin + c][r]);
            std::memset(weighted, 0, sizeof(Lanes) * width_);
            for (int c = 0; c < width_; c += TOGETHER)
                add_products<TOGETHER>(inside + c, n_, unit, width_, weighted + c);
            Lanes pulled = {}, pulled_all = {}, square = {}, mixed = {}, minimum_square, change = {}, change_all = {};
            for (int c = 0; c < width_; ++c)
                for (int r = 0; r < N_LANES; ++r) {
                    pulled[r] += unit[c][r] * pull[begin + c][r];
                    pulled_all[r] += pull[begin + c][r];
                    square[r] += unit[c][r] * weighted[c][r];
                    mixed[r] += weighted[c][r];
                }
            Lanes least = {};  // no change is worth nothing
            for (int r = 0; r < N_LANES; ++r) {
                const float by = -t.factor[1][r];
                pulled_all[r] *= by;
                mixed[r] *= by;
                minimum_square[r] = by * by * sums_[part];
            }
            const int reach = layout_.most_minimum ? 1 : 0;
            for (int up : {0, -1, 1})
                for (int raise : {0, -1, 1}) {
                    if (std::abs(raise) > reach) continue;
                    const float most_scale = static_cast<float>(layout_.most_scale);
                    const float most_minimum = reach ? static_cast<float>(layout_.most_minimum) : 1;
                    for (int r = 0; r < N_LANES; ++r) {
                        const float scale = t.scale[part][r] + up, minimum = t.minimum[part][r] + raise;
                        const float cost = 2 * (up * pulled[r] + raise * pulled_all[r]) + up * up * square[r] +
                                           2 * up * raise * mixed[r] + raise * raise * minimum_square[r];
                        const bool is_better = (cost < least[r]) & (scale >= 0) & (scale <= most_scale) &
                                               (minimum >= 0) & (minimum <= most_minimum);
                        least[r] = is_better ? cost : least[r];
                        change[r] = is_better ? up : change[r];
                        change_all[r] = is_better ? raise : change_all[r];
                    }
                }
            for (int r = 0; r < N_LANES; ++r) {
                t.scale[part][r] += change[r];
                t.minimum[part][r] += change_all[r];
                change_all[r] *= -t.factor[1][r];
            }
            for (int c = 0; c < width_; ++c)
                for (int r = 0; r < N_LANES; ++r) unit[c][r] = change[r] * unit[c][r] + change_all[r];
            for (int c = end; c < n_; c += TOGETHER)
                add_products<TOGETHER>(problem_.moments + begin * n_ + c, n_, unit, width_, pull + c);
        }
    }

    // Codes in the order of the columns; each makes good what the codes before it have left.
    void choose_codes() {
        Tile& t = *tile_;
        Lanes* errors = t.product;
        Lanes wanted[TOGETHER];
        for (int begin = 0; begin < n_; begin += TOGETHER) {
            for (int j = 0; j < TOGETHER; ++j)
                for (int r = 0; r < N_LANES; ++r) wanted[j][r] = t.before[begin + j][r];
            add_products<TOGETHER>(problem_.coupling + begin, n_, errors, begin, wanted);
            if (n_together_ > 1) {
                choose_entries(begin, wanted);
                continue;
            }
            for (int j = 0; j < TOGETHER; ++j) {
                for (int i = 0; i < j; ++i) {
                    const float share = coupled(begin + i, begin + j);
                    for (int r = 0; r < N_LANES; ++r) wanted[j][r] += share * errors[begin + i][r];
                }
                for (int r = 0; r < N_LANES; ++r) wanted[j][r] += t.exact[begin + j][r];
                Lanes value;
                in_steps(begin + j, wanted[j], value);
                nearest_level(begin + j, value);
                note_error(begin + j);
            }
        }
    }

    // The value in steps of a weight, without what its part adds.
    void in_steps(int column, const Lanes& wanted, Lanes& value) const {
        const Tile& t = *tile_;
        const int part = column / width_;
        for (int r = 0; r < N_LANES; ++r) {
            const float step = t.factor[0][r] * (layout_.unit * (layout_.first + t.scale[part][r]));
            const float shifted = wanted[r] + t.factor[1][r] * t.minimum[part][r];
            value[r] = step != 0 ? shifted / step - t.delta[column][r] : 0;
        }
    }

    void note_error(int column) {
        Tile& t = *tile_;
        const int part = column / width_;
        for (int r = 0; r < N_LANES; ++r) {
            const float step = t.factor[0][r] * (layout_.unit * (layout_.first + t.scale[part][r]));
            const float found = step * (t.level[column][r] + t.delta[column][r]) - t.factor[1][r] * t.minimum[part][r];
            t.product[column][r] = t.exact[column][r] - found;
        }
    }

    void nearest_level(int column, const Lanes& value) {
        Tile& t = *tile_;
        const int last = layout_.n_entries - 1;
        if (is_even_) {
            const float low = entry(0), high = entry(last);
            for (int r = 0; r < N_LANES; ++r) {
                const float level = std::min(std::max(std::nearbyint(value[r]), low), high);
                t.level[column][r] = level;
                t.code[column][r] = static_cast<uint32_t>(static_cast<int32_t>(level - low));
            }
            return;
        }
        for (int r = 0; r < N_LANES; ++r) {
            t.level[column][r] = entry(0);
            t.code[column][r] = 0;
        }
        for (int e = 1; e <= last; ++e) {
            const float level = entry(e), middle = (level + entry(e - 1)) / 2;
            for (int r = 0; r < N_LANES; ++r) {
                t.level[column][r] = value[r] > middle ? level : t.level[column][r];
                t.code[column][r] += value[r] > middle;
            }
        }
    }

    // Entries for eight weights whose errors count together; ``wanted`` holds their corrections.
    void choose_entries(int begin, Lanes* wanted) {
        Tile& t = *tile_;
        float importance[TOGETHER];
        for (int j = 0; j < TOGETHER; ++j) {
            for (int i = 0; i < j; ++i)
                for (int r = 0; r < N_LANES; ++r) wanted[j][r] -= coupled(begin + i, begin + j) * wanted[i][r];
            importance[j] = 0;
            for (int i = j; i < TOGETHER; ++i) {
                const float share = coupled(begin + j, begin + i);
                importance[j] += share * share * problem_.pivots[begin + i];
            }
        }
        Lanes values[TOGETHER];
        for (int j = 0; j < TOGETHER; ++j) {
            for (int r = 0; r < N_LANES; ++r) wanted[j][r] += t.exact[begin + j][r];
            in_steps(begin + j, wanted[j], values[j]);
        }
        nearest_entries(begin, importance, values);
        for (int j = 0; j < TOGETHER; ++j) note_error(begin + j);
    }

    // Code and levels nearest to eight values, which are overwritten.
    void nearest_entries(int begin, const float* importance, Lanes* values) {
        Tile& t = *tile_;
        Lanes signs[TOGETHER];
        for (int j = 0; j < TOGETHER; ++j)
            for (int r = 0; r < N_LANES; ++r) signs[j][r] = layout_.n_signs && values[j][r] < 0 ? -1.0f : 1.0f;
        if (layout_.n_signs == 7) make_signs_even(importance, values, signs);
        for (int j = 0; j < TOGETHER; ++j)
            for (int r = 0; r < N_LANES; ++r) values[j][r] *= signs[j][r];
        uint32_t code[N_LANES] = {};
        const int width = layout_.entry_width;
        for (int first = 0; first < TOGETHER; first += width) {
            int32_t index[N_LANES];
            if (width == 8)
                nearest<8>(importance + first, values + first, index);
            else
                nearest<4>(importance + first, values + first, index);
            for (int r = 0; r < N_LANES; ++r) {
                code[r] |= static_cast<uint32_t>(index[r]) << first / width * index_bits_;
                for (int j = 0; j < width; ++j)
                    t.level[begin + first + j][r] = signs[first + j][r] * entry(index[r] * width + j);
            }
        }
        for (int j = 0; j < layout_.n_signs; ++j)
            for (int r = 0; r < N_LANES; ++r)
                code[r] |= (signs[j][r] < 0 ? 1u : 0u) << (TOGETHER / width * index_bits_ + j);
        for (int r = 0; r < N_LANES; ++r) t.code[begin / TOGETHER][r] = code[r];
    }

    // Turns the sign that costs least where the number of negative ones is odd, as ggml does.
    void make_signs_even(const float* importance, const Lanes* values, Lanes* signs) const {
        for (int r = 0; r < N_LANES; ++r) {
            float sign = 1, least = INFINITY;
            int cheapest = 0;
            for (int j = 0; j < TOGETHER; ++j) {
                sign *= signs[j][r];
                const float cost = importance[j] * values[j][r] * values[j][r];
                if (cost < least) {
                    least = cost;
                    cheapest = j;
                }
            }
            if (sign < 0) signs[cheapest][r] = -signs[cheapest][r];
        }
    }

    // Indices of the nearest entries: those of the largest  Σ w v e − ½ Σ w e².
    template <int WIDTH>
    void nearest(const float* importance, const Lanes* values, int32_t* index) {
        const int n = layout_.n_entries;
        float* constants = &weighted_[WIDTH * n];
        std::fill(constants, constants + n, 0.0f);
        for (int j = 0; j < WIDTH; ++j)
            for (int e = 0; e < n; ++e) {
                const float number = columns_[j * n + e];
                weighted_[j * n + e] = importance[j] * number;
                constants[e] -= 0.5f * importance[j] * number * number;
            }
        Lanes best;
        for (int r = 0; r < N_LANES; ++r) {
            best[r] = -INFINITY;
            index[r] = 0;
        }
        for (int e = 0; e < n; ++e) {
            float numbers[WIDTH];
            for (int j = 0; j < WIDTH; ++j) numbers[j] = weighted_[j * n + e];
            const float constant = constants[e];
            for (int r = 0; r < N_LANES; ++r) {
                float closeness = constant;
                for (int j = 0; j < WIDTH; ++j) closeness += numbers[j] * values[j][r];
                const bool is_better = closeness > best[r];
                best[r] = is_better ? closeness : best[r];
                index[r] = is_better ? e : index[r];
            }
        }
    }
};

}  // namespace

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

// Encodes blocks; with ``from_start``, those given are improved. Returns 0, or 1 if there is no memory.
EXPORTED int lieq_encode_blocks(
    const Layout* layout, const Problem* problem, const Blocks* blocks, int from_start, int n_rounds
) {
    try {
        Encoder(*layout, *problem).run(*blocks, from_start != 0, n_rounds);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
