#include "shm/region.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace hvd_train::shm {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

std::uint64_t boot_hash() {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string id;
    file >> id;
    std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a
    for (const char c : id) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
    return hash;
}

std::uint64_t random_nonce() {
    std::uint64_t nonce = 0;
    if (getrandom(&nonce, sizeof nonce, 0) != static_cast<ssize_t>(sizeof nonce)) fail("getrandom");
    return nonce;
}

int open_peer(const Address& address) {
    const std::string path =
        "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.descriptor);
    return ::open(path.c_str(), O_RDWR | O_CLOEXEC);
}

}  // namespace

std::string Address::pack() const {
    std::string bytes(sizeof *this, '\0');
    std::memcpy(bytes.data(), this, sizeof *this);
    return bytes;
}

Address Address::unpack(const std::string& bytes) {
    if (bytes.size() != sizeof(Address)) throw std::invalid_argument("not the address of a region");
    Address address;
    std::memcpy(&address, bytes.data(), sizeof address);
    return address;
}

Region::Region(int descriptor, std::size_t num_bytes, bool create) : descriptor_(descriptor), num_bytes_(num_bytes) {
    const std::size_t whole = kHeader + num_bytes;
    void* base = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (base == MAP_FAILED) {
        const int error = errno;
        close(descriptor);
        errno = error;
        fail("mmap of shared memory");
    }
    base_ = static_cast<std::byte*>(base);
    // Large pages where the system gives them for shared memory; it is no error where it does not.
    madvise(base_, whole, MADV_HUGEPAGE);
    // A child process must neither write to it nor keep it alive when the rank is gone.
    if (madvise(base_, whole, MADV_DONTFORK) != 0) {
        const int error = errno;
        munmap(base_, whole);
        close(descriptor);
        errno = error;
        fail("shared memory that children do not inherit");
    }
    owner_ = getpid();
    if (create) {
        const std::uint64_t nonce = random_nonce();
        std::memcpy(base_, &nonce, sizeof nonce);
    }
}

Region Region::create(std::size_t num_bytes) {
    const int descriptor = memfd_create("hvd_train", MFD_CLOEXEC);
    if (descriptor < 0) fail("memfd_create");
    if (ftruncate(descriptor, static_cast<off_t>(kHeader + num_bytes)) != 0 ||
        fallocate(descriptor, 0, 0, static_cast<off_t>(kHeader)) != 0) {
        const int error = errno;
        close(descriptor);
        errno = error;
        fail("shared memory");
    }
    return Region(descriptor, num_bytes, true);
}

Region Region::open(const Address& address) {
    const int descriptor = open_peer(address);
    if (descriptor < 0) fail("shared memory of a peer");
    struct stat status {};
    const auto whole = static_cast<off_t>(kHeader + address.num_bytes);
    if (fstat(descriptor, &status) != 0 || status.st_size != whole) {
        close(descriptor);
        throw std::runtime_error("the shared memory of a peer has another size: it is not on this host");
    }
    Region region(descriptor, address.num_bytes, false);
    std::uint64_t nonce = 0;
    std::memcpy(&nonce, region.base_, sizeof nonce);
    if (nonce != address.nonce) throw std::runtime_error("a peer's nonce differs: it is not on this host");
    return region;
}

bool Region::is_visible(const Address& address) noexcept {
    if (address.boot != boot_hash()) return false;
    const int descriptor = open_peer(address);
    if (descriptor < 0) return false;
    std::uint64_t nonce = 0;
    const ssize_t got = pread(descriptor, &nonce, sizeof nonce, 0);
    close(descriptor);
    return got == static_cast<ssize_t>(sizeof nonce) && nonce == address.nonce;
}

Region::Region(Region&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      num_bytes_(other.num_bytes_),
      base_(std::exchange(other.base_, nullptr)),
      owner_(other.owner_) {}

Region::~Region() {
    seal();
    // In a forked child something else may lie at the address by now.
    if (base_ != nullptr && owner_ == getpid()) munmap(base_, kHeader + num_bytes_);
}

void Region::allocate(std::size_t offset, std::size_t num_bytes) const {
    if (num_bytes == 0) return;
    const auto from = static_cast<off_t>(kHeader + offset);
    int status = 0;
    do {
        status = fallocate(descriptor_, 0, from, static_cast<off_t>(num_bytes));
    } while (status != 0 && errno == EINTR);
    if (status != 0) {
        if (errno == ENOSPC || errno == ENOMEM) throw std::bad_alloc();
        fail("allocation of shared memory");
    }
}

void Region::seal() noexcept {
    if (descriptor_ >= 0) close(std::exchange(descriptor_, -1));
}

Address Region::address() const {
    Address address;
    address.pid = getpid();
    address.descriptor = descriptor_;
    address.num_bytes = num_bytes_;
    std::memcpy(&address.nonce, base_, sizeof address.nonce);
    address.boot = boot_hash();
    return address;
}

}  // namespace hvd_train::shm
