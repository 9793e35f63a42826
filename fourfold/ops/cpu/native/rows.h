// Rows of cache pages, read as floats from the formats they lie in (see ops/reference/rows.py).
//
// A row of int8 or e4m3 begins with a float scale for each of its parts; codes follow, filled up to four bytes.
#pragma once

#include "lanes.h"

enum Format { FLOAT32, BFLOAT16, INT8, E4M3 };

struct Fp8 {
    uint8_t bits;  // e4m3 without its NaN
};

INLINE int64_t item_bytes(int format) { return format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1; }
INLINE int64_t scale_bytes(int format, int parts) { return format >= INT8 ? 4 * parts : 0; }

// Of a row of `width` numbers in `parts` parts
INLINE int64_t row_bytes(int format, int64_t width, int parts) {
    return format >= INT8 ? scale_bytes(format, parts) + (width + 3) / 4 * 4 : width * item_bytes(format);
}

INLINE float scale_of(const void* row, int format, int part) {
    float scale = 1;
    if (format >= INT8) std::memcpy(&scale, static_cast<const char*>(row) + 4 * part, 4);
    return scale;
}

// In two steps, each of which is one instruction; the compiler takes a leap apart into single numbers
INLINE IntLanes load_codes(const void* x) {
    ByteLanes v;
    std::memcpy(&v, x, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, ShortLanes), IntLanes);
}

INLINE Lanes load(const int8_t* x) { return __builtin_convertvector(load_codes(x), Lanes); }

// A normal code is a float with three bits of mantissa and another bias; a code without exponent is a whole number of
// 2^-9, which is no float of the small kind, so that it does not matter whether the processor flushes those to zero.
INLINE Lanes load(const Fp8* x) {
    const IntLanes code = load_codes(x), size = code & 0x7F;
    const Lanes normal = (Lanes)((size << 20) + (120 << 23)), small = __builtin_convertvector(size, Lanes) * 0x1p-9f;
    return (Lanes)((IntLanes)(size < 8 ? small : normal) | (code & INT32_MIN));
}

INLINE float number(int8_t x) { return x; }
INLINE float number(Fp8 x) {
    const uint32_t size = x.bits & 0x7F;
    const float small = float(size) * 0x1p-9f;
    uint32_t bits;
    std::memcpy(&bits, &small, 4);
    if (size >= 8) bits = (size << 20) + (120u << 23);
    bits |= uint32_t(x.bits & 0x80) << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// As many numbers as there are lanes, or the `some` that there are and zeros
template <class T> INLINE Lanes load_some(const T* x, int64_t some) {
    if (some >= LANES) return load(x);
    Lanes v = {};
    for (int64_t i = 0; i < some; i++) v[i] = number(x[i]);
    return v;
}

// to[0 .. width - 1] = numbers or codes times their scale
template <class T> INLINE void widen_as(const T* from, float scale, int64_t width, float* to) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(from + i) * scale);
    for (; i < width; i++) to[i] = number(from[i]) * scale;
}
