// The arithmetic within a host, for each type, against plain loops.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "shm/half.hpp"
#include "shm/kernels.hpp"

using namespace hvd_train::shm;

namespace {

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::_Exit(1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

// Eighths up to 16: sums and differences of them are exact in every type here.
double exact(int rank, std::size_t index) {
    return static_cast<double>((index * 7 + static_cast<std::size_t>(rank) * 5) % 128) / 8 - 8;
}

template <class T>
T narrow(double value) {
    if constexpr (sizeof(T) == 2) {
        return T::from(static_cast<float>(value));
    } else {
        return static_cast<T>(value);
    }
}

// Elements [begin, end) of a buffer of three ranks, the second of which has share 0 and is not finite.
template <class T, class W>
void grid(Type type) {
    REQUIRE(size_of(type) == sizeof(T) && wide_size_of(type) == sizeof(W));
    const std::size_t numel = 65537;
    const std::size_t spans[][2] = {{0, 0}, {7, 7}, {0, 1}, {3, 2050}, {1, 4097}, {0, numel}, {65536, numel}};
    const double shares[] = {0.5, 0, 0.25};
    std::vector<std::vector<T>> tensors(3, std::vector<T>(numel));
    std::vector<T> base(numel), untouched(numel, narrow<T>(-3));
    for (std::size_t i = 0; i < numel; ++i) {
        tensors[0][i] = narrow<T>(exact(0, i));
        tensors[1][i] = narrow<T>(std::numeric_limits<double>::quiet_NaN());
        tensors[2][i] = narrow<T>(exact(2, i));
        base[i] = narrow<T>(exact(1, i));
    }
    const void* from[] = {tensors[0].data(), tensors[1].data(), tensors[2].data()};
    for (const auto& [begin, end] : spans) {
        const std::size_t n = end - begin;
        std::vector<W> plain(n + 1, W(77)), differences(n + 1, W(77));
        reduce(type, from, shares, 3, nullptr, plain.data(), begin, end);
        reduce(type, from, shares, 3, base.data(), differences.data(), begin, end);
        for (std::size_t i = 0; i < n; ++i) {
            const double a = exact(0, begin + i), b = exact(2, begin + i), x = exact(1, begin + i);
            REQUIRE(static_cast<double>(plain[i]) == 0.5 * a + 0.25 * b);
            REQUIRE(static_cast<double>(differences[i]) == 0.5 * (a - x) + 0.25 * (b - x));
        }
        REQUIRE(plain[n] == W(77) && differences[n] == W(77));

        std::vector<T> live[] = {untouched, untouched};
        std::vector<T> anchor = untouched, alone = untouched;
        void* to[] = {live[0].data(), live[1].data()};
        spread(type, plain.data(), nullptr, to, 2, anchor.data(), begin, end);
        spread(type, differences.data(), base.data(), nullptr, 0, alone.data(), begin, end);
        for (std::size_t i = 0; i < numel; ++i) {
            const bool inside = begin <= i && i < end;
            const T mean = inside ? narrow<T>(static_cast<double>(plain[i - begin])) : narrow<T>(-3);
            const double sum = inside ? exact(1, i) + static_cast<double>(differences[i - begin]) : -3;
            const T moved = narrow<T>(sum);
            REQUIRE(std::memcmp(&live[0][i], &mean, sizeof mean) == 0);
            REQUIRE(std::memcmp(&live[1][i], &mean, sizeof mean) == 0);
            REQUIRE(std::memcmp(&anchor[i], &mean, sizeof mean) == 0);
            REQUIRE(std::memcmp(&alone[i], &moved, sizeof moved) == 0);
        }
    }
}

// With all shares 0 there is nothing to sum, however the tensors are.
template <class T, class W>
void nobody(Type type) {
    const std::vector<T> sick(9, narrow<T>(std::numeric_limits<double>::infinity()));
    const void* from[] = {sick.data(), sick.data()};
    const double shares[] = {0, 0};
    for (const void* base : {static_cast<const void*>(nullptr), static_cast<const void*>(sick.data())}) {
        std::vector<W> mean(9, W(5));
        reduce(type, from, shares, 2, base, mean.data(), 0, 9);
        for (const W m : mean) REQUIRE(m == W(0) && !std::signbit(m));
    }
}

// The order decides about the last bit, so it is the ranks' order and no other: (1 + u) + u is 1, 1 + (u + u) is not.
void order() {
    const float u = 0x1p-24F;
    const float tensors[] = {1, u, u};
    const void* from[] = {&tensors[0], &tensors[1], &tensors[2]};
    const double shares[] = {1, 1, 1};
    float mean = 0;
    reduce(Type::float32, from, shares, 3, nullptr, &mean, 0, 1);
    REQUIRE(mean == 1);
    float back = 0;
    const void* reversed[] = {&tensors[1], &tensors[2], &tensors[0]};
    reduce(Type::float32, reversed, shares, 3, nullptr, &back, 0, 1);
    REQUIRE(back == 1 + 0x1p-23F);
}

template <class W>
void accumulates(Type type) {
    for (const std::size_t n : {0, 1, 255, 1009}) {
        std::vector<W> from(n + 1), into(n + 1);
        for (std::size_t i = 0; i <= n; ++i) {
            from[i] = static_cast<W>(i) * W(0.1);
            into[i] = W(1) / static_cast<W>(i + 3);
        }
        const std::vector<W> before = into;
        accumulate(type, from.data(), into.data(), n);
        for (std::size_t i = 0; i < n; ++i) REQUIRE(into[i] == from[i] + before[i]);
        REQUIRE(into[n] == before[n]);
    }
}

// All 65,536 values of each short type are kept by going there and back, and a value between two goes to the nearer.
void conversions() {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const Float16 half{static_cast<std::uint16_t>(bits)};
        const BFloat16 brain{half.bits};
        const std::uint16_t half_back = Float16::from(half).bits, brain_back = BFloat16::from(brain).bits;
        REQUIRE(std::isnan(float{half}) ? std::isnan(float{Float16{half_back}}) : half_back == bits);
        REQUIRE(std::isnan(float{brain}) ? std::isnan(float{BFloat16{brain_back}}) : brain_back == bits);
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        const float sign = bits < 0x8000 ? 1.0F : -1.0F;
        if (exponent == 0) REQUIRE(float{half} == sign * std::ldexp(static_cast<float>(fraction), -24));
        if (exponent > 0 && exponent < 31) {
            REQUIRE(float{half} == sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
        }
        if (exponent == 31 && fraction == 0) REQUIRE(float{half} == sign * INFINITY);

        // The midpoint to the next value goes to the even one; what lies beside it, to the nearer.
        const auto next = static_cast<std::uint16_t>(bits + 1);
        const bool largest = (bits & 0x7fff) == 0x7bff;
        if ((bits & 0x7fff) < 0x7c00) {
            const float end = largest ? sign * 65536.0F : float{Float16{next}};
            const float middle = (float{half} + end) / 2;
            const auto even = static_cast<std::uint16_t>(bits % 2 == 0 ? bits : next);
            REQUIRE(Float16::from(middle).bits == even);
            REQUIRE(Float16::from(std::nextafter(middle, 0.0F)).bits == bits);
            REQUIRE(Float16::from(std::nextafter(middle, sign * INFINITY)).bits == next);
        }
        if ((bits & 0x7fff) < 0x7f80) {
            const float middle = float_of(bits << 16 | 0x8000U);
            const auto even = static_cast<std::uint16_t>(bits % 2 == 0 ? bits : next);
            REQUIRE(BFloat16::from(middle).bits == even);
            REQUIRE(BFloat16::from(float_of(bits << 16 | 0x7fffU)).bits == bits);
            REQUIRE(BFloat16::from(float_of(bits << 16 | 0x8001U)).bits == next);
        }
    }
}

}  // namespace

int main() {
    conversions();
    grid<double, double>(Type::float64);
    grid<float, float>(Type::float32);
    grid<BFloat16, float>(Type::bfloat16);
    grid<Float16, float>(Type::float16);
    nobody<double, double>(Type::float64);
    nobody<float, float>(Type::float32);
    nobody<BFloat16, float>(Type::bfloat16);
    nobody<Float16, float>(Type::float16);
    order();
    accumulates<double>(Type::float64);
    accumulates<float>(Type::float32);
    accumulates<float>(Type::bfloat16);
    std::puts("good");
    return 0;
}
