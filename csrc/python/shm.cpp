// What Python sees of the shared memory of a host.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "python/common.hpp"
#include "shm/flat_buffer.hpp"
#include "shm/limit.hpp"
#include "shm/operation.hpp"
#include "shm/region.hpp"
#include "shm/team.hpp"

namespace nb = nanobind;
using namespace hvd_train::shm;
using hvd_train::python::SeatedTeam;
using hvd_train::python::patience;

namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;
using Bytes = nb::ndarray<std::uint8_t, nb::numpy, nb::ndim<1>>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Bytes array(const std::shared_ptr<Region>& region, std::byte* data, std::size_t num_bytes) {
    // The tensor made of it owns the mapping: the memory stays as long as anybody looks at it.
    auto* owner = new std::shared_ptr<Region>(region);
    nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<Region>*>(p); });
    return Bytes(data, {num_bytes}, capsule);
}

nb::ndarray<double, nb::numpy, nb::ndim<1>> allreduce(SeatedTeam& self, const Doubles& values, Op op, double timeout_s,
                                                           std::uintptr_t hooks) {
    const std::size_t count = values.shape(0);
    std::unique_ptr<double[]> result(new double[count]);
    {
        nb::gil_scoped_release unlocked;
        self.team.allreduce(values.data(), result.get(), count, op, patience(timeout_s, hooks));
    }
    double* data = result.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
    return nb::ndarray<double, nb::numpy, nb::ndim<1>>(data, {count}, owner);
}

void define_memory(nb::module_& module) {
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
        .def("array", [](const std::shared_ptr<Region>& self) { return array(self, self->data(), self->num_bytes()); })
        .def("seal", &Region::seal)
        .def("address", [](const Region& region) {
            const std::string packed = region.address().pack();
            return nb::bytes(packed.data(), packed.size());
        });

    nb::class_<FlatBuffer>(module, "FlatBuffer")
        .def("__init__",
             [](FlatBuffer* self, std::shared_ptr<Region> region, int rank, int size, std::size_t numel, int type) {
                 new (self) FlatBuffer(std::move(region), rank, size, numel, static_cast<Type>(type));
             })
        .def_static("num_bytes", [](int size, std::size_t numel, int type) {
            return FlatBuffer::num_bytes(size, numel, static_cast<Type>(type));
        })
        .def_static("staging_bytes", [](int size, std::size_t numel, int type) {
            return FlatBuffer::staging_bytes(size, numel, static_cast<Type>(type));
        })
        .def("staged", &FlatBuffer::staged)
        .def("allocate", &FlatBuffer::allocate)
        .def("input", [](const FlatBuffer& self) { return array(self.inputs_region(), self.input(), self.num_tensor_bytes()); })
        .def("anchor", [](const FlatBuffer& self, int slot) {
            return array(self.anchors_region(), self.anchor(slot), self.num_tensor_bytes());
        })
        .def("complete", &FlatBuffer::complete);
}

void define_team(nb::module_& module) {
    nb::enum_<Op>(module, "Op").value("SUM", Op::sum).value("MIN", Op::min).value("MAX", Op::max);
    nb::enum_<Phase>(module, "Phase")
        .value("LOCAL_STEPS", Phase::local_steps)
        .value("AGREEMENT", Phase::agreement)
        .value("REDUCE", Phase::reduce)
        .value("REDUCE_SCATTER", Phase::reduce_scatter)
        .value("SLICE_STEP", Phase::slice_step)
        .value("ALL_GATHER", Phase::all_gather)
        .value("CLOSING", Phase::closing);

    nb::class_<SeatedTeam>(module, "Team")
        .def(nb::init<std::shared_ptr<Region>, int, int, int>())
        .def_static("num_bytes", &Team::num_bytes)
        .def_ro_static("max_values", &Team::kMaxValues)
        .def("barrier",
             [](SeatedTeam& self, double timeout_s, std::uintptr_t hooks) {
                 nb::gil_scoped_release unlocked;
                 self.team.barrier(patience(timeout_s, hooks));
             },
             nb::arg("timeout_s"), nb::arg("hooks") = 0)
        .def("allreduce", &allreduce, nb::arg("values"), nb::arg("op"), nb::arg("timeout_s"), nb::arg("hooks") = 0)
        .def("gather",
             [](SeatedTeam& self, const std::vector<double>& values, double timeout_s, std::uintptr_t hooks) {
                 nb::gil_scoped_release unlocked;
                 return self.team.gather(values, patience(timeout_s, hooks));
             },
             nb::arg("values"), nb::arg("timeout_s"), nb::arg("hooks") = 0)
        .def("dead", [](const SeatedTeam& self) { return self.team.dead(); })
        .def("late", [](const SeatedTeam& self) { return self.team.late(); })
        .def("enter", [](SeatedTeam& self, Phase phase) { self.team.enter(phase); })
        .def("phase", [](const SeatedTeam& self, int rank) { return self.team.phase(rank); })
        .def("revoke", [](SeatedTeam& self) { self.team.revoke(); });
}

void define_averages(nb::module_& module) {
    nb::class_<Operation>(module, "Operation")
        .def("reduce", &Operation::reduce, Unlocked())
        .def("spread", &Operation::spread, Unlocked())
        .def("run", &Operation::run, Unlocked())
        .def("start", &Operation::start, Unlocked())
        .def("test", &Operation::test)
        .def("wait", &Operation::wait, Unlocked());

    nb::class_<HostAverage, Operation>(module, "HostAverage")
        .def("__init__",
             [](HostAverage* self, SeatedTeam& seat, const FlatBuffer& buffer, std::vector<double> shares, int slot,
                std::uint64_t version, std::uintptr_t owned, double timeout_s, std::uintptr_t hooks) {
                 new (self) HostAverage(seat.team, buffer,
                                        hvd_train::python::task(std::move(shares), slot, version, owned, timeout_s, hooks));
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
}

void define_limit(nb::module_& module) {
    nb::class_<Limit>(module, "Limit")
        .def(nb::init<std::shared_ptr<Region>, int, int, std::size_t>())
        .def_static("num_bytes", &Limit::num_bytes)
        .def("allocate", &Limit::allocate)
        .def("live", [](const Limit& self) {
            return array(self.region(), reinterpret_cast<std::byte*>(self.live()), self.numel() * sizeof(float));
        })
        .def("shared", [](const Limit& self) {
            return array(self.region(), reinterpret_cast<std::byte*>(self.shared()), self.numel() * sizeof(float));
        })
        .def("run", &Limit::run, Unlocked());
}

}  // namespace

NB_MODULE(_shm, module) {
    module.doc() = "Averaging in the shared memory of one host.";
    // A program's own tensors may be views of a buffer until the process ends: that is no leak worth twenty lines.
    nb::set_leak_warnings(false);
    nb::exception<RankDied>(module, "RankDied");
    nb::exception<Stalled>(module, "Stalled");
    define_memory(module);
    define_team(module);
    define_averages(module);
    define_limit(module);
}
