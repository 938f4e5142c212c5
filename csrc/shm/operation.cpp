#include "shm/operation.hpp"

#include <pthread.h>
#include <signal.h>

namespace hvd_train::shm {

Operation::~Operation() {
    if (thread_.joinable()) thread_.join();
}

void Operation::start(bool reduce_only) {
    background_ = true;
    // Signals are for the threads that know of them: this one inherits a mask that lets none through.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this, reduce_only] {
        try {
            reduce_only ? reduce() : run();
        } catch (...) {
            error_ = std::current_exception();
        }
        ended_.store(true, std::memory_order_release);
    });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Operation::wait() {
    if (thread_.joinable()) thread_.join();
    background_ = false;
    if (error_) std::rethrow_exception(error_);
}

void HostAverage::reduce() {
    team_.enter(Phase::reduce);
    buffer_.reduce(task_.shares, FlatBuffer::kNone, task_.owned, buffer_.slice());
    team_.enter(Phase::slice_step);
}

void HostAverage::spread() {
    team_.enter(Phase::all_gather);
    buffer_.open(task_.slot);
    buffer_.spread(task_.owned, FlatBuffer::kNone, task_.slot, buffer_.slice());
    close();
}

void HostAverage::run() {
    team_.enter(Phase::reduce);
    buffer_.open(task_.slot);
    buffer_.average(task_.shares, task_.slot, buffer_.slice());
    close();
}

void HostAverage::close() {
    buffer_.close(task_.slot, task_.version);
    team_.enter(Phase::closing);
    team_.barrier(task_.patience);
    team_.enter(Phase::local_steps);
}

}  // namespace hvd_train::shm
