// Sums to the wire and back: sizes, bits that are known, bounds of the error, encoding again.
//
//     test_codec sizes|bits|bounds|again|finite
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "ring/codec.hpp"

using namespace hvd_train::ring;

namespace {

void require(bool ok, const char* what, int line) {
    if (ok) return;
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::_Exit(1);
}
#define REQUIRE(ok) require((ok), #ok, __LINE__)

using Bytes = std::vector<std::byte>;

constexpr Wire kWires[] = {Wire::full, Wire::bfloat16, Wire::float16, Wire::int8};
constexpr std::size_t kSizes[] = {0, 1, 2, 255, 256, 257, 511, 512, 1009, 32768, 65537};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();

template <class W>
Bytes encoded(Wire wire, const std::vector<W>& values) {
    // One byte more on both sides, so that nothing is aligned and a write beyond the end is seen.
    const std::size_t n = encoded_bytes(wire, sizeof(W) == 8, values.size());
    Bytes bytes(n + 2, std::byte{0xa5});
    encode(wire, values.data(), values.size(), bytes.data() + 1);
    REQUIRE(bytes.front() == std::byte{0xa5} && bytes.back() == std::byte{0xa5});
    return Bytes(bytes.begin() + 1, bytes.end() - 1);
}

template <class W>
std::vector<W> decoded(Wire wire, const Bytes& bytes, std::size_t n) {
    Bytes shifted(bytes.size() + 1);
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + 1);
    std::vector<W> values(n + 1, W(77));
    decode(wire, shifted.data() + 1, n, values.data());
    REQUIRE(values.back() == W(77));
    values.pop_back();
    return values;
}

template <class W>
std::vector<W> there_and_back(Wire wire, const std::vector<W>& values) {
    return decoded<W>(wire, encoded(wire, values), values.size());
}

template <class T>
T at(const Bytes& bytes, std::size_t offset) {
    T value;
    std::memcpy(&value, bytes.data() + offset, sizeof value);
    return value;
}

// The same numbers on every machine: xorshift.
struct Random {
    std::uint64_t state;
    std::uint64_t operator()() {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }
    // Of either sign, its logarithm evenly in [from, to).
    double operator()(int from, int to) {
        const auto exponent = from + static_cast<int>((*this)() % static_cast<unsigned>(to - from));
        const double fraction = 1 + static_cast<double>((*this)() >> 12) * 0x1p-52;
        return std::ldexp((*this)() % 2 == 0 ? fraction : -fraction, exponent);
    }
};

template <class W>
void sizes() {
    for (const std::size_t n : kSizes) {
        std::vector<W> values(n);
        // Eighths below 16: kept by each floating-point type here; one block of int8 differs from the next.
        for (std::size_t i = 0; i < n; ++i) values[i] = static_cast<W>((i * 37 + i / 256) % 255) / 8 - W(15.875);
        REQUIRE(encoded_bytes(Wire::full, sizeof(W) == 8, n) == n * sizeof(W));
        REQUIRE(encoded_bytes(Wire::bfloat16, sizeof(W) == 8, n) == 2 * n);
        REQUIRE(encoded_bytes(Wire::float16, sizeof(W) == 8, n) == 2 * n);
        REQUIRE(encoded_bytes(Wire::int8, sizeof(W) == 8, n) == n + 4 * (n / 256 + (n % 256 != 0 ? 1 : 0)));
        REQUIRE(there_and_back(Wire::full, values) == values);
        REQUIRE(there_and_back(Wire::bfloat16, values) == values);
        REQUIRE(there_and_back(Wire::float16, values) == values);
        const std::vector<W> coarse = there_and_back(Wire::int8, values);
        for (std::size_t i = 0; i < n; ++i) REQUIRE(std::fabs(coarse[i] - values[i]) <= W(15.875) / 253);
    }
}

template <class W>
void known_halves() {
    const W values[] = {0,      W(-0.0), 1,        W(-2.5),     W(0x1p-14), W(0x1p-24),   W(0x1p-25),    W(0x1.8p-24),
                        65504,  65519,   65520,    W(-1e30),    kInfinity,  -kInfinity,   W(1.0009765625), W(0x1.002p0)};
    const std::uint16_t halves[] = {0,      0x8000, 0x3c00, 0xc100, 0x0400, 0x0001, 0x0000, 0x0002,
                                    0x7bff, 0x7bff, 0x7c00, 0xfc00, 0x7c00, 0xfc00, 0x3c01, 0x3c00};
    const std::uint16_t brains[] = {0,      0x8000, 0x3f80, 0xc020, 0x3880, 0x3380, 0x3300, 0x33c0,
                                    0x4780, 0x4780, 0x4780, 0xf14a, 0x7f80, 0xff80, 0x3f80, 0x3f80};
    const std::vector<W> list(std::begin(values), std::end(values));
    const Bytes half = encoded(Wire::float16, list), brain = encoded(Wire::bfloat16, list);
    for (std::size_t i = 0; i < list.size(); ++i) {
        REQUIRE(at<std::uint16_t>(half, 2 * i) == halves[i]);
        REQUIRE(at<std::uint16_t>(brain, 2 * i) == brains[i]);
    }
    const std::vector<W> sick{1, std::numeric_limits<W>::quiet_NaN(), -std::numeric_limits<W>::quiet_NaN(), 2};
    for (const Wire wire : {Wire::full, Wire::bfloat16, Wire::float16}) {
        const std::vector<W> back = there_and_back(wire, sick);
        REQUIRE(back[0] == 1 && std::isnan(back[1]) && std::isnan(back[2]) && back[3] == 2);
    }
    // What rounds to more than the largest float32 is infinity in bfloat16; float64 has more of that.
    REQUIRE(there_and_back<W>(Wire::bfloat16, {W(kLargest)})[0] == W(kInfinity));
    if (sizeof(W) == 8) REQUIRE(there_and_back<W>(Wire::bfloat16, {W(-1e39)})[0] == W(-kInfinity));
    REQUIRE(there_and_back<W>(Wire::bfloat16, {W(0x1p-133)})[0] == W(0x1p-133));
}

template <class W>
void known_int8() {
    // Scale 0.5: the halves between two values go to the even one.
    std::vector<W> values(300, W(0));
    const W first[] = {W(63.5), W(-63.5), W(0.25), W(0.75), W(-0.25), W(-0.75), W(1.25), W(-0.0), W(1e-30), 31};
    const int expected[] = {127, -127, 0, 2, 0, -2, 2, 0, 0, 62};
    std::copy(std::begin(first), std::end(first), values.begin());
    values[256] = -127 * W(0x1p40);
    const Bytes bytes = encoded(Wire::int8, values);
    REQUIRE(at<float>(bytes, 0) == 0.5F && at<float>(bytes, 260) == 0x1p40F);
    for (std::size_t i = 0; i < 10; ++i) REQUIRE(at<std::int8_t>(bytes, 4 + i) == expected[i]);
    for (std::size_t i = 10; i < 256; ++i) REQUIRE(at<std::int8_t>(bytes, 4 + i) == 0);
    REQUIRE(at<std::int8_t>(bytes, 264) == -127);
    const std::vector<W> back = decoded<W>(Wire::int8, bytes, 300);
    REQUIRE(back[0] == W(63.5) && back[3] == 1 && !std::signbit(back[7]) && back[256] == values[256]);

    // One element that is not finite spoils its block and no other.
    for (const W sick : {std::numeric_limits<W>::quiet_NaN(), W(kInfinity), W(-kInfinity)}) {
        for (const std::size_t where : {std::size_t{0}, std::size_t{255}, std::size_t{256}, std::size_t{299}}) {
            std::vector<W> poisoned = values;
            poisoned[where] = sick;
            const std::vector<W> out = there_and_back(Wire::int8, poisoned);
            for (std::size_t i = 0; i < 300; ++i) REQUIRE(std::isnan(out[i]) == (i / 256 == where / 256));
        }
    }

    // Nothing, and what is as good as nothing.
    for (const W tiny : {W(0), W(-0.0), W(0x1p-149), W(-0x1.8p-127), W(0x1p-126), W(0x1.fbp-120)}) {
        std::vector<W> block(256, tiny);
        const Bytes none = encoded(Wire::int8, block);
        REQUIRE(std::all_of(none.begin(), none.end(), [](std::byte b) { return b == std::byte{0}; }));
        for (const W x : decoded<W>(Wire::int8, none, 256)) REQUIRE(x == 0 && !std::signbit(x));
    }
    REQUIRE(there_and_back<W>(Wire::int8, {W(0x1.fcp-120)})[0] == W(0x1.fcp-120));  // 127 * 2^-126

    // The largest of all has a scale, whose product with 127 is beyond float32: seen, not cut.
    const W largest = there_and_back<W>(Wire::int8, {W(kLargest)})[0];
    REQUIRE(sizeof(W) == 4 ? largest == W(kInfinity) : std::fabs(largest / W(kLargest) - 1) < W(1e-7));
    REQUIRE(finite(there_and_back<W>(Wire::int8, {W(0x1p127)}).data(), 1));
    if (sizeof(W) == 8) REQUIRE(std::isnan(there_and_back<W>(Wire::int8, {W(1e300)})[0]));
}

// Every processor, with every kind of vector code or none, must come to the same bits: those that were seen first.
template <class W>
std::uint64_t digest(Wire wire) {
    Random random{0x9e3779b97f4a7c15U};
    std::uint64_t hash = 0xcbf29ce484222325U;
    const auto add = [&hash](const auto* values, std::size_t num_bytes) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(values);
        for (std::size_t i = 0; i < num_bytes; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3U;
    };
    for (const std::size_t n : {1009, 256, 65537}) {
        for (const int reach : {3, 30, 120, 149}) {
            std::vector<W> values(n);
            for (W& x : values) x = static_cast<W>(random(-reach, std::min(reach, 128)));
            values[n / 2] = W(kNaN);
            values[n / 3] = W(-kInfinity);
            const Bytes bytes = encoded(wire, values);
            const std::vector<W> back = decoded<W>(wire, bytes, n);
            add(bytes.data(), bytes.size());
            add(back.data(), n * sizeof(W));
        }
    }
    return hash;
}

void same_bits() {
    const std::uint64_t floats[] = {0xc350f47d2d635a85, 0xd273fe39f2185295, 0xc6006925366ed017, 0xda1465f216bdd325};
    const std::uint64_t doubles[] = {0x5ea2c3335dfae099, 0x568e839bff1db529, 0x5c6fdde4773ab3a5, 0xfe824c0400dcf882};
    for (const Wire wire : kWires) {
        REQUIRE(digest<float>(wire) == floats[static_cast<int>(wire)]);
        REQUIRE(digest<double>(wire) == doubles[static_cast<int>(wire)]);
    }
}

double bound(Wire wire, double x, double block_max, bool is_double) {
    const double twice = is_double ? std::fabs(x) * 0x1p-24 + 0x1p-150 : 0;  // rounded to float32 first
    switch (wire) {
        case Wire::full: return 0;
        case Wire::bfloat16: return std::max(std::fabs(x) * 0x1p-8, 0x1p-134) + twice;
        case Wire::float16: return std::max(std::fabs(x) * 0x1p-11, 0x1p-25) + twice;
        case Wire::int8: return block_max < 127 * 0x1p-126 ? block_max : block_max / 254 * (1 + 0x1p-15);
    }
    return -1;
}

// Random values over ranges from narrow to the widest that the types have, to the bounds that the header tells.
template <class W>
void bounds() {
    Random random{42};
    const int ranges[][2] = {{-1, 1}, {-14, -10}, {-26, -13}, {-30, 15}, {-140, -110}, {-149, 127}};
    for (const auto& [from, to] : ranges) {
        for (int repeat = 0; repeat < 8; ++repeat) {
            std::vector<W> values(8192 + 17);
            for (W& x : values) x = static_cast<W>(random(from, to));
            for (const Wire wire : kWires) {
                const std::vector<W> back = there_and_back(wire, values);
                for (std::size_t begin = 0; begin < values.size(); begin += kBlock) {
                    const std::size_t end = std::min(begin + kBlock, values.size());
                    double most = 0;
                    for (std::size_t i = begin; i < end; ++i) most = std::max(most, std::fabs(static_cast<double>(values[i])));
                    for (std::size_t i = begin; i < end; ++i) {
                        const auto x = static_cast<double>(values[i]), y = static_cast<double>(back[i]);
                        if (wire == Wire::float16 && std::fabs(x) >= 65520) {
                            REQUIRE(y == std::copysign(static_cast<double>(kInfinity), x));
                        } else {
                            REQUIRE(std::fabs(y - x) <= bound(wire, x, most, sizeof(W) == 8));
                        }
                    }
                }
            }
        }
    }
}

// What was decoded encodes to the same bytes, but for the last bit of a scale; and that is the end of it.
template <class W>
void again() {
    Random random{7};
    std::size_t num_moved = 0;
    for (int repeat = 0; repeat < 200; ++repeat) {
        std::vector<W> values(1009);
        for (W& x : values) x = static_cast<W>(random(-20, 14));
        for (const Wire wire : kWires) {
            const Bytes first = encoded(wire, values);
            const Bytes second = encoded(wire, decoded<W>(wire, first, values.size()));
            const Bytes third = encoded(wire, decoded<W>(wire, second, values.size()));
            REQUIRE(third == second);
            if (wire != Wire::int8 || sizeof(W) == 8) REQUIRE(second == first);
            if (wire != Wire::int8) continue;
            for (std::size_t i = 0; i < first.size(); i += 4 + kBlock) {
                const auto a = at<float>(first, i), b = at<float>(second, i);
                num_moved += a != b ? 1 : 0;
                REQUIRE(b == a || b == std::nextafter(a, 0.0F) || b == std::nextafter(a, kInfinity));
                const std::size_t values_end = std::min(i + 4 + kBlock, first.size());
                REQUIRE(std::memcmp(&first[i + 4], &second[i + 4], values_end - i - 4) == 0);
            }
        }
    }
    REQUIRE(num_moved < 200 * 4 / 20);  // one in 128 is expected of float32
}

template <class W>
void finite_or_not() {
    for (const std::size_t n : kSizes) {
        std::vector<W> values(n);
        for (std::size_t i = 0; i < n; ++i) values[i] = i % 3 == 0 ? std::numeric_limits<W>::max() : -static_cast<W>(i);
        REQUIRE(finite(values.data(), n));
        for (const std::size_t where : {std::size_t{0}, n / 2, n - 1}) {
            for (const W sick : {W(kInfinity), W(-kInfinity), W(kNaN), -W(kNaN), std::numeric_limits<W>::signaling_NaN()}) {
                if (n == 0) continue;
                const W before = values[where];
                std::memcpy(&values[where], &sick, sizeof sick);
                REQUIRE(!finite(values.data(), n));
                values[where] = before;
            }
        }
        if (n == 0) continue;
        for (const W good : {W(-0.0), std::numeric_limits<W>::denorm_min(), std::numeric_limits<W>::lowest()}) {
            values[n - 1] = good;
            REQUIRE(finite(values.data(), n));
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    REQUIRE(argc == 2);
    const std::string what = argv[1];
    const auto both = [](auto for_float, auto for_double) {
        for_float();
        for_double();
        return true;
    };
    const bool known = what == "sizes"    ? both(sizes<float>, sizes<double>)
                       : what == "bits"   ? both(known_halves<float>, known_halves<double>) &&
                                              both(known_int8<float>, known_int8<double>) && both(same_bits, [] {})
                       : what == "bounds" ? both(bounds<float>, bounds<double>)
                       : what == "again"  ? both(again<float>, again<double>)
                       : what == "finite" ? both(finite_or_not<float>, finite_or_not<double>)
                                          : false;
    REQUIRE(known);
    std::puts("good");
    return 0;
}
