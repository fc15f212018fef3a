// What torch asks of any device: guards, streams, events, hooks; and the module that Python imports.
#include "alias.h"
#include "memory.h"

#include <ATen/Context.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>

namespace emu {
namespace {

using Clock = std::chrono::steady_clock;

thread_local c10::StreamId current_stream_id = 0;  // 0 is the default stream
std::atomic<c10::StreamId> next_stream_id{1};

c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }

// Work is done when the call returns, so every stream is idle, every event has happened, and waiting is nothing.
// Streams differ by their number only; an event remembers when it was recorded.
struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDeviceType; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  void setDevice(c10::Device wanted) const override {
    TORCH_CHECK(wanted.index() <= 0, "emu: there is one device, emu:0; got ", wanted);
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

  c10::Stream getStream(c10::Device) const override { return stream(current_stream_id); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(next_stream_id++); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(next_stream_id++); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream_id, next.id()));
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point();
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto span = *static_cast<Clock::time_point*>(second) - *static_cast<Clock::time_point*>(first);
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

// Random numbers come from the host's generator: one seed, one state, for host and device.
struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }

  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(c10::kCPU);
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    resize_storage(storage, num_bytes);
  }
};

}  // namespace
}  // namespace emu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  static auto* hooks = new emu::Hooks();  // torch keeps the pointer for the life of the process
  at::RegisterPrivateUse1HooksInterface(hooks);
  module.def("used_bytes", &emu::used_bytes);
  module.def("peak_bytes", &emu::peak_bytes);
  module.def("reset_peak", &emu::reset_peak);
  module.def("set_capacity", &emu::set_capacity);
  module.def("pinned_bytes", &emu::pinned_bytes);
}
