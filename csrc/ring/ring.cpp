#include "ring/ring.hpp"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace hvd_train::ring {
namespace {

// How many fruitless looks at the network fall between two looks for the dead of this host.
constexpr std::size_t kLooksPerCheck = 256;
// Fruitless looks before a rank offers its core to others.
constexpr std::size_t kSpins = 64;
// How long a thread in the background leaves the core to training between two looks.
constexpr std::chrono::microseconds kNap{50};

}  // namespace

Ring::Ring(MPI_Comm comm, Topology topology) : comm_(comm), topology_(std::move(topology)) {
    if (topology_.num_hosts() < 2) throw std::invalid_argument("a ring needs two hosts; one averages by itself");
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    const int step = topology_.local_size(topology_.host);
    for (int c = topology_.local_rank; c < topology_.num_channels(); c += step) channels_.push_back(c);
    desks_ = std::make_unique<std::vector<Desk>>(channels_.size());
}

Ring::~Ring() {
    // After a failure messages may still be under way, into memory that therefore stays until the process ends.
    if (broken_) static_cast<void>(desks_.release());
}

Span Ring::owned(std::size_t numel) const noexcept {
    return Layout(topology_, numel).owned(topology_.host, topology_.local_rank);
}

RingAverage::RingAverage(Ring& ring, shm::Team& team, const shm::FlatBuffer& buffer, shm::Task task, Wire wire)
    : Operation(team, buffer, std::move(task)),
      ring_(ring),
      layout_(ring.topology_, buffer.numel()),
      round_{ring.comm_, ring.topology_, layout_, buffer_, task_, wire, ring.owned(buffer.numel())} {
    channels_.reserve(ring.channels_.size());
    for (std::size_t i = 0; i < ring.channels_.size(); ++i) {
        channels_.emplace_back(round_, ring.channels_[i], (*ring.desks_)[i]);
    }
}

void RingAverage::begin() {
    // What the ranks of this host wrote is visible to all of them from here on.
    team_.barrier(task_.patience);
    team_.enter(shm::Phase::reduce_scatter);
}

void RingAverage::reduce() {
    begin();
    drive(false);
    to_mean();
    round_.holds_mean = round_.base() != shm::FlatBuffer::kNone;
    team_.enter(shm::Phase::slice_step);
}

void RingAverage::spread() {
    team_.enter(shm::Phase::all_gather);
    buffer_.open(task_.slot);
    drive(true);
    close();
}

void RingAverage::run() {
    begin();
    buffer_.open(task_.slot);
    drive(true);
    to_mean();
    close();
}

// Where differences were summed: owned := anchor + owned.
void RingAverage::to_mean() {
    if (round_.base() == shm::FlatBuffer::kNone) return;
    std::vector<std::byte> anchor(kSegment * round_.wide_size());
    for (std::size_t at = round_.owned.begin; at < round_.owned.end; at += kSegment) {
        const Span span{at, std::min(at + kSegment, round_.owned.end)};
        buffer_.widen(round_.base(), 1, anchor.data(), span);
        auto* owned = static_cast<std::byte*>(task_.owned) + (at - round_.owned.begin) * round_.wide_size();
        shm::accumulate(buffer_.type(), anchor.data(), owned, span.size());
    }
}

void RingAverage::drive(bool gather) {
    using Clock = Patience::Clock;
    auto last_move = Clock::now();
    ring_.broken_ = true;  // until nothing is under way any more
    for (std::size_t idle = 0;;) {
        bool moved = false;
        bool reduced = true;
        bool done = true;
        for (Channel& channel : channels_) {
            moved |= channel.progress(gather);
            reduced &= channel.reduced();
            done &= gather ? channel.finished() : channel.reduced();
        }
        if (gather && reduced) team_.enter(shm::Phase::all_gather);
        if (done) break;
        idle = moved ? 0 : idle + 1;
        if (moved) task_.patience.moved();
        if (idle == 1) last_move = Clock::now();
        if (idle > 0) rest(idle);
        if (idle % kLooksPerCheck == kLooksPerCheck - 1) {
            team_.check_alive();
            if (task_.patience.over(last_move)) {
                const auto late = std::find_if(channels_.begin(), channels_.end(), [gather](const Channel& c) {
                    return gather ? !c.finished() : !c.reduced();
                });
                ring_.late_ = late->previous_rank();
                throw PeerStalled(ring_.late_);
            }
        }
    }
    ring_.broken_ = false;
    if (!gather) return;
    for (const Channel& channel : channels_) ring_.payload_bytes_ += channel.payload_bytes();
}

void RingAverage::rest(std::size_t idle) {
    if (background_) {
        std::this_thread::sleep_for(kNap);
    } else if (idle > kSpins) {
        sched_yield();
    }
}

void RingAverage::close() {
    const bool overflowed =
        std::any_of(channels_.begin(), channels_.end(), [](const Channel& channel) { return channel.overflowed(); });
    // A slot that holds what is not finite is never complete.
    if (!overflowed) buffer_.close(task_.slot, task_.version);
    team_.enter(shm::Phase::closing);
    const double mine = overflowed ? 1 : 0;
    double any = 0;
    team_.allreduce(&mine, &any, 1, shm::Op::max, task_.patience);
    if (any > 0) throw Overflow();
    team_.enter(shm::Phase::local_steps);
}

}  // namespace hvd_train::ring
