// What the two extensions tell Python in common.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "liveness/patience.hpp"
#include "shm/operation.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

namespace hvd_train::python {

inline std::chrono::nanoseconds seconds(double value) {
    // No count of nanoseconds overflows.
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(std::min(value, 1e9)));
}

// A Team together with the memory that it lies in.
struct SeatedTeam {
    SeatedTeam(std::shared_ptr<shm::Region> region, int rank, int size, int spins)
        : memory(std::move(region)), team(memory->data(), rank, size, spins) {}
    std::shared_ptr<shm::Region> memory;
    shm::Team team;
};

// `hooks`: the address of Hooks, as `_signs` gives it; 0: the timeout alone decides.
inline Patience patience(double timeout_s, std::uintptr_t hooks) {
    return {seconds(timeout_s), reinterpret_cast<const Hooks*>(hooks)};
}

inline shm::Task task(std::vector<double> shares, int slot, std::uint64_t version, std::uintptr_t owned, double timeout_s,
                      std::uintptr_t hooks) {
    return {std::move(shares), slot, version, reinterpret_cast<void*>(owned), patience(timeout_s, hooks)};
}

}  // namespace hvd_train::python
