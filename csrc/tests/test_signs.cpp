// Ranks as threads, which leave signs of life in a folder: who works is waited for, who does not is named.
//
//     test_signs FOLDER
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "liveness/signs.hpp"

using namespace hvd_train::liveness;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

namespace {

constexpr milliseconds kTimeout{400};
constexpr nanoseconds kNever{0};

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::_Exit(1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

// Waits in a call until `enough` says so, or until the others are given up: whether they are.
bool gives_up(Signs& signs, const std::function<bool(milliseconds)>& enough) {
    const auto begun = Signs::Clock::now();
    signs.enter(kNever);
    while (true) {
        const auto waited = Signs::Clock::now() - begun;
        if (!signs.keep_waiting(waited)) return true;
        if (enough(std::chrono::duration_cast<milliseconds>(waited))) return false;
        std::this_thread::sleep_for(milliseconds(5));
    }
}

// Keeps a core busy without a mark. By CPU time, so that a busy machine makes it no shorter.
void compute(milliseconds cpu) {
    timespec begun{}, now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begun);
    do {
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    } while (std::chrono::seconds(now.tv_sec - begun.tv_sec) + nanoseconds(now.tv_nsec - begun.tv_nsec) < cpu);
}

// What rank 0 sees while rank 1 of two does `work`, and then comes to the call.
struct Outcome {
    bool gave_up;
    std::vector<Missing> missing;
};

Outcome wait_for(const std::string& folder, nanoseconds step_timeout, const std::function<void(Signs&)>& work) {
    std::atomic<bool> arrived{false};
    std::atomic<bool> over{false};
    std::thread other([&] {
        Signs signs(folder, 1, 2, kTimeout, step_timeout);
        enter_phase("work of rank 1");
        work(signs);
        arrived = true;
        signs.enter(kNever);
        while (!over) std::this_thread::sleep_for(milliseconds(5));
        signs.leave();
    });
    Outcome outcome;
    {
        Signs signs(folder, 0, 2, kTimeout, step_timeout);
        outcome.gave_up = gives_up(signs, [&](milliseconds) { return arrived.load(); });
        outcome.missing = signs.missing();
        signs.leave();
        over = true;
        other.join();
    }
    return outcome;
}

void works(const std::string& folder) {
    const Outcome outcome = wait_for(folder, kNever, [](Signs&) { compute(4 * kTimeout); });
    REQUIRE(!outcome.gave_up);
}

void marks(const std::string& folder) {
    const Outcome outcome = wait_for(folder, kNever, [](Signs&) {
        for (int i = 0; i < 40; ++i) {
            std::this_thread::sleep_for(kTimeout / 10);
            mark();
        }
    });
    REQUIRE(!outcome.gave_up);
}

void sleeps(const std::string& folder) {
    const Outcome outcome = wait_for(folder, kNever, [](Signs&) { std::this_thread::sleep_for(8 * kTimeout); });
    REQUIRE(outcome.gave_up);
    REQUIRE(outcome.missing.size() == 1 && outcome.missing[0].rank == 1);
}

void spins(const std::string& folder) {
    const Outcome outcome = wait_for(folder, 2 * kTimeout, [](Signs&) { compute(20 * kTimeout); });
    REQUIRE(outcome.gave_up);
    REQUIRE(outcome.missing.size() == 1 && outcome.missing[0].rank == 1);
    REQUIRE(outcome.missing[0].phase == "work of rank 1");
}

// All have come, and nothing moves: a call that will never end.
void deadlocks(const std::string& folder) {
    Signs first(folder, 0, 2, kTimeout, kNever);
    std::atomic<bool> over{false};
    std::thread other([&] {
        Signs second(folder, 1, 2, kTimeout, kNever);
        second.enter(kNever);
        while (!over) std::this_thread::sleep_for(milliseconds(5));
    });
    REQUIRE(gives_up(first, [](milliseconds waited) { return waited > 100 * kTimeout; }));
    REQUIRE(first.missing().empty());
    over = true;
    other.join();
}

// A file that is not a sign counts as none.
void broken(const std::string& folder) {
    std::ofstream(folder + "/rank-00001") << "not a sign";
    Signs first(folder, 0, 2, kTimeout, kNever);
    REQUIRE(gives_up(first, [](milliseconds waited) { return waited > 100 * kTimeout; }));
    REQUIRE(first.missing().size() == 1 && first.missing()[0].rank == 1 && first.missing()[0].phase.empty());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    char folder[4096];
    std::snprintf(folder, sizeof folder, "%s/signs-XXXXXX", argv[1]);
    REQUIRE(mkdtemp(folder) != nullptr);
    const std::string base = folder;
    works(base + "/works");
    marks(base + "/marks");
    sleeps(base + "/sleeps");
    spins(base + "/spins");
    deadlocks(base + "/deadlocks");
    broken(base);
    std::puts("good");
    return std::system(("rm -r " + base).c_str());
}
