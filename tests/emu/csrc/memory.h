// Memory of the emulated device: exact byte counters, a capacity limit, NaN poison.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>
#include <cstdint>

namespace emu {

constexpr c10::DeviceType kDeviceType = c10::DeviceType::PrivateUse1;
inline c10::Device device() { return c10::Device(kDeviceType, 0); }

// Every byte of memory that holds no data. Read as float16, bfloat16, float32 or float64 it is NaN; as an integer, -1.
constexpr int kPoison = 0xFF;

// What `torch.accelerator.get_memory_info` calls the total while no capacity is set.
constexpr int64_t kUnlimitedTotal = int64_t{1} << 40;

int64_t used_bytes();
int64_t peak_bytes();
void reset_peak();
void set_capacity(int64_t bytes);  // a negative number removes the limit

c10::Allocator* device_allocator();

// Page-locked memory is ordinary memory here; what the emulation keeps is the knowledge of which memory is pinned.
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);
int64_t pinned_bytes();

}  // namespace emu
