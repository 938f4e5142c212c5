// A flat state of every rank of a host, and the two anchors that they share, in one region.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "shm/kernels.hpp"
#include "shm/region.hpp"

namespace hvd_train::shm {

//   live of rank 0 | live of rank 1 | ... | anchor slot 0 | anchor slot 1        each from a page boundary
class FlatBuffer {
  public:
    static std::size_t num_bytes(int size, std::size_t numel, Type type);

    // `region` is the same on all ranks of the team and has `num_bytes` bytes.
    FlatBuffer(std::shared_ptr<Region> region, int rank, int size, std::size_t numel, int type);

    // Backs this rank's part with memory: its live tensor, and its slice of both anchors. Throws std::bad_alloc.
    void allocate() const;

    std::byte* live() const noexcept { return live_of(rank_); }
    std::byte* anchor(int slot) const noexcept { return live_of(size_ + slot); }
    std::size_t tensor_bytes() const noexcept { return numel_ * size_of(type_); }
    const std::shared_ptr<Region>& region() const noexcept { return region_; }

    // This rank's slice of every live tensor and of anchor `slot` := the mean. All ranks must have written their
    // live tensors before, and must not touch them until all have returned: a barrier on either side.
    void average(const std::vector<double>& shares, int slot) const;
    // mean := the mean of this rank's slice, in the wide type; its size is that of the slice.
    void reduce(const std::vector<double>& shares, void* mean) const;
    // This rank's slice of every live tensor and of anchor `slot` := mean.
    void spread(const void* mean, int slot) const;

  private:
    std::byte* live_of(int index) const noexcept { return region_->data() + static_cast<std::size_t>(index) * stride_; }

    std::shared_ptr<Region> region_;
    int rank_;
    int size_;
    std::size_t numel_;
    Type type_;
    std::size_t stride_;
    std::size_t begin_;
    std::size_t end_;
    std::vector<void*> lives_;
};

}  // namespace hvd_train::shm
