// The ring over MPI: ranks of this machine, told apart into hosts of any sizes, each with shared memory of its own.
//
//     mpiexec -n RANKS test_ring LOCAL_SIZE...       as "2 1": ranks 0 and 1 are a host, rank 2 another
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "ring/codec.hpp"
#include "ring/layout.hpp"
#include "ring/ring.hpp"
#include "shm/flat_buffer.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

using namespace hvd_train;
using shm::FlatBuffer;
using shm::Region;
using shm::Type;
using ring::Wire;

namespace {

const Patience kTimeout{std::chrono::seconds{30}};

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    MPI_Abort(MPI_COMM_WORLD, 1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

// A host as the test sees it: some ranks, a communicator among them for the start, a team.
struct Host {
    ring::Topology topology;
    MPI_Comm comm = MPI_COMM_NULL;
    std::shared_ptr<Region> share(std::size_t num_bytes) const {
        char packed[256] = "";
        std::shared_ptr<Region> region;
        int length = 0;
        if (topology.local_rank == 0) {
            region = std::make_shared<Region>(Region::create(num_bytes));
            region->allocate(0, num_bytes);
            const std::string address = region->address().pack();
            length = static_cast<int>(address.size());
            std::memcpy(packed, address.data(), address.size());
        }
        MPI_Bcast(&length, 1, MPI_INT, 0, comm);
        MPI_Bcast(packed, length, MPI_BYTE, 0, comm);
        if (!region) {
            const std::string address(packed, static_cast<std::size_t>(length));
            region = std::make_shared<Region>(Region::open(shm::Address::unpack(address)));
        }
        MPI_Barrier(comm);
        return region;
    }
};

Host find_host(int rank, const std::vector<int>& local_sizes) {
    Host host;
    int next = 0;
    for (std::size_t h = 0; h < local_sizes.size(); ++h) {
        std::vector<int> ranks(static_cast<std::size_t>(local_sizes[h]));
        std::iota(ranks.begin(), ranks.end(), next);
        if (rank >= next && rank < next + local_sizes[h]) {
            host.topology.host = static_cast<int>(h);
            host.topology.local_rank = rank - next;
        }
        next += local_sizes[h];
        host.topology.ranks.push_back(std::move(ranks));
    }
    MPI_Comm_split(MPI_COMM_WORLD, host.topology.host, rank, &host.comm);
    return host;
}

// Every element is in one slice of one channel, and in what one rank owns; what a rank owns is what its channels bring.
void layouts(const ring::Topology& topology) {
    for (const std::size_t numel : {0UL, 1UL, 2UL, 3UL, 7UL, 1009UL, 65537UL}) {
        const ring::Layout layout(topology, numel);
        std::vector<int> in_slices(numel), in_owned(numel);
        for (int h = 0; h < topology.num_hosts(); ++h) {
            for (int l = 0; l < topology.local_size(h); ++l) {
                const shm::Span owned = layout.owned(h, l);
                for (std::size_t i = owned.begin; i < owned.end; ++i) ++in_owned[i];
                for (int c = l; c < topology.num_channels(); c += topology.local_size(h)) {
                    const shm::Span slice = layout.slice(h, c);
                    REQUIRE(slice.begin >= owned.begin && slice.end <= owned.end);
                    REQUIRE(topology.driver(h, c) == topology.ranks[static_cast<std::size_t>(h)][static_cast<std::size_t>(l)]);
                    for (std::size_t i = slice.begin; i < slice.end; ++i) ++in_slices[i];
                }
            }
        }
        const auto once = [](int n) { return n == 1; };
        REQUIRE(std::all_of(in_slices.begin(), in_slices.end(), once));
        REQUIRE(std::all_of(in_owned.begin(), in_owned.end(), once));
    }
}

double value(int rank, std::size_t index, int round) {
    return std::sin(static_cast<double>(index) * 0.37 + rank * 1.7) + static_cast<double>(index % 5) * 0.1 + round * 0.01;
}

struct Case {
    std::size_t numel;
    Type type;
    Wire wire;
    double tolerance;
};

template <class T>
void averages(const Host& host, ring::Ring& ring, shm::Team& team, int rank, int size, const Case& c) {
    const auto region = host.share(FlatBuffer::num_bytes(team.size(), c.numel, c.type));
    const FlatBuffer buffer(region, team.rank(), team.size(), c.numel, c.type);
    const auto staging = host.share(FlatBuffer::staging_bytes(team.size(), c.numel, c.type));
    const FlatBuffer copy = buffer.staged(staging);
    const shm::Span owned = ring.owned(c.numel);
    std::vector<T> mean(owned.size() + 1);
    const std::uint64_t payload_before = ring.payload_bytes();
    const int rounds = 6;
    for (int round = 0; round < rounds; ++round) {
        // Everything once: fused, with a slice step, in the background, with a rank of weight 0 that is not finite.
        const int sick = round % size;
        const bool background = round >= 4;
        const bool with_step = round % 2 == 1;
        const FlatBuffer& used = background ? copy : buffer;
        auto* live = reinterpret_cast<T*>(used.input());
        std::vector<double> all, shares;
        double total = 0;
        for (int r = 0; r < size; ++r) total += all.emplace_back(r == sick ? 0 : r + 1);
        for (double& s : all) s /= total;
        for (const int r : host.topology.ranks[static_cast<std::size_t>(host.topology.host)]) {
            shares.push_back(all[static_cast<std::size_t>(r)]);
        }
        for (std::size_t i = 0; i < c.numel; ++i) live[i] = static_cast<T>(rank == sick ? NAN : value(rank, i, round));
        // The first average makes the anchor, and goes in full.
        const Wire wire = round == 0 ? Wire::full : c.wire;
        const int slot = round % 2;
        shm::Task task{shares, slot, static_cast<std::uint64_t>(round + 1), mean.data(), kTimeout};
        ring::RingAverage average(ring, team, used, task, wire);
        if (background) {
            average.start(with_step);
            average.wait();
        } else {
            with_step ? average.reduce() : average.run();
        }
        if (with_step) {
            for (std::size_t i = 0; i < owned.size(); ++i) mean[i] += T(1);
            average.spread();
        }
        REQUIRE(buffer.complete(slot) == static_cast<std::uint64_t>(round + 1));
        const auto* anchor = reinterpret_cast<const T*>(buffer.anchor(slot));
        for (std::size_t i = 0; i < c.numel; ++i) {
            double expected = with_step ? 1 : 0;
            for (int r = 0; r < size; ++r) {
                if (r != sick) expected += all[static_cast<std::size_t>(r)] * value(r, i, round);
            }
            REQUIRE(std::fabs(static_cast<double>(anchor[i]) - expected) <= c.tolerance);
            if (!background) REQUIRE(std::memcmp(&anchor[i], &live[i], sizeof(T)) == 0);
        }
        for (std::size_t i = 0; i < owned.size(); ++i) {
            REQUIRE(std::fabs(static_cast<double>(mean[i] - anchor[owned.begin + i])) <= c.tolerance);
        }
        // All hosts hold the same bits.
        std::vector<T> first(anchor, anchor + c.numel);
        MPI_Bcast(first.data(), static_cast<int>(c.numel * sizeof(T)), MPI_BYTE, 0, MPI_COMM_WORLD);
        REQUIRE(c.numel == 0 || std::memcmp(first.data(), anchor, c.numel * sizeof(T)) == 0);
        MPI_Barrier(MPI_COMM_WORLD);
    }
    // 2 (h - 1) / h of the buffer leaves a host each time, by however many ranks.
    std::uint64_t mine = ring.payload_bytes() - payload_before;
    std::uint64_t sent = 0;
    MPI_Allreduce(&mine, &sent, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
    if (c.wire != Wire::int8) {
        const std::size_t full = c.type == Type::float64 ? 8 : 4;
        const std::size_t later = c.wire == Wire::full ? full : 2;
        const auto hosts = static_cast<std::uint64_t>(host.topology.num_hosts());
        REQUIRE(sent == 2 * (hosts - 1) * c.numel * (full + (rounds - 1) * later));
    }
}

// A difference that float16 cannot hold is an error on every rank, and the older anchor stays the complete one.
void overflow(const Host& host, ring::Ring& ring, shm::Team& team, int size) {
    const std::size_t numel = 1009;
    const auto region = host.share(FlatBuffer::num_bytes(team.size(), numel, Type::float32));
    const FlatBuffer buffer(region, team.rank(), team.size(), numel, Type::float32);
    auto* live = reinterpret_cast<float*>(buffer.input());
    std::vector<float> mean(ring.owned(numel).size() + 1);
    const std::vector<double> shares(static_cast<std::size_t>(team.size()), 1.0 / size);
    for (const Wire wire : {Wire::float16, Wire::int8}) {
        std::fill(live, live + numel, 1.0F);
        ring::RingAverage(ring, team, buffer, {shares, 0, 1, mean.data(), kTimeout}, Wire::full).run();
        live[500] = wire == Wire::float16 ? 1e9F : INFINITY;
        bool thrown = false;
        try {
            ring::RingAverage(ring, team, buffer, {shares, 1, 2, mean.data(), kTimeout}, wire).run();
        } catch (const ring::Overflow&) {
            thrown = true;
        }
        REQUIRE(thrown);
        REQUIRE(buffer.complete(0) == 1 && buffer.complete(1) != 2);
    }
}

void all(const Host& host, int rank, int size) {
    const auto memory = host.share(shm::Team::num_bytes(host.topology.local_size(host.topology.host)));
    shm::Team team(memory->data(), host.topology.local_rank, host.topology.local_size(host.topology.host), 0);
    MPI_Barrier(MPI_COMM_WORLD);
    ring::Ring ring(MPI_COMM_WORLD, host.topology);
    for (const std::size_t numel : {0UL, 1UL, 3UL, 1009UL, 70001UL, 400000UL}) {
        averages<float>(host, ring, team, rank, size, {numel, Type::float32, Wire::full, 1e-5});
        averages<double>(host, ring, team, rank, size, {numel, Type::float64, Wire::full, 1e-12});
        const double steps = host.topology.num_hosts() + 1.0;
        averages<float>(host, ring, team, rank, size, {numel, Type::float32, Wire::bfloat16, 3.0 / 256 * steps});
        averages<float>(host, ring, team, rank, size, {numel, Type::float32, Wire::float16, 3.0 / 2048 * steps});
        averages<float>(host, ring, team, rank, size, {numel, Type::float32, Wire::int8, 3.0 / 254 * steps});
        averages<double>(host, ring, team, rank, size, {numel, Type::float64, Wire::int8, 3.0 / 254 * steps});
    }
    overflow(host, ring, team, size);
    MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace

int main(int argc, char** argv) {
    int level = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
    int rank = 0;
    int size = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    std::vector<int> local_sizes;
    for (int i = 1; i < argc; ++i) local_sizes.push_back(std::atoi(argv[i]));
    REQUIRE(level >= MPI_THREAD_SERIALIZED);
    REQUIRE(std::accumulate(local_sizes.begin(), local_sizes.end(), 0) == size);
    Host host = find_host(rank, local_sizes);
    layouts(host.topology);
    all(host, rank, size);
    MPI_Comm_free(&host.comm);
    MPI_Finalize();
    if (rank == 0) std::puts("good");
    return 0;
}
