// Operators that the fallback cannot serve: those that make memory, move it, or have no host kernel.
#include "alias.h"
#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/histc.h>
#include <torch/library.h>

namespace emu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), device_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           at::dtype_or_default(dtype));
}

// Host to device, device to host, device to device: the only operator that may see two devices.
Tensor copy_from(const Tensor& from, const Tensor& to, bool /*non_blocking*/) {
  TORCH_CHECK(!(on_device(to) && is_released(to)), "copy_: write into released memory of emu:0");
  host_alias(to).copy_(host_alias(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& number) { return host_alias(number).item(); }

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef sym_sizes, std::optional<at::MemoryFormat> format) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(sym_sizes);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  const auto num_bytes = at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), self.storage_offset());
  if (self.numel() > 0 && self.storage().nbytes() < num_bytes) resize_storage(self.storage(), num_bytes);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes,
                    c10::SymIntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  TORCH_CHECK(storage.device() == self.device(), "set_: the tensor is on ", self.device(), ", the storage on ",
              storage.device());
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  if (strides.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  } else {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const auto num_elements = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {c10::SymInt(num_elements)}, {c10::SymInt(1)});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage nothing(c10::Storage::use_byte_size_t(), 0, device_allocator()->allocate(0), device_allocator(), true);
  return set_storage(self, std::move(nothing), 0, {c10::SymInt(0)}, {c10::SymInt(1)});
}

// Without this `Module.to` replaces every Parameter, and ties and optimizers keep the old ones.
bool may_share_implementation(const Tensor& self, const Tensor& other) {
  return self.layout() == at::kStrided && other.layout() == at::kStrided;
}

void record_stream(Tensor&, at::Stream) {}

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::SymIntArrayRef stride,
                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                   c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  for (const Tensor& tensor : {input, weight, bias.value_or(Tensor())}) require_on_device(tensor, "aten::convolution");
  const OptionalTensor host_bias = bias.has_value() ? OptionalTensor(host_alias(*bias)) : std::nullopt;
  return copy_to_device(at::convolution_symint(host_alias(input), host_alias(weight), host_bias, stride, padding,
                                               dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  const std::vector<c10::SymInt> bias_sizes{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [d_input, d_weight, d_bias] = at::convolution_backward_symint(
      host_alias(gradient), host_alias(input), host_alias(weight), c10::SymIntArrayRef(bias_sizes), stride, padding,
      dilation, transposed, output_padding, groups, wanted);
  return {copy_to_device(d_input), copy_to_device(d_weight), copy_to_device(d_bias)};
}

// CUDA counts integers too (mixture-of-experts routers do), the host kernel does not.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  const Tensor host = host_alias(self);
  if (!at::isIntegralType(host.scalar_type(), /*includeBool=*/false)) {
    return copy_to_device(at::histc(host, bins, min, max));
  }
  return copy_to_device(at::histc(host.to(at::kDouble), bins, min, max).to(host.scalar_type()));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_nothing);
  library.impl("_has_compatible_shallow_copy_type", &may_share_implementation);
  library.impl("record_stream", &record_stream);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("histc", &histc);
}

// Without these torch resolves the conjugate before it copies, by a copy, and so on without end: a complex conjugate
// brought to the host would crash the process.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace emu
