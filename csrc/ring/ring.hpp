// Averages over the ranks of several hosts: shared memory within each, rings of messages between them.
#pragma once

#include <mpi.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ring/channel.hpp"
#include "ring/layout.hpp"
#include "shm/operation.hpp"

namespace hvd_train::ring {

// A sum of differences does not fit into the type that carries it. All ranks throw it together.
class Overflow : public std::runtime_error {
  public:
    Overflow() : std::runtime_error("a difference from the anchor does not fit into the type on the wire") {}
};

// A rank of another host did not send for too long.
class PeerStalled : public std::runtime_error {
  public:
    explicit PeerStalled(int rank) : std::runtime_error("no message from rank " + std::to_string(rank)) {}
};

// The channels that this rank drives, and the memory that they work in.
class Ring {
  public:
    // At least two hosts. `comm` has a rank for each number in `topology`, and is used by nobody else.
    Ring(MPI_Comm comm, Topology topology);
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;
    ~Ring();

    // What this rank owns of a buffer of `numel` elements.
    Span owned(std::size_t numel) const noexcept;
    // Bytes that this rank has given to MPI for other hosts so far.
    std::uint64_t payload_bytes() const noexcept { return payload_bytes_.load(std::memory_order_relaxed); }
    // After PeerStalled: which rank did not send.
    int late() const noexcept { return late_; }

  private:
    friend class RingAverage;
    MPI_Comm comm_;
    const Topology topology_;
    std::vector<int> channels_;
    std::unique_ptr<std::vector<Desk>> desks_;
    std::atomic<std::uint64_t> payload_bytes_{0};
    int late_ = -1;
    bool broken_ = false;
};

class RingAverage final : public shm::Operation {
  public:
    RingAverage(Ring& ring, shm::Team& team, const shm::FlatBuffer& buffer, shm::Task task, Wire wire);
    void reduce() override;
    void spread() override;
    void run() override;

  private:
    void begin();
    void drive(bool gather);
    void rest(std::size_t idle);
    void to_mean();
    void close();

    Ring& ring_;
    const Layout layout_;
    Round round_;
    std::vector<Channel> channels_;
};

}  // namespace hvd_train::ring
