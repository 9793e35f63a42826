// The speed at which all threads together read memory once: the limit of decoding.
#include <chrono>

#include "lanes.h"
#include "team.h"

namespace {

int32_t read_all(const char* data, int64_t bytes) {
    IntLanes sum[4] = {};
    constexpr int64_t SIZE = sizeof(IntLanes);
    for (int64_t i = 0; i + 4 * SIZE <= bytes; i += 4 * SIZE)
        for (int j = 0; j < 4; j++) {
            IntLanes v;
            std::memcpy(&v, data + i + j * SIZE, SIZE);
            sum[j] += v;
        }
    const IntLanes all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return all[0] ^ all[1];  // every lane has been read
}

}  // namespace

// Bytes per second
extern "C" double ff_read_bandwidth(const char* data, int64_t bytes, int threads) {
    const int parts = threads * 16;
    volatile int32_t sink = 0;
    const auto start = std::chrono::steady_clock::now();
    in_parts(threads, parts, [&](int part) {
        const int64_t each = bytes / parts / 256 * 256;
        sink = read_all(data + part * each, each);
    });
    return double(bytes) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Says which sources this library was made from.
extern "C" const char* ff_fingerprint() { return FINGERPRINT; }
