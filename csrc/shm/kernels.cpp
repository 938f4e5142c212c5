#include "shm/kernels.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "shm/clones.hpp"
#include "shm/half.hpp"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace hvd_train::shm {
namespace {

// Elements of a tile. Its sums stay in the first-level cache; so do the lines of each rank's tile between the read
// and the write, in the second-level cache, up to some dozens of ranks.
constexpr std::size_t kTile = 2048;

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

template <class T>
using WideOf = typename Traits<T>::Wide;

// What a rank's element adds to the sum, before its share: the value, or its difference from the base.
template <class T>
struct Value {
    const T* from;
    HVD_TRAIN_INLINE WideOf<T> operator[](std::size_t i) const { return static_cast<WideOf<T>>(from[i]); }
};
template <class T>
struct Difference {
    const T* from;
    const T* base;
    HVD_TRAIN_INLINE WideOf<T> operator[](std::size_t i) const {
        return static_cast<WideOf<T>>(from[i]) - static_cast<WideOf<T>>(base[i]);
    }
};

template <class Term, class W>
HVD_TRAIN_INLINE void add_tile(Term term, W share, bool first, std::size_t n, W* sum) {
    if (first) {
        for (std::size_t i = 0; i < n; ++i) sum[i] = share * term[i];
    } else {
        for (std::size_t i = 0; i < n; ++i) sum[i] += share * term[i];
    }
}

template <class T>
HVD_TRAIN_INLINE void sum_tile(const T* const* live, const WideOf<T>* share, int size, const T* base, std::size_t at,
                               std::size_t n, WideOf<T>* sum) {
    bool first = true;
    for (int r = 0; r < size; ++r) {
        if (share[r] == 0) continue;
        if (base == nullptr) {
            add_tile(Value<T>{live[r] + at}, share[r], first, n, sum);
        } else {
            add_tile(Difference<T>{live[r] + at, base + at}, share[r], first, n, sum);
        }
        first = false;
    }
    if (first) std::fill(sum, sum + n, WideOf<T>(0));
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

template <class T>
HVD_TRAIN_INLINE void spread_tile(const WideOf<T>* mean, const T* base, T* const* live, int size, T* anchor,
                                  std::size_t at, std::size_t n) {
    alignas(64) T narrow[kTile];
    if (base == nullptr) {
        for (std::size_t i = 0; i < n; ++i) narrow[i] = Traits<T>::narrow(mean[i]);
    } else {
        const T* from = base + at;
        for (std::size_t i = 0; i < n; ++i) narrow[i] = Traits<T>::narrow(static_cast<WideOf<T>>(from[i]) + mean[i]);
    }
    for (int r = 0; r < size; ++r) std::memcpy(live[r] + at, narrow, n * sizeof(T));
    stream(anchor + at, narrow, n * sizeof(T));
}

template <class T>
HVD_TRAIN_INLINE void average_of(T* const* live, const WideOf<T>* share, int size, T* anchor, std::size_t begin,
                                 std::size_t end) {
    alignas(64) WideOf<T> sum[kTile];
    for (std::size_t at = begin; at < end; at += kTile) {
        const std::size_t n = std::min(kTile, end - at);
        sum_tile<T>(live, share, size, nullptr, at, n, sum);
        spread_tile<T>(sum, nullptr, live, size, anchor, at, n);
    }
    stream_fence();
}

template <class T>
HVD_TRAIN_INLINE void reduce_of(const T* const* live, const WideOf<T>* share, int size, const T* base,
                                WideOf<T>* mean, std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kTile) {
        sum_tile<T>(live, share, size, base, at, std::min(kTile, end - at), mean + (at - begin));
    }
}

template <class T>
HVD_TRAIN_INLINE void spread_of(const WideOf<T>* mean, const T* base, T* const* live, int size, T* anchor,
                                std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kTile) {
        spread_tile<T>(mean + (at - begin), base, live, size, anchor, at, std::min(kTile, end - at));
    }
    stream_fence();
}

#define HVD_TRAIN_KERNELS(T)                                                                                          \
    HVD_TRAIN_CLONES void average_clone(T* const* live, const WideOf<T>* share, int size, T* anchor,                  \
                                        std::size_t begin, std::size_t end) {                                         \
        average_of<T>(live, share, size, anchor, begin, end);                                                         \
    }                                                                                                                 \
    HVD_TRAIN_CLONES void reduce_clone(const T* const* live, const WideOf<T>* share, int size, const T* base,         \
                                       WideOf<T>* mean, std::size_t begin, std::size_t end) {                         \
        reduce_of<T>(live, share, size, base, mean, begin, end);                                                      \
    }                                                                                                                 \
    HVD_TRAIN_CLONES void spread_clone(const WideOf<T>* mean, const T* base, T* const* live, int size, T* anchor,     \
                                       std::size_t begin, std::size_t end) {                                          \
        spread_of<T>(mean, base, live, size, anchor, begin, end);                                                     \
    }

HVD_TRAIN_KERNELS(double)
HVD_TRAIN_KERNELS(float)
HVD_TRAIN_KERNELS(BFloat16)
HVD_TRAIN_KERNELS(Float16)

template <class W>
HVD_TRAIN_INLINE void accumulate_of(const W* from, W* into, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) into[i] = from[i] + into[i];
}

HVD_TRAIN_CLONES void accumulate_clone(const double* from, double* into, std::size_t n) {
    accumulate_of(from, into, n);
}
HVD_TRAIN_CLONES void accumulate_clone(const float* from, float* into, std::size_t n) { accumulate_of(from, into, n); }

// Calls `body` with a null pointer to the C++ type of a buffer's elements.
template <class Body>
auto with_type(Type type, Body body) {
    switch (type) {
        case Type::float64: return body(static_cast<double*>(nullptr));
        case Type::float32: return body(static_cast<float*>(nullptr));
        case Type::bfloat16: return body(static_cast<BFloat16*>(nullptr));
        case Type::float16: return body(static_cast<Float16*>(nullptr));
    }
    throw std::invalid_argument("no such type");
}

template <class T>
std::vector<WideOf<T>> widen(const double* share, int size) {
    return std::vector<WideOf<T>>(share, share + size);
}

}  // namespace

std::size_t size_of(Type type) {
    return with_type(type, [](auto* t) { return sizeof *t; });
}

std::size_t wide_size_of(Type type) {
    return with_type(type, [](auto* t) { return sizeof(WideOf<std::decay_t<decltype(*t)>>); });
}

void average(Type type, void* const* live, const double* share, int size, void* anchor, std::size_t begin,
             std::size_t end) {
    with_type(type, [&](auto* t) {
        using T = std::decay_t<decltype(*t)>;
        average_clone(reinterpret_cast<T* const*>(live), widen<T>(share, size).data(), size, static_cast<T*>(anchor),
                      begin, end);
    });
}

void reduce(Type type, const void* const* live, const double* share, int size, const void* base, void* mean,
            std::size_t begin, std::size_t end) {
    with_type(type, [&](auto* t) {
        using T = std::decay_t<decltype(*t)>;
        reduce_clone(reinterpret_cast<const T* const*>(live), widen<T>(share, size).data(), size,
                     static_cast<const T*>(base), static_cast<WideOf<T>*>(mean), begin, end);
    });
}

void accumulate(Type type, const void* from, void* into, std::size_t n) {
    with_type(type, [&](auto* t) {
        using W = WideOf<std::decay_t<decltype(*t)>>;
        accumulate_clone(static_cast<const W*>(from), static_cast<W*>(into), n);
    });
}

void spread(Type type, const void* mean, const void* base, void* const* live, int size, void* anchor,
            std::size_t begin, std::size_t end) {
    with_type(type, [&](auto* t) {
        using T = std::decay_t<decltype(*t)>;
        spread_clone(static_cast<const WideOf<T>*>(mean), static_cast<const T*>(base),
                     reinterpret_cast<T* const*>(live), size, static_cast<T*>(anchor), begin, end);
    });
}

}  // namespace hvd_train::shm
