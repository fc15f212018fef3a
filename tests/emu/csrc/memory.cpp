#include "memory.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emu {
namespace {

using c10::CachingAllocator::StatType;
constexpr auto kAggregate = static_cast<size_t>(StatType::AGGREGATE);
constexpr size_t kAlignment = 64;

// One allocation: the header lies in front of the payload, so that the deleter, which gets one pointer, knows the size.
struct alignas(kAlignment) Header {
  size_t payload_bytes;
};

void* payload(Header* header) { return header + 1; }

Header* allocate_block(size_t num_bytes) {
  const size_t rounded = (sizeof(Header) + num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* header = static_cast<Header*>(std::aligned_alloc(kAlignment, rounded));
  TORCH_CHECK_WITH(OutOfMemoryError, header, "emu: the host has no ", num_bytes, " bytes left to play device memory");
  header->payload_bytes = num_bytes;
  std::memset(payload(header), kPoison, num_bytes);
  return header;
}

struct DeviceMemory {
  std::mutex mutex;
  c10::CachingDeviceAllocator::DeviceStats stats;
  int64_t capacity = -1;
  // The block freed last is kept until the next one is freed: a test may look at its poison, and a buffer that is freed
  // and allocated again in one breath never gets its old address back.
  Header* last_freed = nullptr;

  c10::CachingAllocator::Stat& bytes() { return stats.allocated_bytes[kAggregate]; }

  void reserve(size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto wanted = bytes().current + static_cast<int64_t>(num_bytes);
    if (capacity >= 0 && wanted > capacity) {
      stats.num_ooms += 1;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "emu: out of memory. Tried to allocate ", num_bytes, " bytes; ",
                       bytes().current, " of ", capacity, " bytes are in use.");
    }
    bytes().increase(num_bytes);
    stats.reserved_bytes[kAggregate].increase(num_bytes);
    stats.allocation[kAggregate].increase(1);
  }

  void release(size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes().decrease(num_bytes);
    stats.reserved_bytes[kAggregate].decrease(num_bytes);
    stats.allocation[kAggregate].decrease(1);
  }

  Header* swap_last_freed(Header* block) {
    const std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(last_freed, block);
  }
};

// Never destroyed: tensors in static storage are freed after any destructor of ours would have run.
DeviceMemory& memory() {
  static auto* instance = new DeviceMemory();
  return *instance;
}

void free_device_block(void* context) {
  if (!context) return;
  auto* header = static_cast<Header*>(context);
  std::memset(payload(header), kPoison, header->payload_bytes);
  memory().release(header->payload_bytes);
  std::free(memory().swap_last_freed(header));
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes == 0) return {nullptr, nullptr, &free_device_block, device()};
    memory().reserve(num_bytes);
    Header* header = allocate_block(num_bytes);
    return {payload(header), header, &free_device_block, device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is not the data pointer
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    return memory().stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    memory().bytes().reset_accumulated();
    memory().stats.reserved_bytes[kAggregate].reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    memory().bytes().reset_peak();
    memory().stats.reserved_bytes[kAggregate].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    const int64_t total = memory().capacity < 0 ? kUnlimitedTotal : memory().capacity;
    return {std::max<int64_t>(0, total - memory().bytes().current), total};
  }
};

struct PinnedMemory {
  std::mutex mutex;
  std::map<uintptr_t, size_t> num_bytes_by_start;
};

PinnedMemory& pinned() {
  static auto* instance = new PinnedMemory();
  return *instance;
}

void free_pinned(void* data) {
  if (!data) return;
  {
    const std::lock_guard<std::mutex> lock(pinned().mutex);
    pinned().num_bytes_by_start.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const c10::Device host(c10::kCPU);
    if (num_bytes == 0) return {nullptr, nullptr, &free_pinned, host};
    void* data = std::aligned_alloc(kAlignment, (num_bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK_WITH(OutOfMemoryError, data, "emu: the host cannot pin ", num_bytes, " bytes");
    const std::lock_guard<std::mutex> lock(pinned().mutex);
    pinned().num_bytes_by_start[reinterpret_cast<uintptr_t>(data)] = num_bytes;
    return {data, data, &free_pinned, host};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }
};

DeviceAllocator the_device_allocator;
PinnedAllocator the_pinned_allocator;
REGISTER_ALLOCATOR(kDeviceType, &the_device_allocator);

}  // namespace

int64_t used_bytes() { return the_device_allocator.getDeviceStats(0).allocated_bytes[kAggregate].current; }
int64_t peak_bytes() { return the_device_allocator.getDeviceStats(0).allocated_bytes[kAggregate].peak; }
void reset_peak() { the_device_allocator.resetPeakStats(0); }
void set_capacity(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().capacity = bytes;
}

c10::Allocator* device_allocator() { return &the_device_allocator; }
c10::Allocator* pinned_allocator() { return &the_pinned_allocator; }

bool is_pinned(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const std::lock_guard<std::mutex> lock(pinned().mutex);
  auto after = pinned().num_bytes_by_start.upper_bound(address);
  if (after == pinned().num_bytes_by_start.begin()) return false;
  const auto& [start, num_bytes] = *std::prev(after);
  return address < start + num_bytes;
}

int64_t pinned_bytes() {
  const std::lock_guard<std::mutex> lock(pinned().mutex);
  int64_t total = 0;
  for (const auto& entry : pinned().num_bytes_by_start) total += static_cast<int64_t>(entry.second);
  return total;
}

}  // namespace emu
