// How long a rank waits for others: a fixed time, or as long as something outside says that they still work.
#pragma once

#include <chrono>

namespace hvd_train {

// What a wait may ask. Plain pointers, so that extensions that share no C++ types can hand it to each other.
struct Hooks {
    void* self;
    // Whether to go on waiting, after `idle_s` seconds in which nothing moved in this wait.
    bool (*more)(void* self, double idle_s);
    // Something moved: a message came or went.
    void (*moved)(void* self);
};

class Patience {
  public:
    using Clock = std::chrono::steady_clock;

    // NOLINTNEXTLINE(google-explicit-constructor): a time is the usual case.
    Patience(std::chrono::nanoseconds timeout = {}, const Hooks* hooks = nullptr) : timeout_(timeout), hooks_(hooks) {}

    // Whether to give up, where nothing has moved since `since`.
    bool over(Clock::time_point since) const {
        const auto idle = Clock::now() - since;
        if (hooks_ == nullptr) return idle > timeout_;
        return !hooks_->more(hooks_->self, std::chrono::duration<double>(idle).count());
    }

    void moved() const {
        if (hooks_ != nullptr) hooks_->moved(hooks_->self);
    }

  private:
    std::chrono::nanoseconds timeout_;
    const Hooks* hooks_;
};

}  // namespace hvd_train
