// How an op is registered, and how a call that its kernels do not serve goes on to the next backend.
//
// PyTorch calls an op with a stack of arguments. What decides is read from the stack, which then goes untouched either
// to the kernels or to normkernels_next::<op>: the next backend, an op with the same schema.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/plans.h"
#include "current.h"

namespace nk {

// Reads arguments and leaves them where they are. In LibTorch's stable ABI an argument is the bits of an integer or of
// a boolean, or the address of a tensor or of a list. Nothing here raises an error: what is missing is none or 0, and
// the op's own checks, which see the same arguments, say what was expected.
class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t count) : values_(stack, stack + count) {}

  bool boolean(size_t i) const { return values_[i] & 1; }
  int64_t integer(size_t i, int64_t otherwise = 0) const {
    return i < values_.size() ? int64_t(values_[i]) : otherwise;
  }
  std::optional<Tensor> tensor(size_t i) const;
  Arguments list(size_t i) const;

  int64_t size(size_t i, int64_t dim) const;  // of a tensor along a dimension
  bool is_empty(size_t i) const;              // a tensor

 private:
  std::vector<StableIValue> values_;
};

// The properties of a call that decide whether the kernels serve it: none, 0 and {} decide nothing.
struct Call {
  std::optional<Tensor> data;
  int64_t group_size = 0;
  std::vector<int64_t> plane = {};
  bool left = false;  // to the next backend, which is no refusal: a library computes this, or there is nothing to do
};

// An op with kernels. Every op that the program has can be found by its name, for refusal().
class Op {
 public:
  Op(const char* name, const Limits& limits, Call (*read)(const Arguments&));

  bool serves(const Arguments& arguments) const;

  // Replaces the arguments by the results of the next backend. Throws its error, as std::runtime_error.
  void hand_on(StableIValue* stack) const;

 private:
  const char* name_;
  Call (*read_)(const Arguments&);
};

}  // namespace nk

// Registers nk::op, also to record its launches. limits: a Limits in braces. The rest is the Call, read from the
// arguments `a`.
#define NORMKERNELS_OP(op, limits, ...)                                                                              \
  static const nk::Op op##_op(#op, nk::Limits limits, [](const nk::Arguments& a) { return nk::Call{__VA_ARGS__}; }); \
  static void op##_boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {                                \
    if (op##_op.serves({stack, arguments})) return TORCH_BOX(&nk::op)(stack, arguments, results);                    \
    op##_op.hand_on(stack);                                                                                          \
  }                                                                                                                  \
  STABLE_TORCH_LIBRARY_IMPL(NORMKERNELS_NAMESPACE, NORMKERNELS_KEY, library) {                                       \
    library.impl(#op, op##_boxed);                                                                                   \
  }                                                                                                                  \
  STABLE_TORCH_LIBRARY_IMPL(normkernels_launches, Meta, library) {                                                   \
    library.impl(#op, op##_boxed);                                                                                   \
  }
