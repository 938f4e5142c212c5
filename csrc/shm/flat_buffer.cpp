#include "shm/flat_buffer.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace hvd_train::shm {
namespace {

constexpr std::size_t kPage = 4096;
// Elements that pass through a private block where there is no live tensor to average in place.
constexpr std::size_t kBlock = 8192;

std::size_t round_up(std::size_t value) { return (value + kPage - 1) / kPage * kPage; }

std::size_t stamp_bytes(int size) { return round_up(2 * static_cast<std::size_t>(size) * sizeof(std::uint64_t)); }

}  // namespace

Span part_of(Span whole, int parts, int index) noexcept {
    const auto p = static_cast<std::size_t>(parts);
    const auto i = static_cast<std::size_t>(index);
    const std::size_t base = whole.size() / p;
    const std::size_t extra = whole.size() % p;
    const std::size_t begin = whole.begin + i * base + std::min(i, extra);
    return {begin, begin + base + (i < extra ? 1 : 0)};
}

std::size_t FlatBuffer::staging_bytes(int size, std::size_t numel, Type type) {
    return round_up(numel * size_of(type)) * static_cast<std::size_t>(size);
}

std::size_t FlatBuffer::num_bytes(int size, std::size_t numel, Type type) {
    return staging_bytes(size + 2, numel, type) + stamp_bytes(size);
}

FlatBuffer::FlatBuffer(std::shared_ptr<Region> region, int rank, int size, std::size_t numel, Type type)
    : region_(std::move(region)),
      inputs_region_(region_),
      rank_(rank),
      size_(size),
      numel_(numel),
      type_(type),
      stride_(round_up(numel * size_of(type_))) {
    if (region_->num_bytes() < num_bytes(size, numel, type_)) throw std::invalid_argument("the region is too small");
    for (int i = 0; i < size; ++i) inputs_.push_back(tensor(i));
    outputs_ = inputs_;
}

FlatBuffer FlatBuffer::staged(std::shared_ptr<Region> region) const {
    if (region->num_bytes() < staging_bytes(size_, numel_, type_)) throw std::invalid_argument("the region is too small");
    FlatBuffer twin = *this;
    twin.inputs_region_ = std::move(region);
    for (std::size_t i = 0; i < inputs_.size(); ++i) twin.inputs_[i] = twin.inputs_region_->data() + i * stride_;
    twin.outputs_.clear();
    return twin;
}

void FlatBuffer::allocate() const {
    inputs_region_->allocate(static_cast<std::size_t>(input() - inputs_region_->data()), stride_);
    if (inputs_region_ != region_) return;
    const Span owned = slice();
    const std::size_t first = owned.begin * size_of(type_) / kPage * kPage;
    const std::size_t last = std::min(round_up(owned.end * size_of(type_)), stride_);
    for (int slot = 0; slot < 2; ++slot) {
        const std::size_t from = static_cast<std::size_t>(anchor(slot) - region_->data());
        if (last > first) region_->allocate(from + first, last - first);
    }
    region_->allocate(static_cast<std::size_t>(size_ + 2) * stride_, stamp_bytes(size_));
}

std::byte* FlatBuffer::anchor(int slot) const noexcept { return tensor(size_ + slot); }

void FlatBuffer::average(const std::vector<double>& shares, int slot, Span span) const {
    if (!outputs_.empty()) {
        return shm::average(type_, outputs_.data(), shares.data(), size_, anchor(slot), span.begin, span.end);
    }
    alignas(64) std::byte block[kBlock * sizeof(double)];
    for (std::size_t at = span.begin; at < span.end; at += kBlock) {
        const Span part{at, std::min(at + kBlock, span.end)};
        reduce(shares, kNone, block, part);
        spread(block, kNone, slot, part);
    }
}

void FlatBuffer::reduce(const std::vector<double>& shares, int base, void* mean, Span span) const {
    const void* from = base == kNone ? nullptr : anchor(base);
    shm::reduce(type_, inputs_.data(), shares.data(), size_, from, mean, span.begin, span.end);
}

void FlatBuffer::spread(const void* mean, int base, int slot, Span span) const {
    const void* from = base == kNone ? nullptr : anchor(base);
    shm::spread(type_, mean, from, outputs_.data(), static_cast<int>(outputs_.size()), anchor(slot), span.begin, span.end);
}

void FlatBuffer::widen(int slot, double factor, void* wide, Span span) const {
    const void* from = anchor(slot);
    shm::reduce(type_, &from, &factor, 1, nullptr, wide, span.begin, span.end);
}

std::atomic<std::uint64_t>& FlatBuffer::stamp(int slot, int rank) const noexcept {
    static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);
    auto* stamps = reinterpret_cast<std::atomic<std::uint64_t>*>(tensor(size_ + 2));
    return stamps[slot * size_ + rank];
}

void FlatBuffer::open(int slot) const noexcept {
    stamp(slot, rank_).store(0, std::memory_order_relaxed);
    // The slot must not look complete to anybody who sees the first of the writes that follow.
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

void FlatBuffer::close(int slot, std::uint64_t version) const noexcept {
    stamp(slot, rank_).store(version, std::memory_order_release);
}

std::uint64_t FlatBuffer::complete(int slot) const noexcept {
    const std::uint64_t version = stamp(slot, 0).load(std::memory_order_acquire);
    for (int r = 1; r < size_; ++r) {
        if (stamp(slot, r).load(std::memory_order_acquire) != version) return 0;
    }
    return version;
}

}  // namespace hvd_train::shm
