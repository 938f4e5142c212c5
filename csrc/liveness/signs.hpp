// Signs of life: how a rank that waits for another learns whether that one still works.
//
// Every rank counts what it gets done (`mark`). A thread without Python looks at that count, and at the CPU time of the
// training thread. Where the rank has been in one place for a quarter of the timeout, in its own work or in a call that
// waits for others, the thread writes what it saw into a small file, again and again. Where the rank waits for half of
// the timeout, the thread reads the files of the others. In a training whose rounds are short a file is written once.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
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

    // Made by the training thread, which is the one that is watched. Writes the first sign at once.
    //
    // folder: seen by all ranks; made if it is not there. step_timeout: a rank whose marks do not change for so long counts
    // as missing whatever CPU time it uses; zero: never.
    Signs(std::string folder, int rank, int size, std::chrono::nanoseconds timeout, std::chrono::nanoseconds step_timeout);
    Signs(const Signs&) = delete;
    Signs& operator=(const Signs&) = delete;
    // Removes this rank's sign, and the folder if it is the last in it; in a process that was forked it does nothing, and
    // where the file system does not answer it leaves both.
    ~Signs();

    // Whether the signs of all ranks can be read now.
    bool sees_all() const;

    // Around every collective call, the same calls on every rank. `extra`: how much longer than the timeout the call may
    // take where every rank is in it and none reports progress.
    void enter(std::chrono::nanoseconds extra);
    void leave();

    // Whether to go on waiting in a call, after `idle` in which nothing moved here. To be asked often; does not touch the
    // file system, which may hang.
    bool keep_waiting(std::chrono::nanoseconds idle);

    // After `keep_waiting` said no: the ranks without progress, ascending; none where all are there and nothing moves.
    const std::vector<Missing>& missing() const noexcept { return missing_; }

    const Hooks* hooks() const noexcept { return &hooks_; }

  private:
    struct State;
    // Shared with the thread, which may outlive this object where the file system hangs.
    std::shared_ptr<State> state_;
    // Not a member by value: a fork has the object, but not the thread.
    std::thread* thread_;
    Hooks hooks_;
    std::vector<Missing> missing_;
    std::chrono::nanoseconds extra_{};
    Clock::time_point entered_;
};

}  // namespace hvd_train::liveness
