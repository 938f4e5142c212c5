// What Python sees of the ring between hosts. `_shm` must have been imported before: it knows the types in common.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <mpi.h>

#include <utility>
#include <vector>

#include "python/common.hpp"
#include "ring/ring.hpp"
#include "shm/flat_buffer.hpp"
#include "shm/operation.hpp"

namespace nb = nanobind;
using namespace hvd_train;
using hvd_train::python::SeatedTeam;

NB_MODULE(_ring, module) {
    module.doc() = "Averaging over several hosts, by MPI.";
    nb::exception<ring::PeerLost>(module, "PeerLost");
    nb::exception<ring::PeerStalled>(module, "PeerStalled");
    nb::exception<ring::MPIFailure>(module, "MPIFailure");
    nb::exception<ring::Overflow>(module, "Overflow");

    nb::class_<ring::Ring>(module, "Ring")
        .def("__init__",
             // `comm`: the address of an MPI_Comm, as mpi4py gives it.
             [](ring::Ring* self, std::uintptr_t comm, std::vector<std::vector<int>> ranks, int host, int local_rank) {
                 new (self) ring::Ring(*reinterpret_cast<const MPI_Comm*>(comm), {std::move(ranks), host, local_rank});
             })
        .def("owned",
             [](const ring::Ring& self, std::size_t numel) {
                 const shm::Span span = self.owned(numel);
                 return std::pair(span.begin, span.end);
             })
        .def_prop_ro("payload_bytes", &ring::Ring::payload_bytes)
        .def_prop_ro("late", &ring::Ring::late);

    nb::class_<ring::RingAverage, shm::Operation>(module, "RingAverage")
        .def("__init__",
             [](ring::RingAverage* self, ring::Ring& of, SeatedTeam& seat, const shm::FlatBuffer& buffer,
                std::vector<double> shares, int slot, std::uint64_t version, std::uintptr_t owned, double timeout_s,
                std::uintptr_t hooks, int wire) {
                 new (self) ring::RingAverage(of, seat.team, buffer,
                                              python::task(std::move(shares), slot, version, owned, timeout_s, hooks),
                                              static_cast<ring::Wire>(wire));
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
}
