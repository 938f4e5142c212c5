#include "shm/limit.hpp"

#include <stdexcept>
#include <utility>
#include <vector>

#include "shm/clones.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hvd_train::shm {
namespace {

constexpr std::size_t kPage = 4096;

// A cache line. The compiler makes of it what the processor has: one register of AVX-512, two of AVX2, four of SSE.
using Line = float __attribute__((vector_size(64), may_alias));
constexpr std::size_t kLine = sizeof(Line) / sizeof(float);

std::size_t round_up(std::size_t value) { return (value + kPage - 1) / kPage * kPage; }

// Around the cache, as the anchor of an average is written.
HVD_TRAIN_INLINE void stream(float* to, const Line& line) {
#if defined(__x86_64__)
    const auto* from = reinterpret_cast<const float*>(&line);
    for (std::size_t i = 0; i < kLine; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
#else
    *reinterpret_cast<Line*>(to) = line;
#endif
}

HVD_TRAIN_CLONES void pass(float* const* live, int size, float* shared, std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kLine) {
        Line sum = *reinterpret_cast<const Line*>(live[0] + at);
        for (int r = 1; r < size; ++r) sum += *reinterpret_cast<const Line*>(live[r] + at);
        for (int r = 0; r < size; ++r) *reinterpret_cast<Line*>(live[r] + at) = sum;
        stream(shared + at, sum);
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

std::size_t Limit::num_bytes(int size, std::size_t numel) {
    return round_up(numel * sizeof(float)) * static_cast<std::size_t>(size + 1);
}

Limit::Limit(std::shared_ptr<Region> region, int rank, int size, std::size_t numel)
    : region_(std::move(region)), rank_(rank), size_(size), numel_(numel), stride_(round_up(numel * sizeof(float))) {
    if (region_->num_bytes() < num_bytes(size, numel)) throw std::invalid_argument("the region is too small");
}

void Limit::allocate() const {
    const auto offset = [this](const float* at) {
        return static_cast<std::size_t>(reinterpret_cast<const std::byte*>(at) - region_->data());
    };
    region_->allocate(offset(live()), stride_);
    const std::size_t first = bound(rank_) * sizeof(float) / kPage * kPage;
    const std::size_t last = round_up(bound(rank_ + 1) * sizeof(float));
    if (last > first) region_->allocate(offset(shared()) + first, last - first);
}

void Limit::run() const {
    std::vector<float*> live;
    for (int r = 0; r < size_; ++r) live.push_back(tensor(r));
    pass(live.data(), size_, shared(), bound(rank_), bound(rank_ + 1));
}

float* Limit::tensor(int index) const noexcept {
    return reinterpret_cast<float*>(region_->data() + static_cast<std::size_t>(index) * stride_);
}

// Slices are cut between cache lines; the last line may go beyond the elements, into the rest of their page.
std::size_t Limit::bound(int rank) const noexcept {
    const std::size_t lines = (numel_ + kLine - 1) / kLine;
    return lines * static_cast<std::size_t>(rank) / static_cast<std::size_t>(size_) * kLine;
}

}  // namespace hvd_train::shm
