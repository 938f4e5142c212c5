#include "shm/team.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hvd_train::shm {
namespace {

constexpr std::size_t kLine = 64;
// How long a sleeper sleeps at the most before it looks whether its peers live. Nobody rings for the dead.
constexpr long kNapNs = 2'000'000;
// How many looks for arrivals fall between two looks for deaths while spinning.
constexpr int kSpinsPerCheck = 4096;

std::string list(const std::vector<int>& ranks) {
    std::string text;
    for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
    return text;
}

void relax() noexcept {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::uint32_t* word(std::atomic<std::uint32_t>& value) noexcept {
    static_assert(sizeof value == sizeof(std::uint32_t) && std::atomic<std::uint32_t>::is_always_lock_free);
    return reinterpret_cast<std::uint32_t*>(&value);
}

void futex_wait(std::atomic<std::uint32_t>& value, std::uint32_t expected) noexcept {
    timespec nap{0, kNapNs};
    syscall(SYS_futex, word(value), FUTEX_WAIT, expected, &nap, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& value) noexcept {
    syscall(SYS_futex, word(value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void check(int status, const char* what) {
    if (status != 0) throw std::system_error(status, std::generic_category(), what);
}

}  // namespace

RankDied::RankDied(std::vector<int> dead)
    : std::runtime_error(dead.empty() ? "a rank was lost" : "rank " + list(dead) + " of this host died"),
      ranks(std::move(dead)) {}

// One line or more each, so that no rank's stores slow another's loads.
struct alignas(kLine) Team::Seat {
    // Held from construction to destruction. The kernel marks it when its holder dies, however that dies.
    pthread_mutex_t life;
    alignas(kLine) std::atomic<std::uint64_t> entered;
    std::atomic<std::uint32_t> state;
    std::atomic<std::uint32_t> phase;
};

struct alignas(kLine) Team::Gate {
    std::atomic<std::uint32_t> bell;
    alignas(kLine) std::atomic<std::uint32_t> sleepers;
    std::atomic<std::uint32_t> revoked;
};

namespace {
enum : std::uint32_t { kEmpty = 0, kTaken = 1, kLeft = 2, kDead = 3 };
}

std::size_t Team::num_bytes(int size) {
    const auto p = static_cast<std::size_t>(size);
    return sizeof(Gate) + p * sizeof(Seat) + 2 * p * kMaxValues * sizeof(double);
}

Team::Team(std::byte* memory, int rank, int size, int spins)
    : memory_(memory),
      gate_(reinterpret_cast<Gate*>(memory)),
      seats_(reinterpret_cast<Seat*>(memory + sizeof(Gate))),
      rank_(rank),
      size_(size),
      spins_(spins) {
    pthread_mutexattr_t attributes;
    check(pthread_mutexattr_init(&attributes), "pthread_mutexattr_init");
    check(pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED), "a process-shared mutex");
    check(pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST), "a robust mutex");
    Seat& seat = seats_[rank];
    check(pthread_mutex_init(&seat.life, &attributes), "pthread_mutex_init");
    pthread_mutexattr_destroy(&attributes);
    check(pthread_mutex_lock(&seat.life), "pthread_mutex_lock");
    seat.state.store(kTaken, std::memory_order_release);
}

Team::~Team() {
    Seat& seat = seats_[rank_];
    seat.state.store(kLeft, std::memory_order_release);
    pthread_mutex_unlock(&seat.life);
}

double* Team::mailbox(std::uint64_t round, int rank) const noexcept {
    const auto p = static_cast<std::size_t>(size_);
    std::byte* boxes = memory_ + sizeof(Gate) + p * sizeof(Seat);
    const std::size_t index = (round % 2) * p + static_cast<std::size_t>(rank);
    return reinterpret_cast<double*>(boxes) + index * kMaxValues;
}

bool Team::all_entered(std::uint64_t round) const noexcept {
    for (int r = 0; r < size_; ++r) {
        // Acquire: what rank r wrote before it entered is visible from here on. Sequentially consistent, so that
        // it cannot move before this rank's own note that it sleeps; see `barrier`.
        if (seats_[r].entered.load(std::memory_order_seq_cst) < round) return false;
    }
    return true;
}

void Team::barrier(const Patience& patience) {
    ++round_;
    // Either this store is seen by a rank that is about to sleep, or its note in `sleepers` is seen here: both
    // orders are sequentially consistent.
    seats_[rank_].entered.store(round_, std::memory_order_seq_cst);
    if (gate_->sleepers.load(std::memory_order_seq_cst) != 0) {
        gate_->bell.fetch_add(1, std::memory_order_seq_cst);
        futex_wake_all(gate_->bell);
    }
    wait(round_, patience);
}

void Team::wait(std::uint64_t round, const Patience& patience) {
    for (int spin = 0; spin < spins_; ++spin) {
        if (all_entered(round)) return;
        if (spin % kSpinsPerCheck == kSpinsPerCheck - 1) check_alive();
        relax();
    }
    const auto begun = Patience::Clock::now();
    while (true) {
        gate_->sleepers.fetch_add(1, std::memory_order_seq_cst);
        const std::uint32_t rung = gate_->bell.load(std::memory_order_seq_cst);
        const bool complete = all_entered(round);
        if (!complete) futex_wait(gate_->bell, rung);
        gate_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
        if (complete || all_entered(round)) return;
        check_alive();
        if (patience.over(begun)) {
            for (int r = 0; r < size_; ++r) {
                if (seats_[r].entered.load(std::memory_order_acquire) < round) late_.push_back(r);
            }
            throw Stalled();
        }
    }
}

std::vector<int> Team::dead() const {
    std::vector<int> found;
    for (int r = 0; r < size_; ++r) {
        Seat& seat = seats_[r];
        std::uint32_t state = seat.state.load(std::memory_order_acquire);
        if (state == kTaken && r != rank_) {
            const int status = pthread_mutex_trylock(&seat.life);
            if (status == EOWNERDEAD || status == 0) {
                // The mutex is this rank's now. It is marked consistent and let go, so that the next who
                // asks does not wait for this one; the state remembers the death.
                state = seat.state.load(std::memory_order_acquire) == kLeft ? kLeft : kDead;
                seat.state.store(state, std::memory_order_release);
                if (status == EOWNERDEAD) pthread_mutex_consistent(&seat.life);
                pthread_mutex_unlock(&seat.life);
            }
        }
        if (state == kDead) found.push_back(r);
    }
    return found;
}

void Team::check_alive() const {
    const std::vector<int> found = dead();
    if (!found.empty() || gate_->revoked.load(std::memory_order_acquire) != 0) throw RankDied(found);
}

void Team::revoke() noexcept {
    gate_->revoked.store(1, std::memory_order_release);
    gate_->bell.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(gate_->bell);
}

void Team::enter(Phase phase) noexcept {
    seats_[rank_].phase.store(static_cast<std::uint32_t>(phase), std::memory_order_relaxed);
}

Phase Team::phase(int rank) const noexcept {
    return static_cast<Phase>(seats_[rank].phase.load(std::memory_order_relaxed));
}

// Puts the values of every rank into its mailbox of the round that is returned.
std::uint64_t Team::post(const double* values, std::size_t count, const Patience& patience) {
    if (count > kMaxValues) throw std::invalid_argument("too many values for one message");
    // Two mailboxes a rank, in turn: nobody can write to one that a slower rank still reads, as for that it
    // would have to pass the barrier of the other, which the slower rank has not entered.
    const std::uint64_t round = round_ + 1;
    std::memcpy(mailbox(round, rank_), values, count * sizeof(double));
    barrier(patience);
    return round;
}

std::vector<std::vector<double>> Team::gather(const std::vector<double>& values, const Patience& patience) {
    const std::uint64_t round = post(values.data(), values.size(), patience);
    std::vector<std::vector<double>> rows;
    for (int r = 0; r < size_; ++r) rows.emplace_back(mailbox(round, r), mailbox(round, r) + values.size());
    return rows;
}

void Team::allreduce(
    const double* values, double* result, std::size_t count, Op op, const Patience& patience) {
    const std::uint64_t round = post(values, count, patience);
    std::memcpy(result, mailbox(round, 0), count * sizeof(double));
    for (int r = 1; r < size_; ++r) {
        const double* theirs = mailbox(round, r);
        for (std::size_t i = 0; i < count; ++i) {
            if (op == Op::sum) result[i] += theirs[i];
            if (op == Op::min) result[i] = std::min(result[i], theirs[i]);
            if (op == Op::max) result[i] = std::max(result[i], theirs[i]);
        }
    }
}

}  // namespace hvd_train::shm
