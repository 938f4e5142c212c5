// One average as an object: in two halves with a slice step between them, or in one pass; here, or in a thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "liveness/patience.hpp"
#include "shm/flat_buffer.hpp"
#include "shm/team.hpp"

namespace hvd_train::shm {

// What an average is of: the same on all ranks of a host but for `owned`.
struct Task {
    std::vector<double> shares;  // of this host's ranks
    int slot = 0;                // where x_(t+1) is built
    std::uint64_t version = 0;   // t + 1, counted from 1
    void* owned = nullptr;       // of the wide type: the slice that this rank owns
    Patience patience{};     // with the others
};

// Used once. Either `run`, or `reduce` and then `spread`; all ranks the same, with all inputs written and seen before.
class Operation {
  public:
    Operation(Team& team, const FlatBuffer& buffer, Task task) : team_(team), buffer_(buffer), task_(std::move(task)) {}
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;
    virtual ~Operation();

    // owned := this rank's slice of the mean.
    virtual void reduce() = 0;
    // live and slot := the owned slices of all ranks. Ends with a barrier.
    virtual void spread() = 0;
    // Both at once; live and slot := the mean.
    virtual void run() = 0;

    // Begins `run`, or `reduce` alone, in a thread of its own.
    void start(bool reduce_only);
    // Whether that thread has ended.
    bool test() const noexcept { return ended_.load(std::memory_order_acquire); }
    // Waits for it; throws what it threw.
    void wait();

  protected:
    Team& team_;
    const FlatBuffer& buffer_;
    const Task task_;
    bool background_ = false;

  private:
    std::thread thread_;
    std::atomic<bool> ended_{false};
    std::exception_ptr error_;
};

// An average of the ranks of one host: nothing leaves it.
class HostAverage final : public Operation {
  public:
    using Operation::Operation;
    void reduce() override;
    void spread() override;
    void run() override;

  private:
    void close();
};

}  // namespace hvd_train::shm
