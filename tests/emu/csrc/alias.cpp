#include "alias.h"

#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace emu {
namespace {

size_t needed_bytes(const at::Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.dtype().itemsize(),
                                          tensor.storage_offset());
}

c10::Storage host_storage(const c10::Storage& storage) {
  auto* keep_alive = new c10::Storage(storage);
  auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
  at::DataPtr data(storage.mutable_data(), keep_alive, release, c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(),
                      /*resizable=*/true);
}

c10::Storage poisoned_host_storage(size_t num_bytes) {
  at::DataPtr data = c10::GetCPUAllocator()->allocate(num_bytes);
  std::memset(data.get(), kPoison, num_bytes);
  return c10::Storage(c10::Storage::use_byte_size_t(), num_bytes, std::move(data), c10::GetCPUAllocator(), true);
}

at::Tensor with_shape_of(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  made._set_conj(tensor.is_conj());
  made._set_neg(tensor.is_neg());
  return made;
}

bool same_shape(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

bool same_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

at::Tensor view_of(const at::Tensor& base, const at::Tensor& host_view) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                       base.key_set(), host_view.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(host_view.sizes(), host_view.strides(),
                                                    host_view.storage_offset());
  view._set_conj(host_view.is_conj());
  view._set_neg(host_view.is_neg());
  return view;
}

}  // namespace

bool is_released(const at::Tensor& tensor) {
  return tensor.numel() > 0 && tensor.storage().nbytes() < needed_bytes(tensor);
}

at::Tensor host_alias(const at::Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  auto storage = is_released(tensor) ? poisoned_host_storage(needed_bytes(tensor)) : host_storage(tensor.storage());
  return with_shape_of(tensor, std::move(storage), c10::DispatchKey::CPU);
}

at::Tensor copy_to_device(const at::Tensor& host) {
  if (!host.defined() || !host.device().is_cpu() || host.layout() != at::kStrided) return host;
  const size_t num_bytes = at::detail::computeStorageNbytes(host.sizes(), host.strides(), host.dtype().itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), num_bytes, device_allocator()->allocate(num_bytes),
                       device_allocator(), /*resizable=*/true);
  // Raw bytes rather than `copy_`: exact for every dtype, and for results whose elements overlap (expanded ones).
  if (num_bytes > 0) std::memcpy(storage.mutable_data(), host.const_data_ptr(), num_bytes);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  made._set_conj(host.is_conj());
  made._set_neg(host.is_neg());
  return made;
}

void resize_storage(const c10::Storage& storage, size_t num_bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  at::DataPtr fresh = device_allocator()->allocate(num_bytes);
  const size_t num_kept = std::min(num_bytes, impl->nbytes());
  if (num_kept > 0) std::memcpy(fresh.get(), impl->data(), num_kept);
  impl->set_data_ptr_noswap(std::move(fresh));
  impl->set_nbytes(num_bytes);
}

void require_on_device(const at::Tensor& tensor, const std::string& operator_name) {
  if (!tensor.defined() || !tensor.device().is_cpu() || tensor.dim() == 0) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, emu:0 and cpu! ",
              "(when running ", operator_name, ")");
}

at::Tensor Loans::lend(const at::Tensor& tensor) {
  at::Tensor alias;
  for (const auto& loan : loans_) {
    if (!is_released(tensor) && !is_released(loan.on_device) && same_storage(loan.on_device, tensor)) {
      alias = with_shape_of(tensor, loan.on_host.storage(), c10::DispatchKey::CPU);
      break;
    }
  }
  if (!alias.defined()) alias = host_alias(tensor);
  loans_.push_back({tensor, alias});
  return alias;
}

void Loans::settle() {
  for (auto& [on_device, on_host] : loans_) {
    if (is_released(on_device)) continue;
    const auto& lent = on_host.storage();
    if (lent.data() != on_device.storage().data()) {  // the operator moved the alias to larger memory
      const size_t num_bytes = needed_bytes(on_host);  // not the alias's size: it may have been larger in between
      if (on_device.storage().nbytes() < num_bytes) resize_storage(on_device.storage(), num_bytes);
      if (num_bytes > 0) std::memcpy(on_device.storage().mutable_data(), lent.data(), num_bytes);
    }
    if (!same_shape(on_device, on_host)) {
      on_device.unsafeGetTensorImpl()->set_sizes_and_strides(on_host.sizes(), on_host.strides(),
                                                             on_host.storage_offset());
    }
  }
}

at::Tensor Loans::give_back(const at::Tensor& result) {
  if (!result.defined() || result.layout() != at::kStrided) return result;
  for (const auto& [on_device, on_host] : loans_) {
    if (on_host.unsafeGetTensorImpl() == result.unsafeGetTensorImpl()) return on_device;
  }
  for (const auto& [on_device, on_host] : loans_) {
    if (same_storage(on_host, result)) return view_of(on_device, result);
  }
  return copy_to_device(result);
}

}  // namespace emu
