// A CUDA device for torch, for tests: tensors that say `cuda:0` or `cuda:1` and lie in host memory.
//
// Loaded into a torch without CUDA it registers an allocator, a device guard with streams and
// events, hooks that say there are two devices, and a fallback for the dispatch key CUDA that
// computes on the CPU. So tensors are of torch's own type, autograd, autocast and DLPack treat them
// as CUDA tensors, and kernels that are registered for CUDA get them.
//
// It counts what would be a mistake on a GPU: reads of device memory by the host, and blocking
// uploads.
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace
{

using at::Tensor;

enum { DEVICES = 2 };

// ---- what the tests set and read ----------------------------------------------------------------

using Register = void (*)(const void *, int64_t, int);
using Forget = void (*)(const void *);
Register register_memory;
Forget forget_memory;
std::atomic<int64_t> host_reads, uploads, allocations;
thread_local int inside_fallback;
thread_local int current_device;
thread_local int64_t current_stream[DEVICES];

// ---- memory -------------------------------------------------------------------------------------

void free_memory(void *memory)
{
    if (memory == nullptr) return;
    if (forget_memory != nullptr) forget_memory(memory);
    std::free(memory);
}

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override
    {
        const c10::Device device(c10::DeviceType::CUDA, (c10::DeviceIndex)current_device);
        if (bytes == 0) return {nullptr, nullptr, &free_memory, device};
        void *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
        TORCH_CHECK(memory != nullptr, "no memory");
        std::memset(memory, 0xA5, bytes); // nobody may count on zeros
        if (register_memory != nullptr) register_memory(memory, (int64_t)bytes, 1);
        if (inside_fallback == 0) allocations++;
        return {memory, memory, &free_memory, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }
    void copy_data(void *target, const void *source, size_t bytes) const override
    {
        std::memcpy(target, source, bytes);
    }
};
Memory memory;

// ---- devices, streams, events -------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device exchangeDevice(c10::Device device) const override
    {
        const c10::Device old = getDevice();
        setDevice(device);
        return old;
    }
    c10::Device getDevice() const override { return {type(), (c10::DeviceIndex)current_device}; }
    void setDevice(c10::Device device) const override
    {
        TORCH_CHECK(device.index() < DEVICES, "invalid device ordinal");
        if (device.index() >= 0) current_device = device.index();
    }
    void uncheckedSetDevice(c10::Device device) const noexcept override
    {
        if (device.index() >= 0) current_device = device.index();
    }
    static int of(c10::Device device)
    {
        return device.index() < 0 ? current_device : device.index();
    }
    c10::Stream getStream(c10::Device device) const override
    {
        const int index = of(device);
        return c10::Stream(c10::Stream::UNSAFE, {type(), (c10::DeviceIndex)index},
                           current_stream[index]);
    }
    c10::Stream getDefaultStream(c10::Device device) const override
    {
        return c10::Stream(c10::Stream::UNSAFE, {type(), (c10::DeviceIndex)of(device)}, 0);
    }
    c10::Stream exchangeStream(c10::Stream stream) const override
    {
        const c10::Stream old = getStream(stream.device());
        current_stream[of(stream.device())] = stream.id();
        return old;
    }
    c10::Stream getNewStream(c10::Device device, int) const override
    {
        static std::atomic<int64_t> made;
        return c10::Stream(c10::Stream::UNSAFE, {type(), (c10::DeviceIndex)of(device)},
                           0x1000 * ++made);
    }
    void *getStreamNativeHandle(const c10::Stream stream) const override
    {
        return (void *)stream.id();
    }
    void record(void **, const c10::Stream &, const c10::DeviceIndex,
                const c10::EventFlag) const override
    {
    }
    void block(void *, const c10::Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    bool queryStream(const c10::Stream &) const override { return true; }
    void synchronizeStream(const c10::Stream &) const override { host_reads++; }
    void synchronizeEvent(void *) const override { host_reads++; }
    void synchronizeDevice(const c10::DeviceIndex) const override { host_reads++; }
    c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return DEVICES; }
    c10::DeviceIndex current_device() const override { return (c10::DeviceIndex)::current_device; }
    c10::DeviceIndex getCurrentDevice() const override
    {
        return (c10::DeviceIndex)::current_device;
    }
    int getNumGPUs() const override { return DEVICES; }
    bool isPinnedPtr(const void *) const override { return false; }
    c10::Allocator *getCUDADeviceAllocator() const override { return &memory; }
    void deviceSynchronize(c10::DeviceIndex) const override { host_reads++; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "takes the place of torch's own");

// ---- operators ----------------------------------------------------------------------------------

struct OnDevice {
    int old = ::current_device;
    explicit OnDevice(c10::optional<c10::Device> device)
    {
        if (device.has_value() && device->index() >= 0) ::current_device = device->index();
    }
    ~OnDevice() { ::current_device = old; }
};

const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);

Tensor empty(c10::SymIntArrayRef size, c10::optional<at::ScalarType> dtype,
             c10::optional<at::Layout>, c10::optional<c10::Device> device, c10::optional<bool>,
             c10::optional<at::MemoryFormat> format)
{
    OnDevice there(device);
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, keys,
                                     c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     c10::optional<at::ScalarType> dtype, c10::optional<at::Layout>,
                     c10::optional<c10::Device> device, c10::optional<bool>)
{
    OnDevice there(device);
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                             C10_AS_INTARRAYREF_SLOW(stride), &memory, keys,
                                             c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor on_host(const Tensor &tensor)
{
    if (tensor.is_cpu()) return tensor;
    void *data = tensor.numel() == 0 ? nullptr : const_cast<void *>(tensor.const_data_ptr());
    return at::from_blob(data, tensor.sizes(), tensor.strides(),
                         at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
}

void count_copy(const Tensor &target, const Tensor &source)
{
    if (inside_fallback > 0 || target.device() == source.device()) return;
    if (target.is_cpu()) host_reads++;
    if (source.is_cpu() && source.numel() > 0) uploads++;
}

Tensor &copy_(Tensor &self, const Tensor &source, bool)
{
    count_copy(self, source);
    Tensor target = on_host(self);
    target.copy_(on_host(source));
    return self;
}

Tensor copy_from_and_resize(const Tensor &self, const Tensor &target)
{
    if (target.sizes() != self.sizes()) target.resize_(self.sizes());
    Tensor writable = target;
    copy_(writable, self, false);
    return target;
}

at::Scalar local_scalar_dense(const Tensor &self)
{
    if (inside_fallback == 0) host_reads++;
    return on_host(self).item();
}

const Tensor &resize_(const Tensor &self, c10::SymIntArrayRef size, c10::optional<at::MemoryFormat>)
{
    auto *impl = self.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    const size_t bytes = (size_t)(impl->storage_offset() + impl->numel()) * impl->itemsize();
    if (impl->storage().nbytes() < bytes) {
        OnDevice there(self.device());
        c10::DataPtr grown = memory.allocate(bytes);
        std::memcpy(grown.get(), impl->storage().data(), impl->storage().nbytes());
        impl->storage().set_data_ptr_noswap(std::move(grown));
        impl->storage().set_nbytes(bytes);
    }
    return self;
}

Tensor &set_storage(Tensor &self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride)
{
    auto *impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
    return self;
}

Tensor &set_whole_storage(Tensor &self, at::Storage source)
{
    const int64_t size = (int64_t)(source.nbytes() / self.itemsize());
    return set_storage(self, std::move(source), 0, {c10::SymInt(size)}, {c10::SymInt(1)});
}

Tensor &set_tensor(Tensor &self, const Tensor &source)
{
    return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(),
                       source.sym_strides());
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack)
{
    // The host would have to know how many there are.
    const std::string &name = op.schema().name();
    if (inside_fallback == 0 &&
        (name == "aten::nonzero" || name == "aten::equal" || name == "aten::_unique2"))
        host_reads++;
    inside_fallback++;
    try {
        at::native::cpu_fallback(op, stack);
    } catch (...) {
        inside_fallback--;
        throw;
    }
    inside_fallback--;
}

TORCH_LIBRARY_IMPL(_, CUDA, m)
{
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m)
{
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("copy_", copy_);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", local_scalar_dense);
    m.impl("resize_", resize_);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("set_.source_Storage", set_whole_storage);
    m.impl("set_.source_Tensor", set_tensor);
    m.impl("as_strided", [](const Tensor &self, at::IntArrayRef size, at::IntArrayRef stride,
                            c10::optional<int64_t> offset) {
        return at::native::as_strided_tensorimpl(self, size, stride, offset);
    });
    m.impl("view",
           [](const Tensor &self, at::IntArrayRef size) { return at::native::view(self, size); });
    m.impl("_reshape_alias", [](const Tensor &self, at::IntArrayRef size, at::IntArrayRef stride) {
        return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
    });
}

struct Start {
    Start()
    {
        c10::SetAllocator(c10::DeviceType::CUDA, &memory);
        // torch has made its hooks, which say that there is no CUDA, when it was loaded.
        new (const_cast<at::CUDAHooksInterface *>(&at::detail::getCUDAHooks())) Hooks;
    }
} start;

} // namespace

// A torch without CUDA excludes CUDA here when it is compiled. This definition takes the place of
// torch's, which needs this library to be loaded before torch.
std::optional<c10::DeviceType> at::accelerator::getAccelerator(bool)
{
    return c10::DeviceType::CUDA;
}

extern "C" {
#pragma GCC visibility push(default)
void fake_memory_hooks(void (*add)(const void *, int64_t, int), void (*forget)(const void *))
{
    register_memory = add;
    forget_memory = forget;
}
// 0: reads by the host, 1: uploads, 2: allocations since the start.
int64_t fake_count(int which)
{
    return which == 0 ? host_reads : which == 1 ? uploads : allocations;
}
int fake_device(int device)
{
    const int old = ::current_device;
    if (device >= 0) ::current_device = device;
    return old;
}
// Makes `stream` current on a device; returns the one that was.
int64_t fake_stream(int device, int64_t stream)
{
    const int64_t old = current_stream[device];
    if (stream >= 0) current_stream[device] = stream;
    return old;
}
#pragma GCC visibility pop
}
