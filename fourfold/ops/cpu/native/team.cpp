#include "team.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace {

constexpr auto SPIN = std::chrono::microseconds(200);  // longer than the gap between two kernels of one token
constexpr int MOST_THREADS = 256;

void pause_briefly() {
    for (int i = 0; i < 16; i++)
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
}

struct Team {
    std::atomic<uint64_t> ticket{0};  // number of the job << 32 | parts that nobody has taken
    std::atomic<uint32_t> done{0};
    std::atomic<uint32_t> bell{0};  // rung for every job; sleepers listen to it
    std::atomic<int> asleep{0};
    std::mutex caller;  // one job at a time
    int workers = 0;
    // Written between jobs; whoever took a part may read them, for the job lasts until that part is done.
    void (*body)(void*, int) = nullptr;
    void* context = nullptr;
    uint32_t parts = 0;

    bool pending() const { return uint32_t(ticket.load()) != 0; }

    bool take_one() {
        uint64_t seen = ticket.load();
        while (uint32_t(seen)) {
            if (!ticket.compare_exchange_weak(seen, seen - 1)) continue;
            body(context, int(parts - uint32_t(seen)));
            done.fetch_add(1);
            return true;
        }
        return false;
    }

    [[noreturn]] void work() {
        for (;;) {
            const uint32_t heard = bell.load();
            while (take_one()) {}
            const auto until = std::chrono::steady_clock::now() + SPIN;
            while (!pending() && std::chrono::steady_clock::now() < until) pause_briefly();
            if (pending()) continue;
            asleep.fetch_add(1);
            if (!pending()) bell.wait(heard);
            asleep.fetch_sub(1);
        }
    }

    void run(int threads, int count, void (*f)(void*, int), void* with) {
        for (; workers < threads - 1 && workers < MOST_THREADS; workers++) std::thread([this] { work(); }).detach();
        body = f, context = with, parts = uint32_t(count);
        done.store(0);
        ticket.store(((ticket.load() >> 32) + 1) << 32 | parts);
        bell.fetch_add(1);
        if (asleep.load()) bell.notify_all();
        while (take_one()) {}
        for (int tries = 0; done.load() != parts; tries++) {
            if (tries < 100) pause_briefly();
            else std::this_thread::yield();  // the part's worker may be waiting for this very core
        }
    }
};

Team& team() {
    static Team* made = new Team;  // never destroyed: its workers outlive main
    return *made;
}

}  // namespace

void run_parts(int threads, int parts, void (*body)(void*, int), void* context) {
    if (threads > 1 && parts > 1) {
        std::unique_lock<std::mutex> only(team().caller, std::try_to_lock);
        if (only) return team().run(threads, parts, body, context);
    }
    for (int part = 0; part < parts; part++) body(context, part);  // one thread, or the team works for another caller
}
