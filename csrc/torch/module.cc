// The import that registers the operators, and what Python may ask about the build. Calculations do
// not go through pybind11: torch.compile and export would not see them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "kernels/scratch.h"
#include "kernels/table.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "longspan's compiled kernels; importing this registers torch.ops.longspan";
  m.def("isa", [] { return std::string(longspan::kernels().name); });
  m.def("isa_levels", [] {
    std::vector<std::string> names;
    for (int i = 0; const longspan::KernelTable* t = longspan::available_kernels(i); ++i) {
      names.emplace_back(t->name);
    }
    return names;
  });
  m.def("set_isa", [](const std::string& name) { return longspan::use_kernels(name.c_str()); });
  m.def("scratch_peak", &longspan::scratch_peak);
  m.def("scratch_reset_peak", &longspan::scratch_reset_peak);
  m.def("scratch_set_poison", &longspan::scratch_set_poison);
  m.attr("compiler") = __VERSION__;
}
