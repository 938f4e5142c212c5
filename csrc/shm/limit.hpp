// What the memory of a host allows: the traffic of an average, and nothing besides.
#pragma once

#include <cstddef>
#include <memory>

#include "shm/region.hpp"

namespace hvd_train::shm {

// One float32 tensor of every rank of a host, and one that they share; laid out like the tensors of a FlatBuffer.
// It has no share, no agreement and no barrier: an average that comes near its time wastes nothing.
class Limit {
  public:
    static std::size_t num_bytes(int size, std::size_t numel);

    // `region` is the same on all ranks of the host and has `num_bytes` bytes.
    Limit(std::shared_ptr<Region> region, int rank, int size, std::size_t numel);

    // Backs this rank's tensor and its slice of the shared one with memory. Throws std::bad_alloc.
    void allocate() const;

    float* live() const noexcept { return tensor(rank_); }
    float* shared() const noexcept { return tensor(size_); }
    std::size_t numel() const noexcept { return numel_; }
    const std::shared_ptr<Region>& region() const noexcept { return region_; }

    // Of this rank's slice: every element of all live tensors read once, their sum written to each of them in place,
    // and streamed to the shared tensor.
    void run() const;

  private:
    float* tensor(int index) const noexcept;
    std::size_t bound(int rank) const noexcept;

    std::shared_ptr<Region> region_;
    int rank_;
    int size_;
    std::size_t numel_;
    std::size_t stride_;  // bytes
};

}  // namespace hvd_train::shm
