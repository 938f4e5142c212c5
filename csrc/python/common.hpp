// What the two extensions tell Python in common.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "shm/operation.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

namespace hvd_train::python {

inline std::chrono::nanoseconds seconds(double value) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(value));
}

// A Team together with the memory that it lies in.
struct SeatedTeam {
    SeatedTeam(std::shared_ptr<shm::Region> region, int rank, int size, int spins)
        : memory(std::move(region)), team(memory->data(), rank, size, spins) {}
    std::shared_ptr<shm::Region> memory;
    shm::Team team;
};

inline shm::Task task(std::vector<double> shares, int slot, std::uint64_t version, std::uintptr_t owned, double timeout_s) {
    return {std::move(shares), slot, version, reinterpret_cast<void*>(owned), seconds(timeout_s)};
}

}  // namespace hvd_train::python
