// The answer for every operator without a kernel of its own: run the host kernel on zero-copy aliases.
#include "alias.h"
#include "memory.h"

#include <torch/library.h>

namespace emu {
namespace {

// Written in place: the schema marks it (`Tensor(a!)`).
bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), name_(c10::toString(op.operator_name())), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const size_t first_argument = stack_->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) lend((*stack_)[first_argument + i], is_written(arguments[i]));
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    loans_.settle();
    const size_t num_results = op_.schema().returns().size();
    for (size_t i = stack_->size() - num_results; i < stack_->size(); ++i) give_back((*stack_)[i]);
  }

 private:
  at::Tensor lend(const at::Tensor& tensor, bool written) {
    if (!on_device(tensor)) {
      require_on_device(tensor, name_);
      TORCH_CHECK(!(written && tensor.defined()), name_, ": cannot write a result of device emu:0 into a tensor on cpu");
      return tensor;
    }
    TORCH_CHECK(!(written && is_released(tensor)), name_, ": write into released memory of emu:0");
    return loans_.lend(tensor);
  }

  void lend(c10::IValue& value, bool written) {
    if (value.isTensor()) {
      value = lend(value.toTensor(), written);
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = lend(tensor, written);
      value = c10::IValue(c10::List<at::Tensor>(tensors));
    } else if (value.isOptionalTensorList()) {
      value = lend_indices(value.toOptionalTensorList());
    } else if (value.isDevice()) {
      value = c10::IValue(c10::Device(c10::kCPU));
    }
  }

  // Lists of optional tensors are the indices of `index` and `index_put_`: those may lie on the host, as for CUDA.
  c10::IValue lend_indices(const c10::List<std::optional<at::Tensor>>& indices) {
    c10::List<std::optional<at::Tensor>> lent;
    for (size_t i = 0; i < indices.size(); ++i) {
      std::optional<at::Tensor> index = indices.get(i);
      if (index.has_value() && on_device(*index)) index = loans_.lend(*index);
      lent.push_back(index);
    }
    return lent;
  }

  void give_back(c10::IValue& value) {
    if (value.isTensor()) {
      value = loans_.give_back(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = loans_.give_back(tensor);
      value = c10::IValue(c10::List<at::Tensor>(tensors));
    }
  }

  const c10::OperatorHandle& op_;
  std::string name_;
  torch::jit::Stack* stack_;
  Loans loans_;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { HostCall(op, stack).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
// Torch would compose these two from their `out=` form, which first grows the result to one loss per element, and warns.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  library.impl("smooth_l1_loss", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace emu
