// What sums look like on the wire between hosts, where they may be shorter than in memory.
//
// The largest error of an element x that goes there and back, sums being in float32:
//
//     full        0
//     bfloat16    |x| 2^-8, below 2^-126: 2^-134
//     float16     |x| 2^-11, below 2^-14: 2^-25
//     int8        m / 254 (1 + 2^-15), m the largest |y| of the block of x; m itself, below 127 * 2^-126
//
// Rounding is to the nearest, ties to even. From float64, which is rounded to float32 first, the short floating-point
// types err by up to |x| 2^-24 more. What is too large for a type becomes infinity and is never cut to the largest
// value: whoever decodes it sees that it is not finite. That begins where rounding ends, at 65520 for float16 and in the
// last bits of the largest float32 for bfloat16 and int8. A not-a-number stays one.
//
// int8 is blocks of `kBlock` elements, the last one shorter: a scale, m / 127 as a float32, and one signed byte for
// each element. A block that holds an element that is not finite has the scale not-a-number, and so has every element
// that is decoded from it. A scale below 2^-126 is 0: the block is decoded to zeros. Zeros lose their sign.
//
// What was decoded, encoded again, gives the same bytes: always for the floating-point types (a not-a-number keeps
// nothing but being one), and for int8 the same values with a scale that may differ in its last bit, from float32.
//
// Everything is in the byte order of the hosts, and the same on every processor.
#pragma once

#include <cstddef>

namespace hvd_train::ring {

// `full` is the type that sums have in memory: float64 for buffers of float64, float32 for all others. The numbers are
// part of the interface to Python.
enum class Wire : int { full = 0, bfloat16 = 1, float16 = 2, int8 = 3 };

// Elements that share a scale of int8.
constexpr std::size_t kBlock = 256;

// Bytes that `n` elements take on the wire.
std::size_t encoded_bytes(Wire wire, bool wide_is_double, std::size_t n);

// out, of `encoded_bytes` bytes, := the `n` elements of `in`.
void encode(Wire wire, const float* in, std::size_t n, std::byte* out);
void encode(Wire wire, const double* in, std::size_t n, std::byte* out);

// The reverse. Any bytes of that number are decoded to something.
void decode(Wire wire, const std::byte* in, std::size_t n, float* out);
void decode(Wire wire, const std::byte* in, std::size_t n, double* out);

// Whether none of the elements is infinite or not a number.
bool finite(const float* values, std::size_t n);
bool finite(const double* values, std::size_t n);

}  // namespace hvd_train::ring
