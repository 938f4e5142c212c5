#include "ring/layout.hpp"

#include <algorithm>

namespace hvd_train::ring {

int Topology::num_channels() const noexcept {
    int most = 0;
    for (const auto& host : ranks) most = std::max(most, static_cast<int>(host.size()));
    return most;
}

int Topology::driver(int at, int channel) const noexcept {
    return ranks[static_cast<std::size_t>(at)][static_cast<std::size_t>(channel % local_size(at))];
}

// Where the channel's slice lies among those of its host's part: ordered by driver, then by channel.
int Layout::position(int at, int channel) const noexcept {
    const int drivers = topology_.local_size(at);
    const int channels = topology_.num_channels();
    const int driver = channel % drivers;
    // The drivers before this one have (channels - d + drivers - 1) / drivers channels each.
    int before = 0;
    for (int d = 0; d < driver; ++d) before += (channels - d + drivers - 1) / drivers;
    return before + channel / drivers;
}

Span Layout::slice(int at, int channel) const noexcept {
    const Span part = shm::part_of({0, numel_}, topology_.num_hosts(), at);
    return shm::part_of(part, topology_.num_channels(), position(at, channel));
}

Span Layout::owned(int at, int local_rank) const noexcept {
    const int drivers = topology_.local_size(at);
    int last = local_rank;
    while (last + drivers < topology_.num_channels()) last += drivers;
    return {slice(at, local_rank).begin, slice(at, last).end};
}

}  // namespace hvd_train::ring
