// What Python sees of the shared memory of a host. The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "shm/flat_buffer.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

namespace nb = nanobind;
using namespace hvd_train::shm;

namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::numpy, nb::ndim<1>>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::chrono::nanoseconds seconds(double value) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(value));
}

// A Team together with the memory that it lies in.
struct SeatedTeam {
    SeatedTeam(std::shared_ptr<Region> region, int rank, int size, int spins)
        : memory(std::move(region)), team(memory->data(), rank, size, spins) {}
    std::shared_ptr<Region> memory;
    Team team;
};

Bytes array(const std::shared_ptr<Region>& region, std::byte* data, std::size_t num_bytes) {
    // The tensor made of it owns the mapping: the memory stays as long as anybody looks at it.
    auto* owner = new std::shared_ptr<Region>(region);
    nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<Region>*>(p); });
    return Bytes(data, {num_bytes}, capsule);
}

}  // namespace

NB_MODULE(_shm, module) {
    module.doc() = "Averaging in the shared memory of one host.";

    nb::exception<RankDied>(module, "RankDied");
    nb::exception<Stalled>(module, "Stalled");

    nb::enum_<Op>(module, "Op").value("SUM", Op::sum).value("MIN", Op::min).value("MAX", Op::max);

    nb::class_<Region>(module, "Region")
        .def_static("create", [](std::size_t n) { return std::make_shared<Region>(Region::create(n)); })
        .def_static("open",
                    [](const nb::bytes& address) {
                        const std::string packed(address.c_str(), address.size());
                        return std::make_shared<Region>(Region::open(Address::unpack(packed)));
                    })
        .def_static("is_visible",
                    [](const nb::bytes& address) {
                        return Region::is_visible(Address::unpack(std::string(address.c_str(), address.size())));
                    })
        .def("allocate", &Region::allocate)
        .def("seal", &Region::seal)
        .def("address", [](const Region& region) {
            const std::string packed = region.address().pack();
            return nb::bytes(packed.data(), packed.size());
        });

    nb::class_<SeatedTeam>(module, "Team")
        .def(nb::init<std::shared_ptr<Region>, int, int, int>())
        .def_static("num_bytes", &Team::num_bytes)
        .def_ro_static("max_values", &Team::kMaxValues)
        .def("barrier",
             // Returns the ranks that did not arrive in time; none: all did.
             [](SeatedTeam& self, double timeout_s) -> std::vector<int> {
                 nb::gil_scoped_release unlocked;
                 try {
                     self.team.barrier(seconds(timeout_s));
                 } catch (const Stalled& stalled) {
                     return stalled.ranks;
                 }
                 return {};
             })
        .def("allreduce",
             [](SeatedTeam& self, const Doubles& values, Op op, double timeout_s) {
                 const std::size_t count = values.shape(0);
                 std::unique_ptr<double[]> result(new double[count]);
                 {
                     nb::gil_scoped_release unlocked;
                     self.team.allreduce(values.data(), result.get(), count, op, seconds(timeout_s));
                 }
                 double* data = result.release();
                 nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
                 return nb::ndarray<double, nb::numpy, nb::ndim<1>>(data, {count}, owner);
             })
        .def("dead", [](const SeatedTeam& self) { return self.team.dead(); })
        .def("revoke", [](SeatedTeam& self) { self.team.revoke(); });

    nb::class_<FlatBuffer>(module, "FlatBuffer")
        .def(nb::init<std::shared_ptr<Region>, int, int, std::size_t, int>())
        .def_static("num_bytes", [](int size, std::size_t numel, int type) {
            return FlatBuffer::num_bytes(size, numel, static_cast<Type>(type));
        })
        .def("allocate", &FlatBuffer::allocate)
        .def("live", [](const FlatBuffer& self) { return array(self.region(), self.live(), self.tensor_bytes()); })
        .def("anchor", [](const FlatBuffer& self, int slot) {
            return array(self.region(), self.anchor(slot), self.tensor_bytes());
        })
        .def("average", &FlatBuffer::average, nb::call_guard<nb::gil_scoped_release>())
        .def("reduce", [](const FlatBuffer& self, const std::vector<double>& shares, std::uintptr_t mean) {
            nb::gil_scoped_release unlocked;
            self.reduce(shares, reinterpret_cast<void*>(mean));
        })
        .def("spread", [](const FlatBuffer& self, std::uintptr_t mean, int slot) {
            nb::gil_scoped_release unlocked;
            self.spread(reinterpret_cast<const void*>(mean), slot);
        });
}
