// Signs of life: how a rank that waits for another learns whether that one still works.
//
// Every rank counts what it gets done (`mark`). A thread without Python looks at that count, and at the CPU time of the
// training thread. Where the rank has been in one place for a quarter of the timeout, in its own work or in a call that
// waits for others, the thread writes what it saw into a small file, again and again. A rank that waits reads the files
// of the others. In a training whose rounds are short no file is ever written.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <ctime>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "liveness/patience.hpp"

namespace hvd_train::liveness {

// The training thread got something done. Cheap, and safe from any thread.
void mark() noexcept;

// What the training thread does from now on; also a mark. At most 47 bytes of `text` are kept, for ever: texts are few.
void enter_phase(const std::string& text);

// A rank that others wait for without progress. `phase` is empty where it left no sign of it.
struct Missing {
    int rank;
    std::string phase;
};

// What one rank has written. All counts only grow.
struct Sign {
    std::uint64_t magic;
    std::uint64_t beats;     // times that the thread wrote
    std::uint64_t progress;  // times that it saw the rank at work
    std::uint64_t marks;
    std::uint64_t call;      // number of the collective call that the rank is in, or was in last
    std::uint64_t waiting;   // 1 while it is in one
    char phase[48];
    std::uint64_t check;     // of all of the above: a sign that is read while it is written is left out
};

class Signs {
  public:
    using Clock = std::chrono::steady_clock;

    // Made by the training thread, which is the one that is watched.
    //
    // folder: seen by all ranks; made when the first sign is written. step_timeout: a rank whose marks do not change for so
    // long counts as missing whatever CPU time it uses; zero: never.
    Signs(std::string folder, int rank, int size, std::chrono::nanoseconds timeout, std::chrono::nanoseconds step_timeout);
    Signs(const Signs&) = delete;
    Signs& operator=(const Signs&) = delete;
    // Removes this rank's sign, and the folder if it is the last in it.
    ~Signs();

    // Around every collective call, the same calls on every rank. `extra`: how much longer than the timeout the call may
    // take where every rank is in it and none reports progress.
    void enter(std::chrono::nanoseconds extra);
    void leave();

    // Whether to go on waiting in a call, after `idle` in which nothing moved here. To be asked often.
    bool keep_waiting(std::chrono::nanoseconds idle);

    // After `keep_waiting` said no: the ranks without progress, ascending; none where all are there and nothing moves.
    const std::vector<Missing>& missing() const noexcept { return missing_; }

    const Hooks* hooks() const noexcept { return &hooks_; }

  private:
    struct Peer {
        bool seen = false;
        Sign sign{};
        Clock::time_point beat;  // when each was last seen to change
        Clock::time_point progress;
        Clock::time_point marks;
    };

    void run();
    void write() const;
    void look(Clock::time_point now, bool first);
    std::vector<Missing> without_progress(Clock::time_point now) const;
    bool any_progress(Clock::time_point now) const;
    std::string path(int rank) const;

    const std::string folder_;
    const int rank_;
    const int size_;
    const std::chrono::nanoseconds timeout_;
    const std::chrono::nanoseconds step_timeout_;
    const std::chrono::nanoseconds interval_;
    Hooks hooks_;

    // Of the training thread.
    std::chrono::nanoseconds extra_{};
    std::vector<Peer> peers_;
    std::vector<Missing> missing_;
    Clock::time_point entered_;
    Clock::time_point asked_;
    Clock::time_point looked_;
    bool looking_ = false;

    // Between the two threads.
    std::atomic<std::uint64_t> call_{0};
    std::atomic<std::uint64_t> waiting_{0};
    std::atomic<std::uint64_t> progress_{0};

    // Of the thread that writes.
    clockid_t cpu_clock_;
    mutable std::uint64_t beats_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool ending_ = false;
    std::thread thread_;
};

}  // namespace hvd_train::liveness
