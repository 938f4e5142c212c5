// The ranks of one host as a team: a barrier that notices the dead, and sums of a few numbers.
//
// All state lies in memory that every rank has mapped; a Team is one rank's seat at it. Nothing here knows
// processes: a test may run p ranks as p threads over one block of memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "liveness/patience.hpp"

namespace hvd_train::shm {

// A rank of the team died. `ranks` are the dead, ascending.
class RankDied : public std::runtime_error {
  public:
    explicit RankDied(std::vector<int> ranks);
    const std::vector<int> ranks;
};

// Some ranks did not arrive in time; `Team::late` has them.
class Stalled : public std::runtime_error {
  public:
    Stalled() : std::runtime_error("some ranks of this host did not arrive") {}
};

enum class Op { sum, min, max };

// What a rank is doing; for reports of a stall. The numbers are part of the interface to Python.
enum class Phase : std::uint32_t { local_steps, agreement, reduce, reduce_scatter, slice_step, all_gather, closing };

class Team {
  public:
    static constexpr std::size_t kMaxValues = 512;  // doubles of one message

    // Bytes that a team of `size` ranks needs, zeroed before the first `Team` is made over them.
    static std::size_t num_bytes(int size);

    // Takes seat `rank` of `size`. `spins`: how often to look for the others before going to sleep; 0 where
    // there are more ranks than cores. Not collective, but every seat must be taken before the first barrier
    // of any rank: a seat that was never taken cannot be seen to die.
    Team(std::byte* memory, int rank, int size, int spins);
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
    // Gives the seat up in an orderly way: peers do not see a death.
    ~Team();

    int rank() const noexcept { return rank_; }
    int size() const noexcept { return size_; }

    // Returns when every rank has called it as often as this one. What any rank wrote before its call, every
    // rank reads after its own. Throws RankDied, or Stalled where the patience is over; the team cannot be used after that.
    void barrier(const Patience& patience);

    // result[i] := the reduction of values[i] over the ranks, in rank order. One barrier; `count` at most kMaxValues.
    void allreduce(const double* values, double* result, std::size_t count, Op op, const Patience& patience);

    // The values of every rank, by rank. One barrier; the same number on every rank, at most kMaxValues.
    std::vector<std::vector<double>> gather(const std::vector<double>& values, const Patience& patience);

    // Ranks that died so far, ascending; does not wait.
    std::vector<int> dead() const;

    // After Stalled: the ranks that did not arrive, ascending.
    const std::vector<int>& late() const noexcept { return late_; }

    // Throws RankDied if a rank died, or if the team was revoked; does not wait.
    void check_alive() const;

    // Says what this rank does from now on, and what `rank` last said.
    void enter(Phase phase) noexcept;
    Phase phase(int rank) const noexcept;

    // Lets every rank that waits now or later in a barrier throw RankDied without a rank: for a loss that was
    // seen elsewhere.
    void revoke() noexcept;

  private:
    struct Seat;
    struct Gate;
    bool all_entered(std::uint64_t round) const noexcept;
    void wait(std::uint64_t round, const Patience& patience);
    double* mailbox(std::uint64_t round, int rank) const noexcept;
    std::uint64_t post(const double* values, std::size_t count, const Patience& patience);

    std::byte* memory_;
    Gate* gate_;
    Seat* seats_;
    int rank_;
    int size_;
    int spins_;
    std::uint64_t round_ = 0;
    std::vector<int> late_;
};

}  // namespace hvd_train::shm
