// What the parts of flatquant_cuda._native share: GPUs and plans as Python sees
// them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../contract.h"
#include "../cuda/gpu.h"

namespace fq::native {

namespace py = pybind11;

void add_gemm(py::module_& m);
void add_transform(py::module_& m);
void add_hadamard(py::module_& m);
void add_attention(py::module_& m);

// A number of a plan, and its name.
template <class Plan>
struct Field {
  const char* name;
  int64_t (*get)(const Plan& plan);
};

// One plan, as name -> number.
template <class Plan, size_t kCount>
py::dict numbers(const Plan& plan, const Field<Plan> (&fields)[kCount]) {
  py::dict out;
  for (const Field<Plan>& field : fields) out[field.name] = field.get(plan);
  return out;
}

// Many plans, as name -> array.
template <class Plan, size_t kCount>
py::dict columns(const std::vector<Plan>& plans, const Field<Plan> (&fields)[kCount]) {
  py::dict out;
  for (const Field<Plan>& field : fields) {
    py::array_t<int64_t> column(static_cast<py::ssize_t>(plans.size()));
    for (size_t i = 0; i < plans.size(); ++i)
      column.mutable_at(static_cast<py::ssize_t>(i)) = field.get(plans[i]);
    out[field.name] = column;
  }
  return out;
}

// A dict like those of gpus().
inline cuda::Gpu gpu_of(const py::dict& gpu) {
  const auto number = [&](const char* name) { return py::cast<int32_t>(gpu[name]); };
  return {"",
          number("arch"),
          number("sms"),
          number("shared_per_block"),
          number("shared_per_sm"),
          number("registers_per_sm"),
          number("l2_bytes"),
          number("bandwidth_gb")};
}

inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw py::value_error("dtype is '" + name + "': it must be float32, bfloat16 or float16");
}

}  // namespace fq::native
