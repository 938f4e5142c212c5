// What Python sees of the signs of life.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "liveness/signs.hpp"

namespace nb = nanobind;
using hvd_train::liveness::Missing;
using hvd_train::liveness::Signs;

namespace {

std::chrono::nanoseconds seconds(double value) {
    value = std::min(value, 1e9);  // no count of nanoseconds overflows
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(value));
}

}  // namespace

NB_MODULE(_signs, module) {
    module.doc() = "Signs of life between ranks.";
    module.def("mark", &hvd_train::liveness::mark);
    module.def("enter_phase", &hvd_train::liveness::enter_phase);
    nb::class_<Signs>(module, "Signs")
        .def("__init__",
             [](Signs* self, std::string folder, int rank, int size, double timeout_s, double step_timeout_s) {
                 new (self) Signs(std::move(folder), rank, size, seconds(timeout_s), seconds(step_timeout_s));
             })
        .def("enter", [](Signs& self, double extra_s) { self.enter(seconds(extra_s)); })
        .def("sees_all", &Signs::sees_all, nb::call_guard<nb::gil_scoped_release>())
        .def("leave", &Signs::leave)
        .def("keep_waiting", [](Signs& self, double idle_s) { return self.keep_waiting(seconds(idle_s)); },
             nb::call_guard<nb::gil_scoped_release>())
        .def("missing",
             [](const Signs& self) {
                 std::vector<std::pair<int, std::string>> found;
                 for (const Missing& m : self.missing()) found.emplace_back(m.rank, m.phase);
                 return found;
             })
        .def_prop_ro("hooks", [](const Signs& self) { return reinterpret_cast<std::uintptr_t>(self.hooks()); });
}
