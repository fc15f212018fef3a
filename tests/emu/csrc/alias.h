// Zero-copy host aliases of device tensors: how host kernels compute on device memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace emu {

inline bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.is_privateuseone(); }

// A host tensor over the same memory, with the same shape, strides, conjugate and negative bits.
// It keeps the device storage alive. Where the device storage was released (resized below what the tensor needs), the
// alias is poison of its own instead: reading released memory gives NaN, as it might on real hardware, and no crash.
at::Tensor host_alias(const at::Tensor& tensor);

// A device tensor with the values, shape and strides of a host tensor that owns its memory.
at::Tensor copy_to_device(const at::Tensor& host);

// Whether the device storage is too small for the tensor's shape, as after `storage.resize_(0)`.
bool is_released(const at::Tensor& tensor);

// Change the size of a device storage in place; what is new is poison.
void resize_storage(const c10::Storage& storage, size_t num_bytes);

// Raise torch's own mixed-device error unless the tensor is on the device; host numbers (no dimension) may pass.
void require_on_device(const at::Tensor& tensor, const std::string& operator_name);

// The device tensors lent to one host operator, and the way back for what it returns.
class Loans {
 public:
  // Lend a device tensor; tensors of one device storage share one host storage, so that overlap checks see the truth.
  at::Tensor lend(const at::Tensor& tensor);

  // After the operator: carry new shapes and grown memory of lent tensors (`out=`) back to the device tensors.
  void settle();

  // What the operator returned, on the device: a lent tensor itself, a view of one, or new memory.
  at::Tensor give_back(const at::Tensor& result);

 private:
  struct Loan {
    at::Tensor on_device;
    at::Tensor on_host;
  };
  std::vector<Loan> loans_;
};

}  // namespace emu
