// One ring through one rank of each host, and one rank's part in it: a state machine that never waits.
//
// The ring has 2 (h - 1) steps for h hosts. In step j host g sends slice g - 1 - j to host g + 1 and receives slice
// g - 2 - j from host g - 1 (all modulo h). In the first h - 1 steps, the reduce-scatter, each host adds its own ranks'
// sum to what it received and sends that on; after them host g holds the whole sum of slice g. In the other h - 1, the
// all-gather, the finished slices go round. Steps are cut into segments, and a segment is sent on as soon as it is
// there, so that receiving, summing and sending overlap.
//
// What came in step j is what goes out in step j + 1. It waits in `inbox_`, which has room for the segments of one
// slice: a segment may only be received once the segment that it would overwrite has been sent on.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <deque>
#include <vector>

#include "ring/codec.hpp"
#include "ring/layout.hpp"
#include "ring/link.hpp"
#include "shm/flat_buffer.hpp"
#include "shm/operation.hpp"

namespace hvd_train::ring {

// Elements of a segment: long enough for a message to be worth its overhead, and at most 32 KiB of float32, which an
// MPI sends at once over TCP. What is longer (64 KiB for Open MPI) it announces first, and the answer comes behind all
// that the other host is sending: at 100 Mbit/s averages were seen to take half as long again. A multiple of the
// codec's block.
constexpr std::size_t kSegment = 8192;
// Segments that may be on their way to the next host at a time.
constexpr std::size_t kWindow = 32;

// The memory that a channel works in; kept from one average to the next.
struct Desk {
    std::vector<std::byte> inbox;
    std::vector<std::byte> outbox;
    std::vector<std::byte> sums;
};

// What all channels of one average have in common.
struct Round {
    MPI_Comm comm;
    const Topology& topology;
    const Layout& layout;
    const shm::FlatBuffer& buffer;
    const shm::Task& task;
    Wire wire;
    Span owned;
    // Whether `task.owned` holds the mean itself, as it does after a slice step, where differences are sent.
    bool holds_mean = false;
    bool double_precision() const noexcept { return buffer.type() == shm::Type::float64; }
    std::size_t wide_size() const noexcept { return double_precision() ? sizeof(double) : sizeof(float); }
    // What is averaged: the values themselves, or their differences from the anchor, which a short type needs.
    int base() const noexcept { return wire == Wire::full ? shm::FlatBuffer::kNone : 1 - task.slot; }
};

class Channel {
  public:
    Channel(const Round& round, int channel, Desk& desk);

    // Does what can be done without waiting; returns whether that was anything. `gather`: also the all-gather.
    bool progress(bool gather);
    // Whether the reduce-scatter is done: this host holds its slice of the sum, and all that it sent has left.
    bool reduced() const noexcept { return passed(last_reduce_ + 1); }
    // Whether everything is done.
    bool finished() const noexcept { return passed(steps_); }
    // Whether a sum did not fit into the wire's type.
    bool overflowed() const noexcept { return overflowed_; }
    std::size_t payload_bytes() const noexcept { return payload_bytes_; }
    int previous_rank() const noexcept { return previous_; }

  private:
    // A segment of a step.
    struct Cursor {
        int step = 0;
        std::size_t segment = 0;
        std::size_t count = 0;  // segments passed so far
    };
    bool passed(int step) const noexcept {
        return received_.step >= step && sent_.step >= step && (outgoing_.empty() || sent_.step > step);
    }
    Span sending(int step) const noexcept;
    Span receiving(int step) const noexcept { return sending(step + 1); }
    void settle(Cursor& at, bool outgoing) const noexcept;
    void advance(Cursor& at, bool outgoing) const noexcept;
    bool post(bool gather);
    bool take();
    void send();
    bool ready(bool gather) const noexcept;
    void fill(std::byte* out, std::size_t num_bytes, Span span);
    void publish(const std::byte* bytes, Span span);
    const void* sum(const std::byte* received, Span span);
    const void* finished_sum(Span span);
    std::size_t num_bytes(Span span) const { return encoded_bytes(round_.wire, round_.double_precision(), span.size()); }
    std::byte* inbox(std::size_t segment) const noexcept { return desk_.inbox.data() + segment * slot_bytes_; }
    std::byte* owned_at(Span span) const noexcept;

    const Round& round_;
    Desk& desk_;
    int channel_;
    int steps_;
    int last_reduce_;  // the last step of the reduce-scatter
    int previous_;
    int next_;
    std::size_t slot_bytes_;
    Cursor posted_, received_, sent_;
    std::vector<std::size_t> sent_before_;  // segments sent in the steps before each
    std::deque<Message> incoming_, outgoing_;
    std::size_t payload_bytes_ = 0;
    bool overflowed_ = false;
};

}  // namespace hvd_train::ring
