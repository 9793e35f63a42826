// Integer products of a few activation rows with blocks of 16 weight rows.
//
// Weights: [N / 16] blocks. Within one, columns come in lines of 64 bytes, 16 rows x 4 bytes each:
//   int8: a byte is a code + 128; a line holds columns k .. k + 3.
//   int4: a nibble is a code + 8; low nibbles are columns k .. k + 3, high nibbles k + 4 .. k + 7.
// int8 has one float scale per row, int4 one bfloat16 scale per row and group, 16 rows together.
// Rows are padded to 16 and columns to 32 (or a whole group) with codes that stand for 0.
//
// Activations: tiles of M <= 8 rows in int8 with a scale for every 32 columns, interleaved so that one pointer walks:
// words [K / 4][M] of 4 codes, scales and offsets [K / 32][M]. An offset takes back what the +128 or +8 added.
// A fine tile holds every row twice: rounded, and right after it what the rounding lost, rounded again.
// An output is the same number whatever M is: integers are exact and the groups are added in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

constexpr int TILE = 8, ROWS = 16, GROUP = 32;

struct Weight {
    int bits;           // 8 or 4
    int64_t rows, columns, span;  // span: groups of 32 columns that share a scale (int4)
    const uint8_t* codes;
    const void* scales;

    int64_t groups() const { return bits == 4 ? (columns + GROUP * span - 1) / (GROUP * span) * span
                                              : (columns + GROUP - 1) / GROUP; }
    int64_t blocks() const { return (rows + ROWS - 1) / ROWS; }
    const uint8_t* block(int64_t b) const { return codes + b * groups() * GROUP * ROWS * bits / 8; }
    const void* block_scales(int64_t b) const {
        return bits == 4 ? static_cast<const void*>(static_cast<const uint16_t*>(scales) + b * ROWS * (groups() / span))
                         : static_cast<const void*>(static_cast<const float*>(scales) + b * ROWS);
    }
};

// M activation rows; see above.
struct Tile {
    int rows = 0;
    std::vector<int32_t> words, offsets;
    std::vector<float> scales;

    // row m is x[m][0 .. columns - 1], zeros up to groups * 32; fine: rows 2 m and 2 m + 1
    void quantise(const float* const* x, int m, int64_t columns, int64_t groups, int bits, bool fine);
};

// out[m][0..15] = the products of block b with each row of the tile
void block_product(const Weight& w, int64_t b, const Tile& tile, float* out);

// The instruction set in use: 0 plain, 1 AVX2, 2 AVX-512 with VNNI. Asked for more than there is, gives what there is.
int use_level(int level);
