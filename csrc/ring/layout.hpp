// Who sends, sums and owns which elements, over hosts with any numbers of ranks.
#pragma once

#include <cstddef>
#include <vector>

#include "shm/flat_buffer.hpp"

namespace hvd_train::ring {

using shm::Span;

// The ranks of all hosts, and this rank's place among them.
struct Topology {
    std::vector<std::vector<int>> ranks;  // of each host, in the order of their local ranks
    int host = 0;
    int local_rank = 0;

    int num_hosts() const noexcept { return static_cast<int>(ranks.size()); }
    int local_size(int at) const noexcept { return static_cast<int>(ranks[static_cast<std::size_t>(at)].size()); }
    // Each channel is a ring of its own through one rank of each host: as many as the largest host has ranks.
    int num_channels() const noexcept;
    // The rank that drives a channel on a host: local rank (channel mod local size).
    int driver(int at, int channel) const noexcept;
};

// Cuts a buffer into one part for each host, all of one size, and each part into one slice for each channel. In the
// part of a host the slices of one driver lie side by side, so that what a rank owns is one span.
class Layout {
  public:
    Layout(const Topology& topology, std::size_t numel) : topology_(topology), numel_(numel) {}

    // What goes round channel `channel` and ends at host `at`.
    Span slice(int at, int channel) const noexcept;
    // What local rank `local_rank` of host `at` owns: its slices together.
    Span owned(int at, int local_rank) const noexcept;

  private:
    int position(int at, int channel) const noexcept;

    const Topology& topology_;
    std::size_t numel_;
};

}  // namespace hvd_train::ring
