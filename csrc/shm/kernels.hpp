// The arithmetic of an average within a host: plain loops over one rank's slice, a line of
// memory at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hvd_train::shm {

// Types of a buffer; the numbers are part of the interface to Python.
enum class Type : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

std::size_t size_of(Type type);
// What a mean is summed in: float64 for float64, float32 for the others.
std::size_t wide_size_of(Type type);

// For each element i of [begin, end): m := sum over the ranks r of share[r] * live[r][i], in rank order, left out
// where the share is 0, however live is; then live[r][i] := m for every rank, and anchor[i] := m. The anchor
// begins where a line of memory does.
void average(Type type, void* const* live, const double* share, int size, void* anchor, std::size_t begin,
             std::size_t end);

// The first half: mean[i - begin] := m, of the wide type. With a base, a full tensor of `type`, m is the sum of
// share[r] * (live[r][i] - base[i]).
void reduce(Type type, const void* const* live, const double* share, int size, const void* base, void* mean,
            std::size_t begin, std::size_t end);

// into[i] := from[i] + into[i], both of the wide type of `type`.
void accumulate(Type type, const void* from, void* into, std::size_t n);

// The second half: live[r][i] := mean[i - begin] for every rank, and anchor[i] likewise; with a base,
// base[i] + mean[i - begin]. Where `size` is 0 the anchor alone is written.
void spread(Type type, const void* mean, const void* base, void* const* live, int size, void* anchor,
            std::size_t begin, std::size_t end);

}  // namespace hvd_train::shm
