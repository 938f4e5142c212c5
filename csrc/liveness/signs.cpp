#include "liveness/signs.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
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

}  // namespace

void mark() noexcept { marks.fetch_add(1, std::memory_order_relaxed); }

void enter_phase(const std::string& text) {
    static std::mutex mutex;
    static std::set<std::string> texts;  // its nodes stay where they are
    const std::lock_guard<std::mutex> lock(mutex);
    phase.store(texts.insert(text.substr(0, sizeof(Sign::phase) - 1)).first->c_str(), std::memory_order_release);
    mark();
}

Signs::Signs(std::string folder, int rank, int size, nanoseconds timeout, nanoseconds step_timeout)
    : folder_(std::move(folder)),
      rank_(rank),
      size_(size),
      timeout_(timeout),
      step_timeout_(step_timeout),
      interval_(std::clamp(timeout / 20, kShortestInterval, kLongestInterval)),
      hooks_{this,
             [](void* self, double idle_s) {
                 const std::chrono::duration<double> idle(idle_s);
                 return static_cast<Signs*>(self)->keep_waiting(std::chrono::duration_cast<nanoseconds>(idle));
             },
             [](void*) { mark(); }},
      peers_(static_cast<std::size_t>(size)) {
    const int status = pthread_getcpuclockid(pthread_self(), &cpu_clock_);
    if (status != 0) throw std::system_error(status, std::generic_category(), "pthread_getcpuclockid");
    // Signals are for the threads that know of them: this one inherits a mask that lets none through.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Signs::~Signs() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    wake_.notify_all();
    thread_.join();
    if (beats_ > 0) {
        unlink(path(rank_).c_str());
        rmdir(folder_.c_str());
    }
}

void Signs::enter(nanoseconds extra) {
    extra_ = extra;
    entered_ = asked_ = Clock::now();
    looking_ = false;
    mark();
    call_.fetch_add(1, std::memory_order_relaxed);
    waiting_.store(1, std::memory_order_relaxed);
}

void Signs::leave() {
    mark();
    waiting_.store(0, std::memory_order_relaxed);
}

bool Signs::keep_waiting(nanoseconds idle) {
    const auto now = Clock::now();
    // A rank that was itself stopped for a while, as all are when a job is suspended, begins to wait anew.
    if (now - asked_ > timeout_ / 4) {
        entered_ = now;
        looking_ = false;
    }
    asked_ = now;
    idle = std::min(idle, nanoseconds(now - entered_));
    if (idle < timeout_ / 2) {
        looking_ = false;
        return true;
    }
    if (looking_ && now - looked_ < interval_) return true;
    if (!looking_) {
        for (Peer& peer : peers_) peer.beat = peer.progress = peer.marks = now - idle;
    }
    look(now, !looking_);
    looking_ = true;
    looked_ = now;
    if (idle <= timeout_) return true;
    missing_ = without_progress(now);
    return missing_.empty() && any_progress(now);
}

std::vector<Missing> Signs::without_progress(Clock::time_point now) const {
    std::vector<Missing> found;
    const std::uint64_t call = call_.load(std::memory_order_relaxed);
    for (int r = 0; r < size_; ++r) {
        const Peer& peer = peers_[static_cast<std::size_t>(r)];
        if (r == rank_) continue;
        // Of a rank that waits too, or has been here, it is enough that it lives.
        const bool waits = peer.seen && (peer.sign.waiting != 0 || peer.sign.call >= call);
        bool missing = now - (waits ? peer.beat : peer.progress) > timeout_;
        missing |= !waits && step_timeout_.count() > 0 && now - peer.marks > step_timeout_;
        if (!missing) continue;
        // A sign from before the last call tells nothing of what the rank does now.
        const bool recent = peer.seen && peer.sign.call + 1 >= call;
        found.push_back({r, recent ? peer.sign.phase : ""});
    }
    return found;
}

bool Signs::any_progress(Clock::time_point now) const {
    return std::any_of(peers_.begin(), peers_.end(), [&](const Peer& p) { return now - p.progress <= timeout_ + extra_; });
}

// Reads the signs of all other ranks. The first look of a wait only notes what is there: it may be old.
void Signs::look(Clock::time_point now, bool first) {
    // A network file system may remember for long that a file was not there, but not once the folder is read.
    if (DIR* folder = opendir(folder_.c_str())) {
        while (readdir(folder) != nullptr) {
        }
        closedir(folder);
    }
    for (int r = 0; r < size_; ++r) {
        Peer& peer = peers_[static_cast<std::size_t>(r)];
        if (r == rank_) continue;
        const int file = open(path(r).c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) continue;
        Sign sign{};
        const bool whole = read(file, &sign, sizeof sign) == static_cast<ssize_t>(sizeof sign);
        close(file);
        if (!whole || sign.magic != kMagic || sign.check != checksum(sign)) continue;
        if (!first) {
            if (!peer.seen || sign.beats != peer.sign.beats) peer.beat = now;
            if (!peer.seen || sign.progress != peer.sign.progress) peer.progress = now;
            if (!peer.seen || sign.marks != peer.sign.marks) peer.marks = now;
        }
        peer.seen = true;
        peer.sign = sign;
    }
}

void Signs::run() {
    auto last = Clock::now();
    auto since = last;
    std::uint64_t last_marks = marks.load(std::memory_order_relaxed);
    std::uint64_t last_place = 0;
    nanoseconds last_cpu = cpu_time(cpu_clock_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!wake_.wait_for(lock, interval_, [this] { return ending_; })) {
        const auto now = Clock::now();
        const nanoseconds cpu = cpu_time(cpu_clock_);
        const std::uint64_t done = marks.load(std::memory_order_relaxed);
        const std::uint64_t waiting = waiting_.load(std::memory_order_relaxed);
        const std::uint64_t place = 2 * call_.load(std::memory_order_relaxed) + waiting;
        const bool computed = std::chrono::duration<double>(cpu - last_cpu) > kWorking * (now - last);
        // A call spins while it waits: its CPU time says nothing.
        if (done != last_marks || (computed && waiting == 0)) progress_.fetch_add(1, std::memory_order_relaxed);
        if (place != last_place) since = now;
        last = now;
        last_cpu = cpu;
        last_marks = done;
        last_place = place;
        if (now - since >= timeout_ / 4) {
            lock.unlock();
            write();
            lock.lock();
        }
    }
}

// Opened and closed each time: that is when network file systems pass on what was written, and show what is new.
void Signs::write() const {
    Sign sign{};
    sign.magic = kMagic;
    sign.beats = ++beats_;
    sign.progress = progress_.load(std::memory_order_relaxed);
    sign.marks = marks.load(std::memory_order_relaxed);
    sign.call = call_.load(std::memory_order_relaxed);
    sign.waiting = waiting_.load(std::memory_order_relaxed);
    std::strncpy(sign.phase, phase.load(std::memory_order_acquire), sizeof sign.phase - 1);
    sign.check = checksum(sign);
    int file = open(path(rank_).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 && errno == ENOENT) {
        std::error_code ignored;
        std::filesystem::create_directories(folder_, ignored);
        file = open(path(rank_).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    }
    if (file < 0) return;  // the others then go by the timeout alone
    const ssize_t written = pwrite(file, &sign, sizeof sign, 0);
    static_cast<void>(written);  // a sign that is not whole is not read
    close(file);
}

std::string Signs::path(int rank) const {
    char name[32];
    std::snprintf(name, sizeof name, "/rank-%05d", rank);
    return folder_ + name;
}

}  // namespace hvd_train::liveness
