// A device of its own type in the host's memory: new memory is garbage, backwards run in a thread of their own, tensors
// of the host are refused, and operations for which a host would wait are noted. Each operation runs as the CPU's.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/extension.h>

using at::Tensor, c10::Device, c10::IValue, c10::Storage, c10::Stream, c10::SymInt, c10::SymIntArrayRef;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const Device HERE(TYPE, 0);
std::vector<std::string> waits;
thread_local c10::StreamId stream = 0;  // the current one; everything runs at once on each
std::map<c10::StreamId, int> copies;  // to the device, on each

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n && posix_memalign(&p, 512, n)) throw std::bad_alloc();
    if (n) memset(p, 0x7b, n);
    return {p, p, &free, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} memory;
REGISTER_ALLOCATOR(TYPE, &memory);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  Device getDevice() const override { return HERE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::UNSAFE, HERE, stream); }
  void record(void** e, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *e = (void*)1; }
  void block(void*, const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  Stream getNewStream(Device, int) const override { return Stream(Stream::UNSAFE, HERE, 1); }
  Stream exchangeStream(Stream s) const noexcept override {
    return Stream(Stream::UNSAFE, HERE, std::exchange(stream, s.id()));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const Storage& s, size_t n) const override {
    at::native::resize_bytes_cpu(s.unsafeGetStorageImpl(), n);
  }
};

Tensor of(const Tensor& t, void* data, size_t bytes, Device device, int64_t offset) {  // t with memory on a device
  auto keeps = [](void* held) { delete static_cast<Tensor*>(held); };
  Storage s(Storage::use_byte_size_t(), bytes, {data, new Tensor(t), keeps, device}, &memory, true);
  auto keys = c10::DispatchKeySet(device == HERE ? c10::DispatchKey::PrivateUse1 : c10::DispatchKey::CPU);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(s), keys, t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), offset);
  return made;
}
Tensor host(const Tensor& t) {
  if (!t.defined() || t.device() != HERE) return t;
  static char none[64];
  size_t skipped = t.storage_offset() * t.itemsize(), bytes = t.storage().nbytes();
  return of(t, bytes ? (char*)t.storage().data() + skipped : none, bytes ? bytes - skipped : 0, at::kCPU, 0);
}
Tensor adopt(const Tensor& t) {
  if (!t.defined() || t.device() == HERE) return t;
  return of(t, const_cast<void*>(t.storage().data()), t.storage().nbytes(), HERE, t.storage_offset());
}

IValue mapped(const IValue& v, const std::function<Tensor(const Tensor&)>& f) {
  if (v.isTensor()) return f(v.toTensor());
  if (v.isDevice()) return IValue(Device(at::kCPU));
  if (v.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& t : v.toTensorVector()) made.push_back(f(t));
    return made;
  }
  if (!v.isList() || !v.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) return v;
  c10::List<std::optional<Tensor>> made;
  for (const IValue& t : v.toListRef()) made.push_back(t.isNone() ? std::nullopt : std::optional(f(t.toTensor())));
  return made;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = op.schema().name();
  auto arguments = op.schema().arguments(), returns = op.schema().returns();
  size_t n = arguments.size(), base = stack->size() - n;
  std::vector<IValue> given(stack->begin() + base, stack->end());
  bool indexes = name.find("aten::index") == 0 || name == "aten::_index_put_impl_";
  auto see = [&](const Tensor& t) {
    bool elsewhere = t.defined() && t.device() != HERE && t.dim();
    TORCH_CHECK(!elsewhere || indexes, "expected all tensors on one device, got ", t.device(), " in ", name);
    if (elsewhere || (indexes && t.defined() && t.scalar_type() == at::kBool && !given[0].toTensor().is_same(t)))
      waits.push_back(name + " by the host's indices or a mask");
    return host(t);
  };
  static const std::set<std::string> read = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
      "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::_linalg_check_errors"};
  if (read.count(name)) waits.push_back(name);
  for (size_t i = 0; i < n; i++) (*stack)[base + i] = mapped(given[i], see);
  std::vector<IValue> seen(stack->begin() + base, stack->end());
  auto& all = c10::Dispatcher::singleton();
  if (name == "aten::convolution_overrideable") {
    all.findSchemaOrThrow("aten::convolution", "").callBoxed(stack);
  } else if (name == "aten::convolution_backward_overrideable") {
    stack->insert(stack->begin() + base + 3, IValue(std::vector<int64_t>{seen[0].toTensor().size(1)}));
    all.findSchemaOrThrow("aten::convolution_backward", "").callBoxed(stack);
  } else op.callBoxed(stack);
  auto writes = [](const c10::Argument& a) { return a.alias_info() && a.alias_info()->isWrite(); };
  for (size_t i = 0; i < n; i++) {  // an `out` that became larger
    if (!writes(arguments[i]) || !seen[i].isTensor() || !given[i].toTensor().defined()) continue;
    Tensor to = given[i].toTensor(), from = seen[i].toTensor();
    if (to.sizes() != from.sizes()) to.resize_(from.sizes()), host(to).copy_(from);
  }
  for (size_t i = 0, first = stack->size() - returns.size(); i < returns.size(); i++) {
    auto& v = (*stack)[first + i];
    v = writes(returns[i]) ? v : mapped(v, adopt);
    for (size_t j = 0; writes(returns[i]) && j < n; j++)
      if (writes(arguments[j]) && arguments[j].alias_info()->beforeSets() == returns[i].alias_info()->beforeSets())
        v = given[j];
  }
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool free) {
  if (from.device() != to.device() && !free && (to.device() != HERE || from.dim())) waits.push_back("a copy");
  if (from.device() != HERE) copies[stream]++;
  host(to).copy_(host(from));
  return to;
}
const Tensor& resize(const Tensor& t, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  at::native::maybe_resize_storage_cpu(impl, (impl->numel() + impl->storage_offset()) * impl->itemsize());
  return t;
}

#define INTS(x) C10_AS_INTARRAYREF_SLOW(x)
#define OPTIONS std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<Device>, std::optional<bool>
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  static const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  m.impl("empty.memory_format", [](SymIntArrayRef size, OPTIONS, std::optional<at::MemoryFormat> format) -> Tensor {
    return at::detail::empty_generic(INTS(size), &memory, keys, c10::dtype_or_default(type), format);
  });
  m.impl("empty_strided", [](SymIntArrayRef size, SymIntArrayRef stride, OPTIONS) -> Tensor {
    return at::detail::empty_strided_generic(INTS(size), INTS(stride), &memory, keys, c10::dtype_or_default(type));
  });
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize",
      [](const Tensor& from, const Tensor& to) { return copy_from(from, to.resize_(from.sizes()), false); });
  m.impl("resize_", &resize);
  m.impl("record_stream", [](Tensor&, Stream) {});
  m.impl("set_.source_Storage_storage_offset",
      [](Tensor& t, Storage s, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) -> Tensor& {
        return at::native::set_storage_cpu_(t, s, offset.expect_int(), INTS(size), INTS(stride));
      });
  m.impl("set_.source_Storage", [](Tensor& t, Storage s) -> Tensor& {
    return at::native::set_storage_cpu_(t, s, 0, {int64_t(s.nbytes() / t.itemsize())}, {1});
  });
  m.impl("as_strided", [](const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
    auto start = offset ? std::optional(offset->expect_int()) : std::nullopt;
    return at::native::as_strided_tensorimpl(t, INTS(size), INTS(stride), start);
  });
  m.impl("view", [](const Tensor& t, SymIntArrayRef size) { return at::native::view(t, INTS(size)); });
  m.impl("_reshape_alias", [](const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, INTS(size), INTS(stride));
  });
  for (auto name : {"convolution_overrideable", "convolution_backward_overrideable", "_linalg_check_errors"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("waits", [] { return std::exchange(waits, {}); });
  m.def("copies", [] { return std::exchange(copies, {}); });
}
