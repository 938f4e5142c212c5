// A flat state of every rank of a host, and the two anchors that they share, in one region.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "shm/kernels.hpp"
#include "shm/region.hpp"

namespace hvd_train::shm {

// Elements [begin, end).
struct Span {
    std::size_t begin = 0;
    std::size_t end = 0;
    std::size_t size() const noexcept { return end - begin; }
};

// Part `index` of `parts` of a span; the first parts hold one element more where they cannot be equal.
Span part_of(Span whole, int parts, int index) noexcept;

//   live of rank 0 | live of rank 1 | ... | anchor slot 0 | anchor slot 1 | stamps        each from a page boundary
class FlatBuffer {
  public:
    static constexpr int kNone = -1;  // in place of a slot: take values as they are, not as differences from it

    static std::size_t num_bytes(int size, std::size_t numel, Type type);
    static std::size_t staging_bytes(int size, std::size_t numel, Type type);

    // `region` is the same on all ranks of the host and has `num_bytes` bytes.
    FlatBuffer(std::shared_ptr<Region> region, int rank, int size, std::size_t numel, Type type);

    // The same anchors, but the mean is taken of copies in `region`, of `staging_bytes`, and the live tensors stay
    // as they are: what an average in the background works on.
    FlatBuffer staged(std::shared_ptr<Region> region) const;

    // Backs this rank's part with memory: its tensor, its slice of both anchors, the stamps. Throws std::bad_alloc.
    void allocate() const;

    std::byte* input() const noexcept { return static_cast<std::byte*>(inputs_[static_cast<std::size_t>(rank_)]); }
    std::byte* anchor(int slot) const noexcept;
    std::size_t num_tensor_bytes() const noexcept { return numel_ * size_of(type_); }
    std::size_t numel() const noexcept { return numel_; }
    Type type() const noexcept { return type_; }
    // The slice that this rank owns where there is one host.
    Span slice() const noexcept { return part_of({0, numel_}, size_, rank_); }
    const std::shared_ptr<Region>& inputs_region() const noexcept { return inputs_region_; }
    const std::shared_ptr<Region>& anchors_region() const noexcept { return region_; }

    // The elements of `span` of every live tensor and of anchor `slot` := the mean. All ranks must have written their
    // inputs before, and nobody else may touch these elements until it returns.
    void average(const std::vector<double>& shares, int slot, Span span) const;
    // mean := the weighted sum of the inputs over `span`, or of their differences from anchor `base`, in the wide
    // type, span.size() elements. The shares are those of this host's ranks.
    void reduce(const std::vector<double>& shares, int base, void* mean, Span span) const;
    // The elements of `span` of every live tensor and of anchor `slot` := mean, or anchor `base` plus mean.
    void spread(const void* mean, int base, int slot, Span span) const;
    // wide := the elements of `span` of an anchor, in the wide type, times `factor`.
    void widen(int slot, double factor, void* wide, Span span) const;

    // Stamps tell which average lies complete in which slot, whoever dies. A rank opens a slot before it writes to
    // it, and closes it with the average's number, from 1, when all that it had to write is there.
    void open(int slot) const noexcept;
    void close(int slot, std::uint64_t version) const noexcept;
    // The average that every rank of the host has completed in the slot; 0: none.
    std::uint64_t complete(int slot) const noexcept;

  private:
    std::atomic<std::uint64_t>& stamp(int slot, int rank) const noexcept;
    std::byte* tensor(int index) const noexcept { return region_->data() + static_cast<std::size_t>(index) * stride_; }

    std::shared_ptr<Region> region_;
    std::shared_ptr<Region> inputs_region_;
    int rank_;
    int size_;
    std::size_t numel_;
    Type type_;
    std::size_t stride_;
    std::vector<void*> inputs_;   // where the ranks' values are read
    std::vector<void*> outputs_;  // where, beside the anchor, the mean is written; the inputs, or nowhere
};

}  // namespace hvd_train::shm
