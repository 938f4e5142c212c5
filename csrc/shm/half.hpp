// The two floating-point types of 16 bits, converted without instructions that only some processors have, and without
// branches, so that loops over them become vector code everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "shm/clones.hpp"

namespace hvd_train::shm {

HVD_TRAIN_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

HVD_TRAIN_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Conversions to both are to the nearest, ties to even; a not-a-number stays one, and what is too large becomes
// infinity.
struct BFloat16 {
    std::uint16_t bits;
    HVD_TRAIN_INLINE operator float() const { return float_of(static_cast<std::uint32_t>(bits) << 16); }
    static HVD_TRAIN_INLINE BFloat16 from(float value) {
        const std::uint32_t in = bits_of(value);
        const std::uint32_t rounded = (in + 0x7fffU + ((in >> 16) & 1U)) >> 16;
        const std::uint32_t nan = (in >> 16) | 0x40U;
        return {static_cast<std::uint16_t>((in & 0x7fffffffU) > 0x7f800000U ? nan : rounded)};
    }
};

struct Float16 {
    std::uint16_t bits;
    HVD_TRAIN_INLINE operator float() const {
        const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
        const std::uint32_t rest = static_cast<std::uint32_t>(bits & 0x7fffU) << 13;
        // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinity and not-a-number get the
        // largest exponent.
        const float scaled = float_of(rest) * float_of(0x77800000U);
        const std::uint32_t special = (bits & 0x7c00U) == 0x7c00U ? 0x7f800000U | rest : bits_of(scaled);
        return float_of(sign | special);
    }
    static HVD_TRAIN_INLINE Float16 from(float value) {
        const std::uint32_t in = bits_of(value);
        const std::uint32_t sign = (in >> 16) & 0x8000U;
        const std::uint32_t magnitude = in & 0x7fffffffU;
        const std::uint32_t odd = (magnitude >> 13) & 1U;
        const std::uint32_t normal = (magnitude + 0xc8000fffU + odd) >> 13;  // bias 127 to 15, and half a unit
        // Subnormal: adding 0.5 puts the wanted bits at the end of the fraction, correctly rounded.
        const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
        std::uint32_t out = magnitude < 0x38800000U ? subnormal : normal;
        out = magnitude >= 0x477ff000U ? 0x7c00U : out;  // from 65520, half a unit beyond the largest
        out = magnitude > 0x7f800000U ? 0x7e00U : out;
        return {static_cast<std::uint16_t>(sign | out)};
    }
};

}  // namespace hvd_train::shm
