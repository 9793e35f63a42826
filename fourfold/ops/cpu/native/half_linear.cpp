// Products of bfloat16 summed in float32 by the matrix unit: what float32 copies of the same numbers would give.
//
// A float32 weight is the sum of three bfloat16 numbers without loss, which are multiplied one after the other.
#include "matrix.h"
#include "team.h"

#ifdef HAS_MATRIX

namespace {

using matrix::DEPTH, matrix::SIDE, matrix::TILE, matrix::Space;

constexpr int64_t SQUARE = 2 * SIDE, ROWS = 256;  // of a product; rows of x that share columns laid out once
constexpr int PARTS = 3;                          // of a float32 number

struct Request {
    const uint16_t* x;
    const void* weight;
    int parts;  // of each of its numbers: 1 where it is bfloat16
    float* y;
    int64_t rows, outs, d;
};

// Rows out .. of the weight as columns, part after part
MATRIX void lay_out(const Request& r, int64_t out, uint16_t* columns) {
    static thread_local Space<uint16_t> space;
    const int64_t wide = std::min(SQUARE, r.outs - out), tiles = r.d / DEPTH * TILE;
    const uint16_t* rows[SQUARE] = {};
    uint16_t* split = space.room(PARTS * SQUARE * r.d);
    const auto* floats = static_cast<const float*>(r.weight) + out * r.d;
    for (int64_t i = 0; r.parts > 1 && i < wide * r.d; i++) {
        float rest = floats[i];
        for (int part = 0; part < PARTS; part++) {
            const uint16_t most = split[part * SQUARE * r.d + i] = matrix::to_bfloat16(rest);
            rest -= number(most);
        }
    }
    const uint16_t* from = r.parts > 1 ? split : static_cast<const uint16_t*>(r.weight) + out * r.d;
    for (int part = 0; part < r.parts; part++, from += SQUARE * r.d, columns += 2 * tiles) {
        for (int64_t i = 0; i < wide; i++) rows[i] = from + i * r.d;
        matrix::lay_columns(rows, r.d, columns);
        matrix::lay_columns(rows + SIDE, r.d, columns + tiles);
    }
}

// y[row][out ..] for 32 outputs
MATRIX void multiply_rows(const Request& r, int64_t first, int64_t last, int64_t out) {
    static thread_local Space<uint16_t> column_space, row_space;
    const int64_t steps = r.d / DEPTH, wide = std::min(SQUARE, r.outs - out);
    uint16_t *columns = column_space.room(PARTS * 2 * steps * TILE), *some = row_space.room(SQUARE * r.d);
    lay_out(r, out, columns);
    alignas(64) float square[SQUARE * SQUARE];
    for (int64_t i = first; i < last; i += SQUARE) {
        const int64_t count = std::min(SQUARE, last - i);
        const uint16_t* from = r.x + i * r.d;
        if (count < SQUARE) from = static_cast<uint16_t*>(std::memcpy(some, from, count * r.d * 2));  // products are whole
        matrix::multiply(from, r.d, columns, TILE, steps * TILE, steps, square, SQUARE);
        for (int part = 1; part < r.parts; part++)
            matrix::multiply<true>(from, r.d, columns + part * 2 * steps * TILE, TILE, steps * TILE, steps, square, SQUARE);
        for (int64_t j = 0; j < count; j++)
            for (int64_t n = 0; n < wide; n += LANES) {
                float* to = r.y + (i + j) * r.outs + out + n;
                store_some(to, load(square + j * SQUARE + n), wide - n);
            }
    }
}

}  // namespace

#endif

// y [rows, outs] = x weight^T. x: [rows, d]; weight: bfloat16 or float [outs, d]; d a multiple of 32; only where there
// is a matrix unit
extern "C" void ff_half_linear(const uint16_t* x, const void* weight, int floats, float* y, int64_t rows, int64_t outs,
                               int64_t d, int threads) {
#ifdef HAS_MATRIX
    const Request request{x, weight, floats ? PARTS : 1, y, rows, outs, d};
    const int64_t across = (outs + SQUARE - 1) / SQUARE, down = (rows + ROWS - 1) / ROWS;
    in_parts(threads, int(across * down), [&](int part) {
        const int64_t first = part / across * ROWS;
        matrix::configure();
        multiply_rows(request, first, std::min(rows, first + ROWS), part % across * SQUARE);
        matrix::release();
    });
#endif
}
