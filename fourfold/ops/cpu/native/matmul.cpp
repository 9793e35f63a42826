// y = x W^T for a quantised W. The weight is read once; each block of it meets all tiles of activations while it is in
// the nearest cache, so that one row (decoding) runs at the speed of memory and many (prefill) at that of the
// multipliers.
#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_PART = 1 << 17;  // products: about a microsecond, what handing over a part must be worth
constexpr int PARTS_PER_THREAD = 8;

int parts_for(int64_t products, int64_t most, int threads) {
    return int(std::clamp(products / WORTH_A_PART, int64_t(1), std::min(most, int64_t(threads) * PARTS_PER_THREAD)));
}

constexpr size_t FINE_TILE = TILE / 2;  // rows in a fine tile

// Some of `rows` quantised into tile number `tile` of those that hold all of them
void fill(std::vector<Tile>& tiles, size_t tile, const std::vector<const float*>& rows, const Weight& w, bool fine) {
    const size_t each = fine ? FINE_TILE : TILE, first = tile * each, count = std::min(each, rows.size() - first);
    tiles[tile].quantise(rows.data() + first, int(count), w.columns, w.groups(), w.bits, fine);
}

size_t tiles_of(size_t rows, size_t each = TILE) { return (rows + each - 1) / each; }

struct Expert {
    const void *gate, *gate_scales, *up, *up_scales, *down, *down_scales;
    int64_t width;
};

// What an expert computes: for the pairs (token, slot) that chose it
struct Work {
    Weight gate, up, down;
    std::vector<int64_t> tokens;
    std::vector<float> weights, hidden;  // hidden: [tokens, width]
    std::vector<Tile> in, out;
    int64_t first_block;  // of all experts' gates
};

thread_local std::vector<Work> kept;  // scratch memory stays between calls

}  // namespace

extern "C" {

int ff_level(int level) { return use_level(level); }

// x: float [m, columns]; y: float [m, rows]
void ff_matmul(int bits, int64_t span, const void* codes, const void* scales, int64_t rows, int64_t columns,
               const float* x, int64_t m, float* y, int threads) {
    const Weight w{bits, rows, columns, span, static_cast<const uint8_t*>(codes), scales};
    static thread_local std::vector<Tile> kept_tiles;
    static thread_local std::vector<const float*> pointers;
    std::vector<Tile>& tiles = kept_tiles;
    tiles.resize(tiles_of(m));
    pointers.resize(m);
    for (int64_t i = 0; i < m; i++) pointers[i] = x + i * columns;
    const auto& all = pointers;
    in_parts(threads, m > TILE ? int(tiles.size()) : 1, [&](int tile) {
        if (m) fill(tiles, tile, all, w, false);
    });
    const int64_t blocks = w.blocks();
    const int parts = m ? parts_for(rows * columns * m, blocks, threads) : 0;
    in_parts(threads, parts, [&](int part) {
        float out[TILE * ROWS];
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++)
            for (size_t i = 0; i < tiles.size(); i++) {
                block_product(w, b, tiles[i], out);
                const int64_t n = std::min<int64_t>(ROWS, rows - b * ROWS);
                for (int r = 0; r < tiles[i].rows; r++)
                    std::copy(out + r * ROWS, out + r * ROWS + n, y + (i * TILE + r) * rows + b * ROWS);
            }
    });
}

// y[t] = sum_k weights[t, k] down_e (silu(gate_e x[t]) * up_e x[t]) with e = indices[t, k]; y: float [tokens, d].
// Three passes: gate and up of all chosen experts; their products quantised; down. The products have long tails, so
// their tiles are fine: in decoding, where memory is what is waited for, that costs nothing.
// A token adds its experts in the order of their numbers, whatever other tokens there are. always: whether the row of
// the table after the last expert is one that every token has besides, with weight 1.
void ff_experts(int bits, int64_t span, const void* table, int64_t n_experts, const float* x, int64_t tokens,
                int64_t d, const int64_t* indices, const float* weights, int64_t per_token, float limit, float* y,
                int always, int threads) {
    const Expert* experts = static_cast<const Expert*>(table);
    std::vector<Work>& work = kept;
    const int64_t all = n_experts + (always ? 1 : 0), each = per_token + (always ? 1 : 0);
    const auto chosen = [&](int64_t pair) { return pair % each < per_token ? indices[pair / each * per_token + pair % each] : n_experts; };
    const auto share = [&](int64_t pair) { return pair % each < per_token ? weights[pair / each * per_token + pair % each] : 1.f; };
    std::vector<int64_t> place(all, -1);
    for (int64_t i = 0; i < tokens * each; i++) place[chosen(i)] = 0;
    size_t used = 0;
    for (auto& p : place)
        if (p == 0) p = int64_t(used++);
    if (work.size() < used) work.resize(used);
    for (int64_t e = 0; e < all; e++) {
        if (place[e] < 0) continue;
        const Expert& from = experts[e];
        const auto weight = [&](const void* codes, const void* scales, int64_t rows, int64_t columns) {
            return Weight{bits, rows, columns, span, static_cast<const uint8_t*>(codes), scales};
        };
        Work& it = work[place[e]];
        it.gate = weight(from.gate, from.gate_scales, from.width, d);
        it.up = weight(from.up, from.up_scales, from.width, d);
        it.down = weight(from.down, from.down_scales, d, from.width);
        it.tokens.clear();
        it.weights.clear();
    }
    for (int64_t i = 0; i < tokens * each; i++) {
        Work& it = work[place[chosen(i)]];
        it.tokens.push_back(i / each);
        it.weights.push_back(share(i));
    }

    // one token: all experts read the same tile
    std::vector<std::pair<size_t, size_t>> tiles, fine_tiles;  // (expert, tile)
    int64_t blocks = 0, products = 0;
    for (size_t e = 0; e < used; e++) {
        Work& it = work[e];
        const size_t n = tiles_of(it.tokens.size()), fine = tiles_of(it.tokens.size(), FINE_TILE);
        it.in.resize(n), it.out.resize(fine);
        it.hidden.resize(it.tokens.size() * it.gate.rows);
        it.first_block = blocks;
        blocks += it.gate.blocks();
        products += it.gate.rows * d * int64_t(it.tokens.size());
        for (size_t i = 0; i < n; i++) tiles.emplace_back(e, i);
        for (size_t i = 0; i < fine; i++) fine_tiles.emplace_back(e, i);
    }
    const bool shared = tokens == 1 && used > 0 && used == size_t(each);
    in_parts(threads, shared ? 1 : int(tiles.size()), [&](int i) {
        Work& it = work[tiles[i].first];
        std::vector<const float*> rows;
        for (int64_t token : it.tokens) rows.push_back(x + token * d);
        fill(it.in, tiles[i].second, rows, it.gate, false);
    });

    const int parts = used ? parts_for(2 * products, blocks, threads) : 0;
    in_parts(threads, parts, [&](int part) {
        float gate[TILE * ROWS], up[TILE * ROWS];
        size_t e = 0;
        for (int64_t flat = blocks * part / parts; flat < blocks * (part + 1) / parts; flat++) {
            while (flat >= work[e].first_block + work[e].gate.blocks()) e++;
            Work& it = work[e];
            const int64_t b = flat - it.first_block, n = std::min<int64_t>(ROWS, it.gate.rows - b * ROWS);
            for (size_t i = 0; i < it.in.size(); i++) {
                const Tile& tile = shared ? work[0].in[0] : it.in[i];
                block_product(it.gate, b, tile, gate);
                block_product(it.up, b, tile, up);
                for (int r = 0; r < tile.rows; r++) {
                    const size_t pair = i * TILE + r;
                    for (int64_t c = 0; c < n; c++) {
                        float g = gate[r * ROWS + c], u = up[r * ROWS + c];
                        if (limit > 0) g = std::min(g, limit), u = std::clamp(u, -limit, limit);
                        it.hidden[pair * it.gate.rows + b * ROWS + c] = g / (1 + std::exp(-g)) * u * it.weights[pair];
                    }
                }
            }
        }
    });

    in_parts(threads, int(fine_tiles.size()), [&](int i) {
        Work& it = work[fine_tiles[i].first];
        std::vector<const float*> rows;
        for (size_t pair = 0; pair < it.tokens.size(); pair++) rows.push_back(it.hidden.data() + pair * it.gate.rows);
        fill(it.out, fine_tiles[i].second, rows, it.down, true);
    });

    const int64_t columns = (d + ROWS - 1) / ROWS;
    const int ranges = used ? parts_for(products, columns, threads) : 1;
    in_parts(threads, ranges, [&](int part) {
        float out[TILE * ROWS];
        const int64_t first = columns * part / ranges, last = columns * (part + 1) / ranges;
        for (int64_t t = 0; t < tokens; t++)
            std::fill(y + t * d + first * ROWS, y + t * d + std::min(d, last * ROWS), 0.f);
        for (size_t e = 0; e < used; e++)
            for (int64_t b = first; b < last; b++)
                for (size_t i = 0; i < work[e].out.size(); i++) {
                    const Tile& tile = work[e].out[i];
                    block_product(work[e].down, b, tile, out);
                    const int64_t n = std::min<int64_t>(ROWS, d - b * ROWS);
                    for (int r = 0; r < tile.rows; r += 2) {
                        float* to = y + work[e].tokens[i * FINE_TILE + r / 2] * d + b * ROWS;
                        for (int64_t c = 0; c < n; c++) to[c] += out[r * ROWS + c] + out[(r + 1) * ROWS + c];
                    }
                }
    });
}
}
