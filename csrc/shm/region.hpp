// Memory that the ranks of one host share: an anonymous file, mapped by all, gone when the last of them ends.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace hvd_train::shm {

// Where a region can be found by another process of the same host, and the number that proves that it was.
struct Address {
    std::int64_t pid = 0;
    std::int64_t descriptor = -1;
    std::uint64_t num_bytes = 0;
    std::uint64_t nonce = 0;
    std::uint64_t boot = 0;  // hash of the kernel's boot id: spares most of the attempts on other hosts

    std::string pack() const;
    static Address unpack(const std::string& bytes);
};

// A mapping of such a file, which child processes do not inherit. Move-only; unmaps in its destructor. Its first page
// holds the nonce; `data` begins behind it.
class Region {
  public:
    static constexpr std::size_t kHeader = 4096;

    // Makes a region of `num_bytes` bytes, not yet backed by memory: see `allocate`.
    static Region create(std::size_t num_bytes);
    // Maps the region of a peer. Throws if it cannot be opened, or if its nonce is another: then pid and
    // descriptor mean something else here, as on another host or in another container.
    static Region open(const Address& address);
    // Whether `open` would succeed.
    static bool is_visible(const Address& address) noexcept;

    Region(Region&& other) noexcept;
    Region& operator=(Region&&) = delete;
    Region(const Region&) = delete;
    ~Region();

    // Backs [offset, offset + num_bytes) of `data` with memory, on the NUMA node of the caller. Throws
    // std::bad_alloc where there is none: without this the first touch would end the process by SIGBUS.
    void allocate(std::size_t offset, std::size_t num_bytes) const;
    // Closes the descriptor, once every peer has mapped the region: from then on no name leads to it.
    void seal() noexcept;

    std::byte* data() const noexcept { return base_ + kHeader; }
    std::size_t num_bytes() const noexcept { return num_bytes_; }
    Address address() const;

  private:
    Region(int descriptor, std::size_t num_bytes, bool create);

    int descriptor_ = -1;
    std::size_t num_bytes_ = 0;
    std::byte* base_ = nullptr;
    pid_t owner_ = 0;
};

}  // namespace hvd_train::shm
