// The measure of what memory allows moves what it says: every element of every tensor, once.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "shm/limit.hpp"

using namespace hvd_train::shm;

namespace {

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::_Exit(1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

float value(int rank, std::size_t index) { return static_cast<float>((index * 7 + static_cast<std::size_t>(rank) * 5) % 128); }

void sums(int size, std::size_t numel) {
    auto region = std::make_shared<Region>(Region::create(Limit::num_bytes(size, numel)));
    std::vector<Limit> ranks;
    for (int r = 0; r < size; ++r) {
        ranks.emplace_back(region, r, size, numel);
        ranks.back().allocate();
        for (std::size_t i = 0; i < numel; ++i) ranks.back().live()[i] = value(r, i);
    }
    std::vector<std::thread> threads;
    for (const Limit& rank : ranks) threads.emplace_back([&rank] { rank.run(); });
    for (std::thread& thread : threads) thread.join();
    for (std::size_t i = 0; i < numel; ++i) {
        float sum = 0;
        for (int r = 0; r < size; ++r) sum += value(r, i);
        for (const Limit& rank : ranks) REQUIRE(rank.live()[i] == sum);
        REQUIRE(ranks.front().shared()[i] == sum);
    }
}

}  // namespace

int main() {
    for (const int size : {1, 2, 3, 5}) {
        for (const std::size_t numel : {0, 1, 15, 16, 17, 1021, 65537}) sums(size, numel);
    }
    std::puts("good");
    return 0;
}
