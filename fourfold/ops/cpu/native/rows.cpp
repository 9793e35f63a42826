// Rows of the cache: made with scales, and read back. The same to the last bit as ops/reference/rows.py.
#include "rows.h"

#include <algorithm>
#include <vector>

#include "team.h"

namespace {

constexpr int64_t SOME = 16;  // rows that a thread takes at a time
constexpr float SMALLEST = 0x1p-126f, LARGEST = 0x1p127f, MAGIC = 12582912.f;  // MAGIC rounds to a whole number, ties to even

INLINE Lanes magnitude(Lanes x) { return (Lanes)((IntLanes)x & INT32_MAX); }
INLINE Lanes rounded(Lanes x) { return (x + MAGIC) - MAGIC; }

INLINE IntLanes code_int8(Lanes x) {
    x = x > 127.f ? Lanes{} + 127.f : x < -127.f ? Lanes{} - 127.f : x;
    return __builtin_convertvector(rounded(x), IntLanes);
}

INLINE IntLanes code_fp8(Lanes x) {
    Lanes size = magnitude(x);
    size = size > 448.f ? Lanes{} + 448.f : size;
    const IntLanes bits = (IntLanes)size;
    const IntLanes normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);  // to three bits of mantissa
    const IntLanes small = __builtin_convertvector(rounded(size * 512.f), IntLanes);
    return (size < 0x1p-6f ? small : normal) | (((IntLanes)x >> 24) & 0x80);
}

// Codes of a part and its scale. Returns whether all numbers are finite and not too large.
bool encode_part(const float* x, int64_t width, int format, float* scale, uint8_t* codes) {
    Lanes tops = {};
    IntLanes bad = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Lanes size = magnitude(load_some(x + i, width - i));
        bad |= ~(size <= LARGEST);
        tops = size > tops ? size : tops;
    }
    float top = 0;
    bool fine = true;
    for (int i = 0; i < LANES; i++) top = std::max(top, tops[i]), fine &= !bad[i];
    const float most = format == INT8 ? 127.f : 448.f;
    *scale = std::max(top, most * SMALLEST) / most;
    for (int64_t i = 0; i < width; i += LANES) {
        const Lanes scaled = load_some(x + i, width - i) / *scale;
        const IntLanes code = format == INT8 ? code_int8(scaled) : code_fp8(scaled);
        for (int64_t j = 0; j < std::min<int64_t>(LANES, width - i); j++) codes[i + j] = uint8_t(code[j]);
    }
    return fine;
}

void decode_part(const char* codes, int64_t width, int format, float scale, float* to) {
    if (format == INT8) widen_as(reinterpret_cast<const int8_t*>(codes), scale, width, to);
    else widen_as(reinterpret_cast<const Fp8*>(codes), scale, width, to);
}

int64_t sum_of(const int64_t* widths, int64_t parts) {
    int64_t total = 0;
    for (int64_t p = 0; p < parts; p++) total += widths[p];
    return total;
}

}  // namespace

// x: float [n, sum of widths]; rows: n rows of INT8 or E4M3. Returns 0 if a number is NaN, infinite or beyond 2^127.
extern "C" int ff_encode_rows(const float* x, int64_t n, const int64_t* widths, int64_t parts, int format, char* rows, int threads) {
    const int64_t width = sum_of(widths, parts), size = row_bytes(format, width, int(parts));
    const int64_t tiles = (n + SOME - 1) / SOME;
    std::vector<char> fine(tiles, 1);
    in_parts(threads, int(tiles), [&](int tile) {
        for (int64_t r = tile * SOME; r < std::min(n, (tile + 1) * SOME); r++) {
            char* row = rows + r * size;
            uint8_t* codes = reinterpret_cast<uint8_t*>(row + scale_bytes(format, int(parts)));
            const float* from = x + r * width;
            for (int64_t p = 0; p < parts; p++) {
                float scale;
                fine[tile] &= encode_part(from, widths[p], format, &scale, codes);
                std::memcpy(row + 4 * p, &scale, 4);
                from += widths[p], codes += widths[p];
            }
            std::fill(codes, reinterpret_cast<uint8_t*>(row + size), 0);
        }
    });
    return std::all_of(fine.begin(), fine.end(), [](char f) { return f; });
}

// rows: n rows of INT8 or E4M3; out: float [n, sum of widths]
extern "C" void ff_decode_rows(const char* rows, int64_t n, const int64_t* widths, int64_t parts, int format, float* out, int threads) {
    const int64_t width = sum_of(widths, parts), size = row_bytes(format, width, int(parts));
    in_parts(threads, int((n + SOME - 1) / SOME), [&](int tile) {
        for (int64_t r = tile * SOME; r < std::min(n, (tile + 1) * SOME); r++) {
            const char *row = rows + r * size, *codes = row + scale_bytes(format, int(parts));
            float* to = out + r * width;
            for (int64_t p = 0; p < parts; p++) {
                decode_part(codes, widths[p], format, scale_of(row, format, int(p)), to);
                codes += widths[p], to += widths[p];
            }
        }
    });
}
