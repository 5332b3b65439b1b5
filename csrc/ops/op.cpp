#include "op.h"

#include <torch/csrc/stable/c/shim.h>

// torch 2.13 and newer keep the text of an error; where they do not, this is no function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace nk {

std::optional<Tensor> Arguments::tensor(size_t i) const {
  if (i >= values_.size()) return std::nullopt;
  AtenTensorHandle handle;  // another reference: a Tensor gives its own back when it goes
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(reinterpret_cast<AtenTensorHandle>(values_[i]), &handle));
  return Tensor(handle);
}

Arguments Arguments::list(size_t i) const {
  const auto handle = reinterpret_cast<StableListHandle>(values_[i]);
  size_t count;
  TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &count));
  std::vector<StableIValue> items(count);
  for (size_t k = 0; k < count; ++k) TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, k, &items[k]));
  return {items.data(), count};
}

int64_t Arguments::size(size_t i, int64_t dim) const {
  const auto t = tensor(i);
  return t && dim < t->dim() ? t->size(dim) : 0;
}

bool Arguments::is_empty(size_t i) const {
  const auto t = tensor(i);
  return t && t->numel() == 0;
}

Op::Op(const char* name, const Limits& limits, Call (*read)(const Arguments&)) : name_(name), read_(read) {
  limits_of_ops()[name] = limits;
}

bool Op::serves(const Arguments& arguments) const {
  const Call call = read_(arguments);
  if (!call.data) return true;  // the op's own checks refuse it
  if (call.left || call.data->numel() == 0) return false;
  const bool meta = is_meta(*call.data);
  if (meta ? recording() == nullptr : !on_gpu(*call.data)) return true;  // OnDevice refuses it
  const Device device = meta ? recording()->device : device_of(*call.data);
  const std::string reason =
      refusal(name_, name_of(call.data->scalar_type()), call.group_size, call.plane, device.architecture);
  STD_TORCH_CHECK(!meta || reason.empty(), name_, ": ", reason);  // there is nothing to record
  return reason.empty();
}

void Op::hand_on(StableIValue* stack) const {
  const std::string next = std::string("normkernels_next::") + name_;
  if (torch_call_dispatcher(next.c_str(), "", stack, TORCH_ABI_VERSION) == TORCH_SUCCESS) return;
  const auto text = torch_exception_get_what_without_backtrace;
  throw std::runtime_error(text ? text()
                                : std::string(name_) + ": the next backend raised an error, which torch printed");
}

}  // namespace nk
