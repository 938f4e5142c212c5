#include "ring/codec.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "shm/clones.hpp"
#include "shm/half.hpp"

namespace hvd_train::ring {
namespace {

using shm::BFloat16;
using shm::Float16;

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2 && sizeof(float) == 4);

// The integers that stand for a floating-point type's bits. Without the sign they are in the order of the numbers,
// with infinity and the not-a-numbers above all others; loops over integers become vector code where a largest
// floating-point number, or an early exit, would not.
template <class W>
struct Bits;
template <>
struct Bits<float> {
    using Signed = std::int32_t;
    using Unsigned = std::uint32_t;
    static constexpr Unsigned magnitude = 0x7fffffffU;
    static constexpr Unsigned infinity = 0x7f800000U;
    static constexpr float shift = 0x1.8p23F;
};
template <>
struct Bits<double> {
    using Signed = std::int64_t;
    using Unsigned = std::uint64_t;
    static constexpr Unsigned magnitude = 0x7fffffffffffffffU;
    static constexpr Unsigned infinity = 0x7ff0000000000000U;
    static constexpr double shift = 0x1.8p52;
};

template <class To, class From>
HVD_TRAIN_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Half, class W>
HVD_TRAIN_INLINE void encode_half(const W* in, std::size_t n, std::byte* out) {
    for (std::size_t i = 0; i < n; ++i) {
        const Half value = Half::from(static_cast<float>(in[i]));
        std::memcpy(out + i * sizeof value, &value, sizeof value);
    }
}

template <class Half, class W>
HVD_TRAIN_INLINE void decode_half(const std::byte* in, std::size_t n, W* out) {
    for (std::size_t i = 0; i < n; ++i) {
        Half value;
        std::memcpy(&value, in + i * sizeof value, sizeof value);
        out[i] = static_cast<W>(static_cast<float>(value));
    }
}

// The largest |in[i]|, infinite or not a number if any is.
template <class W>
HVD_TRAIN_INLINE W largest_of(const W* in, std::size_t n) {
    using Signed = typename Bits<W>::Signed;
    using Unsigned = typename Bits<W>::Unsigned;
    Signed largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        largest = std::max(largest, static_cast<Signed>(bit_cast<Unsigned>(in[i]) & Bits<W>::magnitude));
    }
    return bit_cast<W>(largest);
}

// Not a number where m is not finite, or its 127th part is no float32. Never subnormal: some processors are set to take
// these for 0, and what is divided by them would be infinite.
HVD_TRAIN_INLINE float scale_of(double largest) {
    if (!(largest <= 127.0 * std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
    const auto scale = static_cast<float>(largest / 127);
    return scale < std::numeric_limits<float>::min() ? 0 : scale;
}

template <class W>
HVD_TRAIN_INLINE void encode_int8(const W* in, std::size_t n, std::byte* out) {
    for (; n > 0; in += std::min(n, kBlock), n -= std::min(n, kBlock)) {
        const std::size_t m = std::min(n, kBlock);
        const float scale = scale_of(static_cast<double>(largest_of(in, m)));
        std::memcpy(out, &scale, sizeof scale);
        out += sizeof scale;
        const bool usable = scale > 0;
        const W divisor = usable ? static_cast<W>(scale) : 1;
        for (std::size_t i = 0; i < m; ++i) {
            // Adding it leaves no bits for a fraction, so that the sum is rounded to an integer, its low byte.
            const W shifted = in[i] / divisor + Bits<W>::shift;
            const auto bits = bit_cast<typename Bits<W>::Unsigned>(shifted);
            out[i] = static_cast<std::byte>(bits);
        }
        if (!usable) std::memset(out, 0, m);
        out += m;
    }
}

template <class W>
HVD_TRAIN_INLINE void decode_int8(const std::byte* in, std::size_t n, W* out) {
    for (; n > 0; out += std::min(n, kBlock), n -= std::min(n, kBlock)) {
        const std::size_t m = std::min(n, kBlock);
        float scale;
        std::memcpy(&scale, in, sizeof scale);
        in += sizeof scale;
        const W factor = static_cast<W>(scale);
        for (std::size_t i = 0; i < m; ++i) out[i] = static_cast<W>(static_cast<std::int8_t>(in[i])) * factor;
        in += m;
    }
}

// The distance from infinity to the sign's bit, added to a number's bits, sets that bit if they are infinity's or more.
template <class W>
HVD_TRAIN_INLINE bool finite_of(const W* values, std::size_t n) {
    using Unsigned = typename Bits<W>::Unsigned;
    constexpr Unsigned kToSign = Bits<W>::magnitude - Bits<W>::infinity + 1;
    Unsigned seen = 0;
    for (std::size_t i = 0; i < n; ++i) seen |= (bit_cast<Unsigned>(values[i]) & Bits<W>::magnitude) + kToSign;
    return seen <= Bits<W>::magnitude;
}

#define HVD_TRAIN_CODEC(W)                                                                                  \
    HVD_TRAIN_CLONES void encode_bfloat16_clone(const W* in, std::size_t n, std::byte* out) {               \
        encode_half<BFloat16>(in, n, out);                                                                  \
    }                                                                                                       \
    HVD_TRAIN_CLONES void encode_float16_clone(const W* in, std::size_t n, std::byte* out) {                \
        encode_half<Float16>(in, n, out);                                                                   \
    }                                                                                                       \
    HVD_TRAIN_CLONES void encode_int8_clone(const W* in, std::size_t n, std::byte* out) {                   \
        encode_int8(in, n, out);                                                                            \
    }                                                                                                       \
    HVD_TRAIN_CLONES void decode_bfloat16_clone(const std::byte* in, std::size_t n, W* out) {               \
        decode_half<BFloat16>(in, n, out);                                                                  \
    }                                                                                                       \
    HVD_TRAIN_CLONES void decode_float16_clone(const std::byte* in, std::size_t n, W* out) {                \
        decode_half<Float16>(in, n, out);                                                                   \
    }                                                                                                       \
    HVD_TRAIN_CLONES void decode_int8_clone(const std::byte* in, std::size_t n, W* out) {                   \
        decode_int8(in, n, out);                                                                            \
    }                                                                                                       \
    HVD_TRAIN_CLONES bool finite_clone(const W* values, std::size_t n) { return finite_of(values, n); }

HVD_TRAIN_CODEC(float)
HVD_TRAIN_CODEC(double)

template <class W>
void encode_any(Wire wire, const W* in, std::size_t n, std::byte* out) {
    switch (wire) {
        case Wire::full: std::copy_n(reinterpret_cast<const std::byte*>(in), n * sizeof(W), out); return;
        case Wire::bfloat16: return encode_bfloat16_clone(in, n, out);
        case Wire::float16: return encode_float16_clone(in, n, out);
        case Wire::int8: return encode_int8_clone(in, n, out);
    }
    throw std::invalid_argument("no such type on the wire");
}

template <class W>
void decode_any(Wire wire, const std::byte* in, std::size_t n, W* out) {
    switch (wire) {
        case Wire::full: std::copy_n(in, n * sizeof(W), reinterpret_cast<std::byte*>(out)); return;
        case Wire::bfloat16: return decode_bfloat16_clone(in, n, out);
        case Wire::float16: return decode_float16_clone(in, n, out);
        case Wire::int8: return decode_int8_clone(in, n, out);
    }
    throw std::invalid_argument("no such type on the wire");
}

}  // namespace

std::size_t encoded_bytes(Wire wire, bool wide_is_double, std::size_t n) {
    switch (wire) {
        case Wire::full: return n * (wide_is_double ? sizeof(double) : sizeof(float));
        case Wire::bfloat16:
        case Wire::float16: return n * 2;
        case Wire::int8: return n + (n + kBlock - 1) / kBlock * sizeof(float);
    }
    throw std::invalid_argument("no such type on the wire");
}

void encode(Wire wire, const float* in, std::size_t n, std::byte* out) { encode_any(wire, in, n, out); }
void encode(Wire wire, const double* in, std::size_t n, std::byte* out) { encode_any(wire, in, n, out); }
void decode(Wire wire, const std::byte* in, std::size_t n, float* out) { decode_any(wire, in, n, out); }
void decode(Wire wire, const std::byte* in, std::size_t n, double* out) { decode_any(wire, in, n, out); }
bool finite(const float* values, std::size_t n) { return finite_clone(values, n); }
bool finite(const double* values, std::size_t n) { return finite_clone(values, n); }

}  // namespace hvd_train::ring
