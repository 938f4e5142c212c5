#include "shm/flat_buffer.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace hvd_train::shm {
namespace {

constexpr std::size_t kPage = 4096;

std::size_t round_up(std::size_t value) { return (value + kPage - 1) / kPage * kPage; }

}  // namespace

std::size_t FlatBuffer::num_bytes(int size, std::size_t numel, Type type) {
    return round_up(numel * size_of(type)) * static_cast<std::size_t>(size + 2);
}

FlatBuffer::FlatBuffer(std::shared_ptr<Region> region, int rank, int size, std::size_t numel, int type)
    : region_(std::move(region)),
      rank_(rank),
      size_(size),
      numel_(numel),
      type_(static_cast<Type>(type)),
      stride_(round_up(numel * size_of(type_))) {
    if (region_->num_bytes() < num_bytes(size, numel, type_)) throw std::invalid_argument("the region is too small");
    const auto p = static_cast<std::size_t>(size);
    const auto r = static_cast<std::size_t>(rank);
    begin_ = r * (numel / p) + std::min(r, numel % p);
    end_ = begin_ + numel / p + (r < numel % p ? 1 : 0);
    for (int i = 0; i < size; ++i) lives_.push_back(live_of(i));
}

void FlatBuffer::allocate() const {
    const std::size_t base = static_cast<std::size_t>(live() - region_->data());
    region_->allocate(base, stride_);
    const std::size_t first = begin_ * size_of(type_) / kPage * kPage;
    const std::size_t last = std::min(round_up(end_ * size_of(type_)), stride_);
    for (int slot = 0; slot < 2; ++slot) {
        const std::size_t from = static_cast<std::size_t>(anchor(slot) - region_->data());
        if (last > first) region_->allocate(from + first, last - first);
    }
}

void FlatBuffer::average(const std::vector<double>& shares, int slot) const {
    shm::average(type_, lives_.data(), shares.data(), size_, anchor(slot), begin_, end_);
}

void FlatBuffer::reduce(const std::vector<double>& shares, void* mean) const {
    shm::reduce(type_, const_cast<const void* const*>(lives_.data()), shares.data(), size_, nullptr, mean, begin_,
                end_);
}

void FlatBuffer::spread(const void* mean, int slot) const {
    shm::spread(type_, mean, nullptr, lives_.data(), size_, anchor(slot), begin_, end_);
}

}  // namespace hvd_train::shm
