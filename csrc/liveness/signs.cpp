#include "liveness/signs.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <mutex>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

namespace hvd_train::liveness {
namespace {

using Clock = Signs::Clock;
using std::chrono::nanoseconds;

constexpr std::uint64_t kMagic = 0x31'6e'67'69'73'64'76'68;  // "hvdsign1"
// A thread that only wakes now and then to look whether it may go on uses less of a core than this.
constexpr double kWorking = 0.01;
constexpr nanoseconds kLongestInterval = std::chrono::seconds(15);
constexpr nanoseconds kShortestInterval = std::chrono::milliseconds(10);
// How long the end waits for a thread that may be in a call to a file system which does not answer.
constexpr std::chrono::seconds kParting{1};

std::atomic<std::uint64_t> marks{0};
std::atomic<const char*> phase{""};

std::uint64_t checksum(const Sign& sign) {
    // FNV-1a; it tells a torn sign from a whole one, nothing more.
    std::uint64_t hash = 0xcbf29ce484222325;
    const auto* bytes = reinterpret_cast<const unsigned char*>(&sign);
    for (std::size_t i = 0; i < offsetof(Sign, check); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

nanoseconds cpu_time(clockid_t clock) {
    timespec now{};
    if (clock_gettime(clock, &now) != 0) return {};
    return std::chrono::seconds(now.tv_sec) + nanoseconds(now.tv_nsec);
}

clockid_t cpu_clock_of_this_thread() {
    clockid_t clock{};
    const int status = pthread_getcpuclockid(pthread_self(), &clock);
    if (status != 0) throw std::system_error(status, std::generic_category(), "pthread_getcpuclockid");
    return clock;
}

// Signals are for the threads that know of them: one that is started meanwhile inherits a mask that lets none through.
class NoSignals {
  public:
    NoSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    NoSignals(const NoSignals&) = delete;
    NoSignals& operator=(const NoSignals&) = delete;
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

}  // namespace

void mark() noexcept { marks.fetch_add(1, std::memory_order_relaxed); }

void enter_phase(const std::string& text) {
    // Never destroyed: a thread may read a text while the process ends.
    static auto& mutex = *new std::mutex;
    static auto& texts = *new std::set<std::string>;  // its nodes stay where they are
    const std::lock_guard<std::mutex> lock(mutex);
    phase.store(texts.insert(text.substr(0, sizeof(Sign::phase) - 1)).first->c_str(), std::memory_order_release);
    mark();
}

struct Signs::State {
    struct Peer {
        std::optional<Sign> sign;
        Clock::time_point beat;  // when each was last seen to change
        Clock::time_point progress;
        Clock::time_point marks;
    };

    State(std::string folder_, int rank_, int size_, nanoseconds timeout_, nanoseconds step_timeout_)
        : folder(std::move(folder_)),
          rank(rank_),
          timeout(timeout_),
          step_timeout(step_timeout_),
          interval(std::clamp(timeout_ / 20, kShortestInterval, kLongestInterval)),
          cpu_clock(cpu_clock_of_this_thread()),
          peers(static_cast<std::size_t>(size_)) {}

    void run();
    void write();
    std::optional<Sign> read(int of) const;
    std::vector<std::optional<Sign>> read_all() const;
    void take(const std::vector<std::optional<Sign>>& signs, Clock::time_point now);
    std::vector<Missing> without_progress(Clock::time_point now) const;
    bool any_progress(Clock::time_point now, nanoseconds extra) const;
    std::string path(int of) const;

    const std::string folder;
    const int rank;
    const nanoseconds timeout;
    const nanoseconds step_timeout;
    const nanoseconds interval;
    const clockid_t cpu_clock;
    const pid_t pid = getpid();

    std::atomic<std::uint64_t> call{0};
    std::atomic<std::uint64_t> waiting{0};
    std::atomic<std::uint64_t> progress{0};
    std::uint64_t beats = 0;  // of the thread

    std::mutex mutex;  // of all that follows
    std::condition_variable wake;
    std::condition_variable ended_or_not;
    bool ending = false;
    bool ended = false;
    bool watching = false;   // this rank waits for so long that the signs of the others are read
    bool first_look = true;  // they have not been read yet in this wait
    bool in_files = false;   // the thread is in a call to the file system
    Clock::time_point woke = Clock::now();
    Clock::time_point resumed = woke;  // when the process was last found to go on after it had been stopped
    std::vector<Peer> peers;
};

Signs::Signs(std::string folder, int rank, int size, nanoseconds timeout, nanoseconds step_timeout)
    : state_(std::make_shared<State>(std::move(folder), rank, size, timeout, step_timeout)),
      thread_(nullptr),
      hooks_{this,
             [](void* self, double idle_s) {
                 const std::chrono::duration<double> idle(idle_s);
                 return static_cast<Signs*>(self)->keep_waiting(std::chrono::duration_cast<nanoseconds>(idle));
             },
             [](void*) { mark(); }} {
    state_->write();
    const NoSignals no_signals;
    thread_ = new std::thread([state = state_] { state->run(); });
}

Signs::~Signs() {
    State& state = *state_;
    if (state.pid != getpid()) {
        static_cast<void>(new std::shared_ptr<State>(std::move(state_)));  // its locks are the parent's
        return;
    }
    std::unique_lock<std::mutex> lock(state.mutex);
    state.ending = true;
    state.wake.notify_all();
    const bool ended = state.ended_or_not.wait_for(lock, kParting, [&] { return state.ended; });
    lock.unlock();
    if (ended) {
        thread_->join();
        unlink(state.path(state.rank).c_str());
        rmdir(state.folder.c_str());
    } else {
        thread_->detach();
    }
    delete thread_;
}

bool Signs::sees_all() const {
    const auto signs = state_->read_all();
    for (std::size_t r = 0; r < signs.size(); ++r) {
        if (static_cast<int>(r) != state_->rank && !signs[r]) return false;
    }
    return true;
}

void Signs::enter(nanoseconds extra) {
    extra_ = extra;
    entered_ = Clock::now();
    missing_.clear();
    mark();
    state_->call.fetch_add(1, std::memory_order_relaxed);
    state_->waiting.store(1, std::memory_order_relaxed);
}

void Signs::leave() {
    mark();
    state_->waiting.store(0, std::memory_order_relaxed);
}

bool Signs::keep_waiting(nanoseconds idle) {
    State& state = *state_;
    const auto now = Clock::now();
    const std::lock_guard<std::mutex> lock(state.mutex);
    // Where the thread has not had its turn the whole process was stopped, as all are when a job is suspended: then a
    // rank begins to wait anew.
    if (!state.in_files && now - state.woke > state.timeout / 4) state.woke = state.resumed = now;
    idle = std::min(idle, nanoseconds(now - std::max(entered_, state.resumed)));
    if (idle < state.timeout / 2) {
        state.watching = false;
        return true;
    }
    if (!state.watching) {
        state.watching = state.first_look = true;
        for (State::Peer& peer : state.peers) peer.beat = peer.progress = peer.marks = now - idle;
        state.wake.notify_all();
    }
    const bool step_is_over = state.step_timeout.count() > 0 && idle > state.step_timeout;
    if (idle <= state.timeout && !step_is_over) return true;
    missing_ = state.without_progress(now);
    return missing_.empty() && (idle <= state.timeout || state.any_progress(now, extra_));
}

std::vector<Missing> Signs::State::without_progress(Clock::time_point now) const {
    std::vector<Missing> found;
    const std::uint64_t mine = call.load(std::memory_order_relaxed);
    for (int r = 0; r < static_cast<int>(peers.size()); ++r) {
        const Peer& peer = peers[static_cast<std::size_t>(r)];
        if (r == rank) continue;
        // Of a rank that waits too, or has been here, it is enough that it lives.
        const bool waits = peer.sign && (peer.sign->waiting != 0 || peer.sign->call >= mine);
        bool missing = now - (waits ? peer.beat : peer.progress) > timeout;
        missing |= !waits && step_timeout.count() > 0 && now - peer.marks > step_timeout;
        if (!missing) continue;
        // A sign from before the last call tells nothing of what the rank does now.
        const bool recent = peer.sign && peer.sign->call + 1 >= mine;
        found.push_back({r, recent ? peer.sign->phase : ""});
    }
    return found;
}

bool Signs::State::any_progress(Clock::time_point now, nanoseconds extra) const {
    return std::any_of(peers.begin(), peers.end(), [&](const Peer& p) { return now - p.progress <= timeout + extra; });
}

std::optional<Sign> Signs::State::read(int of) const {
    const int file = open(path(of).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (file < 0) return std::nullopt;
    Sign sign{};
    struct stat status {};
    const bool whole = fstat(file, &status) == 0 && S_ISREG(status.st_mode) &&
                       ::read(file, &sign, sizeof sign) == static_cast<ssize_t>(sizeof sign);
    close(file);
    if (!whole || sign.magic != kMagic || sign.check != checksum(sign)) return std::nullopt;
    return sign;
}

std::vector<std::optional<Sign>> Signs::State::read_all() const {
    // A network file system may remember for long that a file was not there, but not once the folder is read.
    if (DIR* listed = opendir(folder.c_str())) {
        while (readdir(listed) != nullptr) {
        }
        closedir(listed);
    }
    std::vector<std::optional<Sign>> signs(peers.size());
    for (int r = 0; r < static_cast<int>(peers.size()); ++r) {
        if (r != rank) signs[static_cast<std::size_t>(r)] = read(r);
    }
    return signs;
}

// Notes what has changed. The first look of a wait only notes what is there: it may be old.
void Signs::State::take(const std::vector<std::optional<Sign>>& signs, Clock::time_point now) {
    for (std::size_t r = 0; r < peers.size(); ++r) {
        const std::optional<Sign>& sign = signs[r];
        Peer& peer = peers[r];
        if (!sign) continue;
        if (!first_look) {
            if (!peer.sign || sign->beats != peer.sign->beats) peer.beat = now;
            if (!peer.sign || sign->progress != peer.sign->progress) peer.progress = now;
            if (!peer.sign || sign->marks != peer.sign->marks) peer.marks = now;
        }
        peer.sign = sign;
    }
    first_look = false;
}

void Signs::State::run() {
    auto last = Clock::now();
    auto since = last;
    std::uint64_t last_marks = marks.load(std::memory_order_relaxed);
    std::uint64_t last_place = 0;
    nanoseconds last_cpu = cpu_time(cpu_clock);
    std::unique_lock<std::mutex> lock(mutex);
    while (!ending) {
        wake.wait_for(lock, interval);
        const auto now = Clock::now();
        if (now - woke > timeout / 4) resumed = now;
        woke = now;
        if (ending) break;
        const nanoseconds cpu = cpu_time(cpu_clock);
        const std::uint64_t done = marks.load(std::memory_order_relaxed);
        const std::uint64_t waits = waiting.load(std::memory_order_relaxed);
        const std::uint64_t place = 2 * call.load(std::memory_order_relaxed) + waits;
        const bool computed = std::chrono::duration<double>(cpu - last_cpu) > kWorking * (now - last);
        // A call spins while it waits: its CPU time says nothing.
        if (done != last_marks || (computed && waits == 0)) progress.fetch_add(1, std::memory_order_relaxed);
        if (place != last_place) since = now;
        last = now;
        last_cpu = cpu;
        last_marks = done;
        last_place = place;
        const bool writes = now - since >= timeout / 4;
        if (!writes && !watching) continue;
        const bool reads = watching;
        in_files = true;
        lock.unlock();
        if (writes) write();
        const auto signs = reads ? read_all() : std::vector<std::optional<Sign>>(peers.size());
        lock.lock();
        in_files = false;
        woke = Clock::now();
        if (reads && watching) take(signs, woke);
    }
    ended = true;
    ended_or_not.notify_all();
}

// Opened and closed each time: that is when network file systems pass on what was written, and show what is new.
void Signs::State::write() {
    Sign sign{};
    sign.magic = kMagic;
    sign.beats = ++beats;
    sign.progress = progress.load(std::memory_order_relaxed);
    sign.marks = marks.load(std::memory_order_relaxed);
    sign.call = call.load(std::memory_order_relaxed);
    sign.waiting = waiting.load(std::memory_order_relaxed);
    std::strncpy(sign.phase, phase.load(std::memory_order_acquire), sizeof sign.phase - 1);
    sign.check = checksum(sign);
    std::error_code ignored;
    if (beats == 1) std::filesystem::create_directories(folder, ignored);
    const int file = open(path(rank).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (file < 0) return;  // the others then go by the timeout alone
    const ssize_t written = pwrite(file, &sign, sizeof sign, 0);
    static_cast<void>(written);  // a sign that is not whole is not read
    close(file);
}

std::string Signs::State::path(int of) const {
    char name[32];
    std::snprintf(name, sizeof name, "/rank-%05d", of);
    return folder + name;
}

}  // namespace hvd_train::liveness
