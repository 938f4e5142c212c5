#include "shm/kernels.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

// One binary serves old and new processors: the loops are compiled for each of these and the right one is chosen when
// the library is loaded. Contraction of a * b + c is off in the build, so that all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(HVD_TRAIN_NO_CLONES)
#define HVD_TRAIN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HVD_TRAIN_CLONES
#endif

namespace hvd_train::shm {
namespace {

// Elements of a tile. Its sums stay in the first-level cache; so do the lines of each rank's tile between the read
// and the write, in the second-level cache, up to some dozens of ranks.
constexpr std::size_t kTile = 2048;

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct BFloat16 {
    std::uint16_t bits;
    operator float() const { return float_of(static_cast<std::uint32_t>(bits) << 16); }
    // To the nearest, ties to even; a not-a-number stays one.
    static BFloat16 from(float value) {
        const std::uint32_t in = bits_of(value);
        const std::uint32_t rounded = (in + 0x7fffU + ((in >> 16) & 1U)) >> 16;
        const std::uint32_t nan = (in >> 16) | 0x40U;
        return {static_cast<std::uint16_t>((in & 0x7fffffffU) > 0x7f800000U ? nan : rounded)};
    }
};

struct Float16 {
    std::uint16_t bits;
    operator float() const {
        const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
        const std::uint32_t rest = static_cast<std::uint32_t>(bits & 0x7fffU) << 13;
        // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinity and not-a-number get the
        // largest exponent.
        const float scaled = float_of(rest) * float_of(0x77800000U);
        const std::uint32_t special = (bits & 0x7c00U) == 0x7c00U ? 0x7f800000U | rest : bits_of(scaled);
        return float_of(sign | special);
    }
    static Float16 from(float value) {
        const std::uint32_t in = bits_of(value);
        const std::uint32_t sign = (in >> 16) & 0x8000U;
        const std::uint32_t magnitude = in & 0x7fffffffU;
        if (magnitude > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
        if (magnitude >= 0x477ff000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};
        if (magnitude < 0x38800000U) {
            // Subnormal: adding 0.5 puts the wanted bits at the end of the fraction, correctly rounded.
            const std::uint32_t shifted = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
            return {static_cast<std::uint16_t>(sign | shifted)};
        }
        const std::uint32_t odd = (magnitude >> 13) & 1U;
        const std::uint32_t rounded = magnitude + 0xc8000fffU + odd;  // bias 127 to 15, and half a unit
        return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
    }
};

template <class T>
struct Traits {
    using Wide = T;
    static T narrow(T value) { return value; }
};
template <>
struct Traits<BFloat16> {
    using Wide = float;
    static BFloat16 narrow(float value) { return BFloat16::from(value); }
};
template <>
struct Traits<Float16> {
    using Wide = float;
    static Float16 narrow(float value) { return Float16::from(value); }
};

template <class T, class W>
inline __attribute__((always_inline)) void sum_tile(
    const T* const* live, const W* share, int size, std::size_t at, std::size_t n, W* sum) {
    bool first = true;
    for (int r = 0; r < size; ++r) {
        if (share[r] == W(0)) continue;
        const T* from = live[r] + at;
        const W weight = share[r];
        if (first) {
            for (std::size_t i = 0; i < n; ++i) sum[i] = weight * static_cast<W>(from[i]);
        } else {
            for (std::size_t i = 0; i < n; ++i) sum[i] += weight * static_cast<W>(from[i]);
        }
        first = false;
    }
    if (first) std::fill(sum, sum + n, W(0));
}

// Writes around the cache: nobody reads the anchor soon, and a line need not be read to be overwritten.
inline void stream(void* to, const void* from, std::size_t num_bytes) {
#if defined(__x86_64__)
    auto* target = static_cast<char*>(to);
    const auto* source = static_cast<const char*>(from);
    const std::size_t head = std::min(num_bytes, (16 - reinterpret_cast<std::uintptr_t>(target) % 16) % 16);
    std::memcpy(target, source, head);
    std::size_t i = head;
    for (; i + 16 <= num_bytes; i += 16) {
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), value);
    }
    std::memcpy(target + i, source + i, num_bytes - i);
#else
    std::memcpy(to, from, num_bytes);
#endif
}

// Streamed stores are not ordered by the barrier's release store; this is.
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T, class W>
inline __attribute__((always_inline)) void spread_tile(
    const W* mean, T* const* live, int size, T* anchor, std::size_t at, std::size_t n, T* narrow) {
    for (std::size_t i = 0; i < n; ++i) narrow[i] = Traits<T>::narrow(mean[i]);
    for (int r = 0; r < size; ++r) std::memcpy(live[r] + at, narrow, n * sizeof(T));
    stream(anchor + at, narrow, n * sizeof(T));
}

template <class T>
inline __attribute__((always_inline)) void average_of(
    T* const* live, const typename Traits<T>::Wide* share, int size, T* anchor, std::size_t begin, std::size_t end) {
    alignas(64) typename Traits<T>::Wide sum[kTile];
    alignas(64) T narrow[kTile];
    for (std::size_t at = begin; at < end; at += kTile) {
        const std::size_t n = std::min(kTile, end - at);
        sum_tile<T>(const_cast<const T* const*>(live), share, size, at, n, sum);
        spread_tile<T>(sum, live, size, anchor, at, n, narrow);
    }
    stream_fence();
}

template <class T>
inline __attribute__((always_inline)) void reduce_of(
    const T* const* live, const typename Traits<T>::Wide* share, int size, typename Traits<T>::Wide* mean,
    std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kTile) {
        sum_tile<T>(live, share, size, at, std::min(kTile, end - at), mean + (at - begin));
    }
}

template <class T>
inline __attribute__((always_inline)) void spread_of(
    const typename Traits<T>::Wide* mean, T* const* live, int size, T* anchor, std::size_t begin, std::size_t end) {
    alignas(64) T narrow[kTile];
    for (std::size_t at = begin; at < end; at += kTile) {
        const std::size_t n = std::min(kTile, end - at);
        spread_tile<T>(mean + (at - begin), live, size, anchor, at, n, narrow);
    }
    stream_fence();
}

// target_clones does not go with templates: one plain function for each type.
#define HVD_TRAIN_KERNELS(T, W, suffix)                                                                             \
    HVD_TRAIN_CLONES void average_##suffix(T* const* live, const W* share, int size, T* anchor, std::size_t begin, \
                                           std::size_t end) {                                                      \
        average_of<T>(live, share, size, anchor, begin, end);                                                      \
    }                                                                                                              \
    HVD_TRAIN_CLONES void reduce_##suffix(const T* const* live, const W* share, int size, W* mean,                 \
                                          std::size_t begin, std::size_t end) {                                    \
        reduce_of<T>(live, share, size, mean, begin, end);                                                         \
    }                                                                                                              \
    HVD_TRAIN_CLONES void spread_##suffix(const W* mean, T* const* live, int size, T* anchor, std::size_t begin,   \
                                          std::size_t end) {                                                       \
        spread_of<T>(mean, live, size, anchor, begin, end);                                                        \
    }

HVD_TRAIN_KERNELS(double, double, float64)
HVD_TRAIN_KERNELS(float, float, float32)
HVD_TRAIN_KERNELS(BFloat16, float, bfloat16)
HVD_TRAIN_KERNELS(Float16, float, float16)

}  // namespace

std::size_t size_of(Type type) {
    switch (type) {
        case Type::float64: return 8;
        case Type::float32: return 4;
        case Type::bfloat16:
        case Type::float16: return 2;
    }
    throw std::invalid_argument("no such type");
}

std::size_t wide_size_of(Type type) { return type == Type::float64 ? 8 : 4; }

void average(Type type, void* const* live, const double* share, int size, void* anchor, std::size_t begin,
             std::size_t end) {
    const std::vector<float> narrow(share, share + size);
    switch (type) {
        case Type::float64:
            return average_float64(reinterpret_cast<double* const*>(live), share, size, static_cast<double*>(anchor), begin, end);
        case Type::float32:
            return average_float32(reinterpret_cast<float* const*>(live), narrow.data(), size, static_cast<float*>(anchor), begin, end);
        case Type::bfloat16:
            return average_bfloat16(reinterpret_cast<BFloat16* const*>(live), narrow.data(), size, static_cast<BFloat16*>(anchor), begin, end);
        case Type::float16:
            return average_float16(reinterpret_cast<Float16* const*>(live), narrow.data(), size, static_cast<Float16*>(anchor), begin, end);
    }
}

void reduce(Type type, const void* const* live, const double* share, int size, void* mean, std::size_t begin,
            std::size_t end) {
    const std::vector<float> narrow(share, share + size);
    switch (type) {
        case Type::float64:
            return reduce_float64(reinterpret_cast<const double* const*>(live), share, size, static_cast<double*>(mean), begin, end);
        case Type::float32:
            return reduce_float32(reinterpret_cast<const float* const*>(live), narrow.data(), size, static_cast<float*>(mean), begin, end);
        case Type::bfloat16:
            return reduce_bfloat16(reinterpret_cast<const BFloat16* const*>(live), narrow.data(), size, static_cast<float*>(mean), begin, end);
        case Type::float16:
            return reduce_float16(reinterpret_cast<const Float16* const*>(live), narrow.data(), size, static_cast<float*>(mean), begin, end);
    }
}

void spread(Type type, const void* mean, void* const* live, int size, void* anchor, std::size_t begin,
            std::size_t end) {
    switch (type) {
        case Type::float64:
            return spread_float64(static_cast<const double*>(mean), reinterpret_cast<double* const*>(live), size, static_cast<double*>(anchor), begin, end);
        case Type::float32:
            return spread_float32(static_cast<const float*>(mean), reinterpret_cast<float* const*>(live), size, static_cast<float*>(anchor), begin, end);
        case Type::bfloat16:
            return spread_bfloat16(static_cast<const float*>(mean), reinterpret_cast<BFloat16* const*>(live), size, static_cast<BFloat16*>(anchor), begin, end);
        case Type::float16:
            return spread_float16(static_cast<const float*>(mean), reinterpret_cast<Float16* const*>(live), size, static_cast<Float16*>(anchor), begin, end);
    }
}

}  // namespace hvd_train::shm
