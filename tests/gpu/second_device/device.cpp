// A second device type for tests: two devices whose memory is host memory that nobody may touch.
//
// Memory: pages without permissions, opened only while a copy or an operator of the device itself runs. A host access is SIGSEGV.
// Operators: those of the CPU, on copies. They run at once, after all that their stream was told before.
// Copies to the host with non_blocking=True: queued on the current stream. They run when somebody waits for them or asks for their
// event, never before: a wait that is missing leaves bytes out, or copies those of a later moment.
// Misuse is counted: memory released under a queued copy, and devices that were made current though no tensor is on them.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <time.h>
#include <torch/library.h>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>

extern "C" {  // of the interpreter that loads this
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;
constexpr size_t PAGE = 4096;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

using Stream = std::pair<int, c10::StreamId>;  // device, number

struct Moment {  // what an event stands for
  Stream stream;
  bool happened = false;
  double time = 0;
};

struct Task {
  std::function<void()> run;    // empty: wait for `moment`
  std::shared_ptr<Moment> moment;
  const void* reads = nullptr;  // memory of the device
};

struct Area {
  size_t size;
  bool open = false;
  bool released = false;
  int device = 0;
};

std::recursive_mutex lock;  // guards all below
std::map<uintptr_t, Area> areas;
std::map<Stream, std::deque<Task>> streams;
std::set<int> contexts;
c10::StreamId newest_stream = 0;
long copies_out = 0, copies_in = 0, queued = 0, released_early = 0, fail_after = -1;
double copy_seconds = 0;
thread_local int current_device = 0;
thread_local c10::StreamId current_stream[DEVICES] = {};

struct Locked {  // nobody waits for the lock with the GIL, as dropping a tensor may take the GIL under the lock
  explicit Locked(std::recursive_mutex& m) {
    if (m.try_lock()) return;
    void* thread = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    m.lock();
    if (thread) PyEval_RestoreThread(thread);
  }
  ~Locked() { lock.unlock(); }
};

std::map<uintptr_t, Area>::iterator area_of(const void* p) {
  auto i = areas.upper_bound((uintptr_t)p);
  if (i == areas.begin()) return areas.end();
  --i;
  return (uintptr_t)p < i->first + i->second.size ? i : areas.end();
}

struct Open {  // the area's memory may be touched while this lives
  std::map<uintptr_t, Area>::iterator area;
  bool ours;
  explicit Open(const void* p) : area(area_of(p)), ours(area != areas.end() && !area->second.open) {
    if (ours) {
      area->second.open = true;
      mprotect((void*)area->first, area->second.size, PROT_READ | PROT_WRITE);
    }
  }
  ~Open() {
    if (ours) {
      area->second.open = false;
      mprotect((void*)area->first, area->second.size, PROT_NONE);
    }
  }
};

void advance(Stream stream) {  // one thing; a stream that waits has the other one go on
  auto& tasks = streams[stream];
  TORCH_CHECK(!tasks.empty(), "a stream waits for what it was never told");
  auto moment = tasks.front().moment;
  if (moment && !moment->happened) return advance(moment->stream);
  Task task = std::move(tasks.front());
  tasks.pop_front();
  if (!moment) task.run();
}

void run_until(std::shared_ptr<Moment> moment) {
  while (!moment->happened) advance(moment->stream);
}

void catch_up(int device, c10::StreamId id) {  // the stream does all that it was told
  while (!streams[{device, id}].empty()) advance({device, id});
}

void enqueue(int device, c10::StreamId id, Task task) {
  auto& tasks = streams[{device, id}];
  tasks.push_back(std::move(task));
  if (id == 0 && tasks.size() == 1 && tasks.front().run) advance({device, id});  // it had nothing else to do
}

void release(void* p) {
  Locked l(lock);
  auto i = areas.find((uintptr_t)p);
  if (i == areas.end()) return;
  for (auto& stream : streams)
    for (auto& task : stream.second)
      if (task.reads && area_of(task.reads) == i) {  // kept, with other bytes, as the next owner would write them
        released_early++;
        Open o(p);
        memset(p, 0xDD, i->second.size);
        return;
      }
  munmap(p, i->second.size);
  areas.erase(i);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Device device(KIND, current_device);
    if (!n) return {nullptr, nullptr, &release, device};
    size_t size = (n + PAGE - 1) / PAGE * PAGE;
    void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "no memory for the device");
    Locked l(lock);
    areas[(uintptr_t)p] = {size, false, false, current_device};
    contexts.insert(current_device);
    return {p, p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* of, size_t n) const override {
    Locked l(lock);
    Open a(to), b(of);
    memcpy(to, of, n);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(KIND, device), id);
  }
  c10::DeviceType type() const override { return KIND; }
  c10::Device getDevice() const override { return c10::Device(KIND, current_device); }
  void setDevice(c10::Device d) const override {  // as CUDA does since 12: makes the device's context
    Locked l(lock);
    contexts.insert(d.index());
    current_device = d.index();
  }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto before = getDevice();
    if (d.index() != current_device) setDevice(d);
    return before;
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current_device = d.index(); }  // back to where it was
  c10::Stream getStream(c10::Device d) const override { return stream(d.index(), current_stream[d.index()]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(d.index(), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    Locked l(lock);
    return stream(d.index() < 0 ? current_device : d.index(), ++newest_stream);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto before = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return before;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete (std::shared_ptr<Moment>*)event; }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    Locked l(lock);
    if (!*event) *event = new std::shared_ptr<Moment>();
    auto moment = *(std::shared_ptr<Moment>*)*event = std::make_shared<Moment>(Moment{{s.device_index(), s.id()}});
    enqueue(s.device_index(), s.id(), {[moment] { moment->happened = true; moment->time = now(); }, nullptr, nullptr});
  }
  void block(void* event, const c10::Stream& s) const override {
    Locked l(lock);
    if (event) enqueue(s.device_index(), s.id(), {nullptr, *(std::shared_ptr<Moment>*)event, nullptr});
  }
  bool queryEvent(void* event) const override {  // the device goes on a little: who asks again and again comes to an end
    Locked l(lock);
    if (!event) return true;
    auto moment = *(std::shared_ptr<Moment>*)event;
    if (!moment->happened) advance(moment->stream);
    return moment->happened;
  }
  void synchronizeEvent(void* event) const override {
    Locked l(lock);
    if (event) run_until(*(std::shared_ptr<Moment>*)event);
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    Locked l(lock);
    return ((*(std::shared_ptr<Moment>*)b)->time - (*(std::shared_ptr<Moment>*)a)->time) * 1e3;
  }
  bool queryStream(const c10::Stream& s) const override {
    Locked l(lock);
    return streams[{s.device_index(), s.id()}].empty();
  }
  void synchronizeStream(const c10::Stream& s) const override {
    Locked l(lock);
    catch_up(s.device_index(), s.id());
  }
  void synchronizeDevice(const c10::DeviceIndex d) const override {
    Locked l(lock);
    for (auto& each : streams)
      if (each.first.first == d) catch_up(d, each.first.second);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex d) const override { Locked l(lock); return contexts.count(d); }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex d) const override { Guard().setDevice({KIND, d}); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return Guard().exchangeDevice({KIND, d}).index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override {
    auto before = current_device;
    current_device = d;  // without making a context
    return before;
  }
  at::Device getDeviceFromPtr(void* p) const override {
    Locked l(lock);
    auto i = area_of(p);
    return {KIND, (c10::DeviceIndex)(i == areas.end() ? 0 : i->second.device)};
  }
};
struct Registration {
  Hooks hooks;
  Registration() { at::RegisterPrivateUse1HooksInterface(&hooks); }
} registration;

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device && device->has_index() ? *device : c10::Device(KIND, current_device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(type), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device && device->has_index() ? *device : c10::Device(KIND, current_device));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(type));
}

void* bytes_of(const at::Tensor& t) {
  return (char*)t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get() + t.storage_offset() * t.itemsize();
}
at::Tensor on_host(void* p, c10::IntArrayRef size, c10::IntArrayRef stride, at::ScalarType type) {
  return at::from_blob(p, size, stride, at::TensorOptions().dtype(type));
}
at::Tensor on_host(const at::Tensor& t) { return on_host(bytes_of(t), t.sizes(), t.strides(), t.scalar_type()); }

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (!self.numel()) return to;
  at::NoGradGuard no_grad;
  Locked l(lock);
  int device = self.is_cpu() ? to.device().index() : self.device().index();
  auto stream = current_stream[device];
  bool out = to.is_cpu();
  (out ? copies_out : copies_in)++;
  if (out && fail_after >= 0 && copies_out > fail_after) TORCH_CHECK(false, "the device is out of memory");
  if (out && non_blocking) {
    queued++;
    auto source = self.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
    auto of = on_host(self);  // no owner of the memory, as a copy on a stream is none
    auto place = on_host(to.mutable_data_ptr(), to.sizes(), to.strides(), to.scalar_type());
    Task task{[of, place] {
      at::NoGradGuard no_grad;
      if (copy_seconds) { timespec t{(time_t)copy_seconds, (long)((copy_seconds - (time_t)copy_seconds) * 1e9)}; nanosleep(&t, nullptr); }
      Open o(of.const_data_ptr());
      place.copy_(of);
    }, nullptr, source};
    streams[{device, stream}].push_back(std::move(task));
    // CUDA does this at once, in host memory, before the copy has arrived (pytorch#146286).
    if (self.is_conj() != to.is_conj()) place.copy_(place.conj());
    if (self.is_neg() != to.is_neg()) place.neg_();
    return to;
  }
  catch_up(device, stream);
  if (!self.is_cpu() && !to.is_cpu()) catch_up(to.device().index(), current_stream[to.device().index()]);
  auto of = self.is_cpu() ? self : on_host(self), place = to.is_cpu() ? to : on_host(to);
  Open a(of.const_data_ptr()), b(place.const_data_ptr());
  if (!self.is_cpu()) { if (self.is_conj()) of = of.conj(); if (self.is_neg()) of = of._neg_view(); }
  if (!to.is_cpu()) { if (to.is_conj()) place = place.conj(); if (to.is_neg()) place = place._neg_view(); }
  place.copy_(of);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}
const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  std::vector<int64_t> sizes;
  int64_t n = 1;
  for (auto& each : size) { sizes.push_back(each.expect_int()); n *= sizes.back(); }
  if (t.sizes() == c10::IntArrayRef(sizes)) return t;
  auto* storage = t.storage().unsafeGetStorageImpl();
  size_t needed = (n + t.storage_offset()) * t.itemsize();
  if (storage->nbytes() < needed) {
    c10::DeviceGuard guard(t.device());
    auto data = allocator.allocate(needed);
    if (storage->nbytes()) allocator.copy_data(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}
at::Scalar local_scalar_dense(const at::Tensor& t) { return t.cpu().item(); }
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
}
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace

extern "C" {
long second_device_copies_out() { Locked l(lock); return copies_out; }
long second_device_queued() { Locked l(lock); return queued; }
long second_device_released_early() { Locked l(lock); return released_early; }
long second_device_has_context(int device) { Locked l(lock); return contexts.count(device); }
long second_device_pending() {
  Locked l(lock);
  long n = 0;
  for (auto& each : streams)
    for (auto& task : each.second) n += task.reads != nullptr;
  return n;
}
void second_device_slow_copies(double seconds) { Locked l(lock); copy_seconds = seconds; }
void second_device_fail_after(long n) { Locked l(lock); fail_after = n < 0 ? -1 : copies_out + n; }
}
