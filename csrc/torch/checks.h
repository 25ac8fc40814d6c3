// The vocabulary of args.cpp: one object per call that knows the op's name and device, and says in
// one line what an argument must be.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"

namespace fq::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // in a shape: any size

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

inline std::optional<Dtype> float_type(ScalarType type) {
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::BFloat16) return Dtype::kBFloat16;
  if (type == ScalarType::Half) return Dtype::kFloat16;
  return std::nullopt;
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    out << (i ? ", " : "");
    shape[i] == kAny ? out << "any" : out << shape[i];
  }
  out << "]";
  return out.str();
}

class Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& first)
      : op_(op), first_(name), device_(first.device()) {
    dense(name, first);
  }

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream out;
    out << op_ << ": ";
    ((out << parts), ...);
    throw std::runtime_error(out.str());
  }

  // The device of the first argument; aligned; rows that follow each other without gaps.
  void dense(const char* name, const Tensor& t) const {
    on_device(name, t);
    aligned(name, t);
    require(t.is_contiguous(), name, " is not contiguous: it must be");
  }

  void on_device(const char* name, const Tensor& t) const {
    require(t.device() == device_, name, " is on another device than ", first_,
            ": they must be on one");
  }

  // A view of bytes may begin where a C++ pointer to its elements must not point.
  void aligned(const char* name, const Tensor& t) const {
    const size_t size = t.element_size();
    const size_t beyond = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % size;
    require(beyond == 0, name, " lies ", beyond, " bytes beyond a multiple of ", size,
            ": it must lie at one, the size of its elements");
  }

  // For what an op writes: `t` shares no byte with `other`. Both are dense.
  void apart(const char* name, const Tensor& t, const char* other_name, const Tensor& other) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t other_begin = reinterpret_cast<uintptr_t>(other.const_data_ptr());
    const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
    const uintptr_t other_bytes = static_cast<uintptr_t>(other.numel()) * other.element_size();
    const bool meet = bytes > 0 && other_bytes > 0 && begin < other_begin + other_bytes &&
                      other_begin < begin + bytes;
    require(!meet, name, " overlaps ", other_name, " in memory: it is written, so it must not");
  }

  void dtype(const char* name, const Tensor& t, ScalarType wanted) const {
    require(t.scalar_type() == wanted, name, " has dtype ", name_of(t.scalar_type()),
            ": it must be ", name_of(wanted));
  }

  void shape(const char* name, const Tensor& t, const std::vector<int64_t>& wanted) const {
    const std::vector<int64_t> found = shape_of(t);
    bool same = found.size() == wanted.size();
    for (size_t i = 0; same && i < wanted.size(); ++i)
      same = wanted[i] == kAny || wanted[i] == found[i];
    require(same, name, " has shape ", text(found), ": it must be ", text(wanted));
  }

  // All at once: what most arguments need.
  const void* input(const char* name, const Tensor& t, ScalarType type,
                    const std::vector<int64_t>& wanted) const {
    dense(name, t);
    dtype(name, t, type);
    shape(name, t, wanted);
    return t.const_data_ptr();
  }

  // The same for what is read by the host, whatever the device of the first argument.
  const void* host_input(const char* name, const Tensor& t, ScalarType type,
                         const std::vector<int64_t>& wanted) const {
    require(t.is_cpu(), name, " is not in the memory of the host: it must be");
    return Checks(op_, name, t).input(name, t, type, wanted);
  }

  Dtype floating(const char* name, ScalarType type) const {
    const std::optional<Dtype> found = float_type(type);
    require(found.has_value(), name, " is ", name_of(type),
            ": it must be float32, bfloat16 or float16");
    return *found;
  }

  Dtype floating(const char* name, const Tensor& t) const {
    const std::optional<Dtype> found = float_type(t.scalar_type());
    require(found.has_value(), name, " has dtype ", name_of(t.scalar_type()),
            ": it must be float32, bfloat16 or float16");
    return *found;
  }

  // Any float dtype; float64 is converted to `narrower`, the others stay.
  Tensor any_floating(const char* name, const Tensor& t, ScalarType narrower) const {
    const bool wide = t.scalar_type() == ScalarType::Double;
    require(wide || float_type(t.scalar_type()).has_value(), name, " has dtype ",
            name_of(t.scalar_type()), ": it must be a float dtype");
    return wide ? torch::stable::to(t, narrower) : t;
  }

  int32_t bits(const char* name, int64_t bits, int64_t lowest = 2, int64_t highest = 8) const {
    require(lowest <= bits && bits <= highest, name, " is ", bits, ": it must be ", lowest, "..",
            highest);
    return static_cast<int32_t>(bits);
  }

 private:
  const char* op_;
  const char* first_;
  torch::stable::Device device_;
};

}  // namespace fq::binding
