// The ranks of a host as threads over one block of memory, or as processes over a region: sums, averages, deaths.
//
//     test_shm threads|processes RANKS
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "shm/flat_buffer.hpp"
#include "shm/operation.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

using hvd_train::Patience;
using namespace hvd_train::shm;

namespace {

const Patience kTimeout{std::chrono::seconds{20}};

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::_Exit(1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

float value(int rank, std::size_t index, int round) {
    return std::sin(static_cast<float>(index) * 0.37F + static_cast<float>(rank) * 1.7F) +
           static_cast<float>(index % 5) + static_cast<float>(round);
}

// Every size that may go wrong, several rounds, weights, a rank of weight 0 that is not finite, the slice step.
void averages(Team& team, const std::function<std::shared_ptr<Region>(std::size_t)>& share) {
    const int p = team.size();
    const auto sizes = {std::size_t{0}, std::size_t{1}, static_cast<std::size_t>(p - 1), static_cast<std::size_t>(p),
                        static_cast<std::size_t>(p + 1), std::size_t{1009}, std::size_t{65537}};
    for (const std::size_t numel : sizes) {
        const auto region = share(FlatBuffer::num_bytes(p, numel, Type::float32));
        const FlatBuffer buffer(region, team.rank(), p, numel, Type::float32);
        buffer.allocate();
        auto* live = reinterpret_cast<float*>(buffer.input());
        std::vector<float> mean(buffer.slice().size() + 1);
        for (int round = 0; round < 4; ++round) {
            const int sick = p > 1 ? round % p : -1;
            std::vector<double> shares;
            double total = 0;
            for (int r = 0; r < p; ++r) total += shares.emplace_back(r == sick ? 0 : r + 1);
            for (double& s : shares) s /= total;
            for (std::size_t i = 0; i < numel; ++i) live[i] = team.rank() == sick ? NAN : value(team.rank(), i, round);
            team.barrier(kTimeout);
            const int slot = round % 2;
            HostAverage average(team, buffer, {shares, slot, static_cast<std::uint64_t>(round + 1), mean.data(), kTimeout});
            if (round % 2 == 0) {
                average.run();
            } else {
                average.reduce();
                average.spread();
            }
            REQUIRE(buffer.complete(slot) == static_cast<std::uint64_t>(round + 1));
            const auto* anchor = reinterpret_cast<const float*>(buffer.anchor(slot));
            for (std::size_t i = 0; i < numel; ++i) {
                double expected = 0;
                for (int r = 0; r < p; ++r) {
                    if (r != sick) expected += shares[static_cast<std::size_t>(r)] * static_cast<double>(value(r, i, round));
                }
                REQUIRE(std::fabs(static_cast<double>(live[i]) - expected) < 1e-4);
                REQUIRE(live[i] == anchor[i]);
            }
            team.barrier(kTimeout);
        }
        team.barrier(kTimeout);
    }
}

void sums(Team& team) {
    const int p = team.size();
    for (int round = 0; round < 2000; ++round) {
        double mine[3] = {team.rank() + 1.0, static_cast<double>(round), -1.0 * team.rank()};
        double result[3];
        const Op op = round % 3 == 0 ? Op::sum : round % 3 == 1 ? Op::min : Op::max;
        team.allreduce(mine, result, 3, op, kTimeout);
        if (op == Op::sum) REQUIRE(result[0] == p * (p + 1) / 2.0 && result[1] == 1.0 * p * round);
        if (op == Op::min) REQUIRE(result[0] == 1.0 && result[2] == -(p - 1.0));
        if (op == Op::max) REQUIRE(result[0] == p && result[2] == 0.0);
        const auto rows = team.gather({mine[0], mine[1]}, kTimeout);
        REQUIRE(rows.size() == static_cast<std::size_t>(p));
        for (int r = 0; r < p; ++r) {
            const std::vector<double>& row = rows[static_cast<std::size_t>(r)];
            REQUIRE(row.size() == 2 && row[0] == r + 1.0 && row[1] == round);
        }
    }
}

void threads(int p) {
    std::vector<std::byte> memory(Team::num_bytes(p) + 64);
    auto* base = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    std::memset(base, 0, Team::num_bytes(p));
    std::vector<std::unique_ptr<Team>> teams(static_cast<std::size_t>(p));
    std::atomic<int> seated{0};
    std::vector<std::shared_ptr<Region>> regions;
    std::vector<std::thread> ranks;
    std::shared_ptr<Region> shared;
    for (int r = 0; r < p; ++r) {
        ranks.emplace_back([&, r] {
            Team team(base, r, p, r % 2 == 0 ? 100 : 0);  // some spin, some sleep
            seated.fetch_add(1);
            while (seated.load() < p) std::this_thread::yield();
            sums(team);
            averages(team, [&](std::size_t n) {
                if (team.rank() == 0) shared = std::make_shared<Region>(Region::create(n));
                team.barrier(kTimeout);
                auto region = shared;
                team.barrier(kTimeout);
                return region;
            });
        });
    }
    for (std::thread& rank : ranks) rank.join();
}

// Forks p - 1 children; each rank runs `body` and ends with its status.
void processes(int p, const std::function<void(Team&, std::vector<std::shared_ptr<Region>>&)>& body, int victim) {
    auto control = std::make_shared<Region>(Region::create(Team::num_bytes(p)));
    control->allocate(0, Team::num_bytes(p));
    std::vector<std::shared_ptr<Region>> regions;
    for (const std::size_t n : {std::size_t{0}, std::size_t{1}, static_cast<std::size_t>(p - 1), static_cast<std::size_t>(p),
                                static_cast<std::size_t>(p + 1), std::size_t{1009}, std::size_t{65537}}) {
        regions.push_back(std::make_shared<Region>(Region::create(FlatBuffer::num_bytes(p, n, Type::float32))));
    }
    const Address seats = control->address();
    std::vector<Address> addresses;
    for (const auto& region : regions) addresses.push_back(region->address());
    std::vector<pid_t> children;
    for (int r = 0; r < p; ++r) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            {
                // A child has no mapping of its parent's; it opens them as any other process does.
                const Region mapped = Region::open(seats);
                for (std::size_t i = 0; i < regions.size(); ++i) {
                    regions[i] = std::make_shared<Region>(Region::open(addresses[i]));
                }
                Team team(mapped.data(), r, p, r % 2 == 0 ? 20000 : 0);
                usleep(200'000);  // every seat is taken by then; a barrier needs that
                body(team, regions);
            }  // leaves its seat: to end while seated is to die
            std::_Exit(0);
        }
        children.push_back(child);
    }
    for (int r = 0; r < p; ++r) {
        int status = 0;
        waitpid(children[static_cast<std::size_t>(r)], &status, 0);
        if (r == victim) {
            REQUIRE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        } else {
            REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        }
    }
}

// One rank is killed where the others wait for it: each of them must see the death, and who it was.
void death(int p) {
    for (int victim = 0; victim < p && p > 1; ++victim) {
        processes(p, [&](Team& team, std::vector<std::shared_ptr<Region>>&) {
            for (int i = 0; i < 10; ++i) team.barrier(kTimeout);
            if (team.rank() == victim) raise(SIGKILL);
            try {
                team.barrier(kTimeout);
            } catch (const RankDied& died) {
                REQUIRE(died.ranks == std::vector<int>{victim});
                return;
            }
            std::_Exit(1);
        }, victim);
    }
}

void stall(int p) {
    if (p == 1) return;
    processes(p, [&](Team& team, std::vector<std::shared_ptr<Region>>&) {
        if (team.rank() == p - 1) {
            usleep(1'500'000);
            return;
        }
        try {
            team.barrier(Patience{std::chrono::milliseconds(300)});
        } catch (const Stalled&) {
            REQUIRE(team.late() == std::vector<int>{p - 1});
            return;
        }
        std::_Exit(1);
    }, -1);
}

}  // namespace

int main(int argc, char** argv) {
    REQUIRE(argc == 3);
    const int p = std::atoi(argv[2]);
    if (std::string(argv[1]) == "threads") {
        threads(p);
    } else {
        processes(p, [](Team& team, std::vector<std::shared_ptr<Region>>& regions) {
            sums(team);
            std::size_t next = 0;
            averages(team, [&](std::size_t) { return regions[next++]; });
        }, -1);
        death(p);
        stall(p);
    }
    std::puts("good");
    return 0;
}
