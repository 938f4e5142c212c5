#include "ring/channel.hpp"

#include <algorithm>
#include <cstring>

namespace hvd_train::ring {
namespace {

std::size_t num_segments(Span span) noexcept { return (span.size() + kSegment - 1) / kSegment; }

Span segment_of(Span span, std::size_t index) noexcept {
    const std::size_t begin = span.begin + index * kSegment;
    return {begin, std::min(begin + kSegment, span.end)};
}

void encode(const Round& round, const void* sums, std::size_t n, std::byte* out) {
    round.double_precision() ? encode(round.wire, static_cast<const double*>(sums), n, out)
                             : encode(round.wire, static_cast<const float*>(sums), n, out);
}

void decode(const Round& round, const std::byte* bytes, std::size_t n, void* sums) {
    round.double_precision() ? decode(round.wire, bytes, n, static_cast<double*>(sums))
                             : decode(round.wire, bytes, n, static_cast<float*>(sums));
}

bool all_finite(const Round& round, const void* sums, std::size_t n) {
    return round.double_precision() ? finite(static_cast<const double*>(sums), n)
                                    : finite(static_cast<const float*>(sums), n);
}

void reserve(std::vector<std::byte>& memory, std::size_t num_bytes) {
    if (memory.size() < num_bytes) memory.resize(num_bytes);
}

}  // namespace

Channel::Channel(const Round& round, int channel, Desk& desk)
    : round_(round), desk_(desk), channel_(channel), slot_bytes_(kSegment * round.wide_size()) {
    const Topology& topology = round.topology;
    const int h = topology.num_hosts();
    steps_ = 2 * (h - 1);
    last_reduce_ = h - 2;
    previous_ = topology.driver((topology.host + h - 1) % h, channel);
    next_ = topology.driver((topology.host + 1) % h, channel);
    std::size_t most = 0;
    std::size_t before = 0;
    for (int step = 0; step < steps_; ++step) {
        sent_before_.push_back(before);
        before += num_segments(sending(step));
        most = std::max(most, num_segments(receiving(step)));
    }
    reserve(desk.inbox, most * slot_bytes_);
    reserve(desk.outbox, kWindow * slot_bytes_);
    reserve(desk.sums, 2 * slot_bytes_);
    settle(posted_, false);
    settle(received_, false);
    settle(sent_, true);
}

Span Channel::sending(int step) const noexcept {
    const int h = round_.topology.num_hosts();
    return round_.layout.slice((round_.topology.host + 2 * h - 1 - step) % h, channel_);
}

// Moves a cursor that stands at the end of a step to the first segment of the next that has any.
void Channel::settle(Cursor& at, bool outgoing) const noexcept {
    while (at.step < steps_ && at.segment == num_segments(outgoing ? sending(at.step) : receiving(at.step))) {
        ++at.step;
        at.segment = 0;
    }
}

void Channel::advance(Cursor& at, bool outgoing) const noexcept {
    ++at.segment;
    ++at.count;
    settle(at, outgoing);
}

bool Channel::progress(bool gather) {
    bool moved = false;
    while (!outgoing_.empty() && outgoing_.front().test()) {
        outgoing_.pop_front();
        moved = true;
    }
    moved |= post(gather);
    moved |= take();
    while (ready(gather)) {
        send();
        moved = true;
    }
    return moved;
}

// Asks for the next segment, where its place in the inbox is free: what lay there has been sent on in this step of
// the sends. A slice may have one segment less than another, and then the last of them stands for it. Before the
// all-gather nothing of it is asked for: if the slice step fails, the next average would miss its first messages.
bool Channel::post(bool gather) {
    bool moved = false;
    while (posted_.step < (gather ? steps_ : last_reduce_ + 1) && posted_.count < received_.count + kWindow) {
        if (posted_.step > 0) {
            const std::size_t there = num_segments(sending(posted_.step));
            const std::size_t needed =
                sent_before_[static_cast<std::size_t>(posted_.step)] + std::min(posted_.segment + 1, there);
            if (sent_.count < needed) break;
        }
        const Span span = segment_of(receiving(posted_.step), posted_.segment);
        incoming_.push_back(
            Message::receive(round_.comm, inbox(posted_.segment), num_bytes(span), previous_, channel_));
        advance(posted_, false);
        moved = true;
    }
    return moved;
}

bool Channel::take() {
    if (incoming_.empty() || !incoming_.front().test()) return false;
    incoming_.pop_front();
    const Span span = segment_of(receiving(received_.step), received_.segment);
    const std::byte* bytes = inbox(received_.segment);
    if (received_.step == last_reduce_) std::memcpy(owned_at(span), sum(bytes, span), span.size() * round_.wide_size());
    if (received_.step > last_reduce_) publish(bytes, span);
    advance(received_, false);
    return true;
}

// Whether the next segment can be sent: there is room, and what it is made of has come.
bool Channel::ready(bool gather) const noexcept {
    if (sent_.step == steps_ || outgoing_.size() == kWindow) return false;
    if (sent_.step > last_reduce_ && !gather) return false;
    if (sent_.step == 0) return true;
    return received_.step >= sent_.step || (received_.step == sent_.step - 1 && received_.segment > sent_.segment);
}

void Channel::send() {
    const Span span = segment_of(sending(sent_.step), sent_.segment);
    std::byte* out = desk_.outbox.data() + sent_.count % kWindow * slot_bytes_;
    const std::size_t n = num_bytes(span);
    fill(out, n, span);
    outgoing_.push_back(Message::send(round_.comm, out, n, next_, channel_));
    payload_bytes_ += n;
    advance(sent_, true);
}

void Channel::fill(std::byte* out, std::size_t num_bytes, Span span) {
    const std::byte* received = sent_.step == 0 ? nullptr : inbox(sent_.segment);
    if (sent_.step <= last_reduce_) {
        encode(round_, sum(received, span), span.size(), out);
    } else if (sent_.step == last_reduce_ + 1) {
        encode(round_, finished_sum(span), span.size(), out);
        publish(out, span);  // the owner takes what it sends, not what it has
    } else {
        std::memcpy(out, received, num_bytes);
    }
}

// What came from the hosts before this one, in that order, and then what the ranks of this one give.
const void* Channel::sum(const std::byte* received, Span span) {
    std::byte* local = desk_.sums.data();
    round_.buffer.reduce(round_.task.shares, round_.base(), local, span);
    if (received != nullptr) {
        std::byte* partial = desk_.sums.data() + slot_bytes_;
        decode(round_, received, span.size(), partial);
        shm::accumulate(round_.buffer.type(), partial, local, span.size());
    }
    return local;
}

// The owned segment as it is sent: as it is, or its difference from the anchor.
const void* Channel::finished_sum(Span span) {
    if (!round_.holds_mean) return owned_at(span);
    std::byte* difference = desk_.sums.data();
    round_.buffer.widen(round_.base(), -1, difference, span);
    shm::accumulate(round_.buffer.type(), owned_at(span), difference, span.size());
    return difference;
}

// A segment of the result, as every host has it, to this host's tensors.
void Channel::publish(const std::byte* bytes, Span span) {
    std::byte* mean = desk_.sums.data();
    decode(round_, bytes, span.size(), mean);
    if (round_.wire != Wire::full) overflowed_ |= !all_finite(round_, mean, span.size());
    round_.buffer.spread(mean, round_.base(), round_.task.slot, span);
}

std::byte* Channel::owned_at(Span span) const noexcept {
    return static_cast<std::byte*>(round_.task.owned) + (span.begin - round_.owned.begin) * round_.wide_size();
}

}  // namespace hvd_train::ring
