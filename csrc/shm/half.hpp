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

// yes or no, by masks: compilers turn an expression that is used on one side only back into a branch.
HVD_TRAIN_INLINE std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) {
    const std::uint32_t mask = 0U - static_cast<std::uint32_t>(condition);
    return (yes & mask) | (no & ~mask);
}

struct Float16 {
    std::uint16_t bits;
    HVD_TRAIN_INLINE operator float() const {
        const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
        const std::uint32_t magnitude = bits & 0x7fffU;
        // The exponent's bias goes from 15 to 127, and the largest exponent, of infinity and not-a-number, to the
        // largest.
        const std::uint32_t bias = select(magnitude >= 0x7c00U, 0x70000000U, 0x38000000U);
        // A subnormal is so many of the units that end the fraction of 0.5.
        const std::uint32_t subnormal = bits_of(float_of(0x3f000000U | magnitude) - 0.5F);
        return float_of(sign | select(magnitude < 0x400U, subnormal, (magnitude << 13) + bias));
    }
    static HVD_TRAIN_INLINE Float16 from(float value) {
        const std::uint32_t in = bits_of(value);
        const std::uint32_t sign = (in >> 16) & 0x8000U;
        const std::uint32_t magnitude = in & 0x7fffffffU;
        const std::uint32_t odd = (magnitude >> 13) & 1U;
        const std::uint32_t normal = (magnitude + 0xc8000fffU + odd) >> 13;  // bias 127 to 15, and half a unit
        // Adding 0.5 puts the bits of a subnormal at the end of the fraction, correctly rounded.
        const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
        const std::uint32_t number = select(magnitude < 0x38800000U, subnormal, normal);
        const std::uint32_t special = select(magnitude > 0x7f800000U, 0x7e00U, 0x7c00U);
        // From 65520, half a unit beyond the largest, it is infinity.
        return {static_cast<std::uint16_t>(sign | select(magnitude >= 0x477ff000U, special, number))};
    }
};

}  // namespace hvd_train::shm
