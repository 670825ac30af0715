// How tests steer and question the double. C linkage, plain types: C++ finds these with dlsym,
// Python with ctypes, both in the libcuda.so.1 that is already loaded. Not part of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Breaches of CUDA's documented contract, or of vattn's stricter rules, seen so far.
size_t vattn_double_breaches();
// "cuMemUnmap(base=0x7f..., bytes=4096): sentence". Null past the end. Valid until the next reset.
const char* vattn_double_breach(size_t index);
// Records one breach for each handle, mapping, reservation, event and context still held.
void vattn_double_check_leaks();
// Forgets everything, also what the calls below have set: a newly loaded driver. Objects that
// callers still hold are dead afterwards.
void vattn_double_reset();

void vattn_double_set_device_count(int count);
// CUdevice_attribute 18 (integrated), 102 (virtual memory), 103 (posix_fd), 110 (RDMA with virtual
// memory), 128 (fabric).
void vattn_double_set_attribute(int attribute, int value);
void vattn_double_set_total_memory(size_t bytes);
// A driver that refuses (CUDA_ERROR_INVALID_VALUE) one call over several mappings, in turn
// cuMemSetAccess and cuMemUnmap; or the RDMA flag or posix_fd handles in cuMemCreate.
void vattn_double_refuse_multi_set_access(int refuse);
void vattn_double_refuse_multi_unmap(int refuse);
void vattn_double_refuse_rdma(int refuse);
void vattn_double_refuse_posix_fd(int refuse);
// cuMemCreate hands out memory with leftovers: every byte is 0xdb.
void vattn_double_leave_leftovers(int leave);
// cuGetProcAddress no longer finds `symbol`.
void vattn_double_hide_symbol(const char* symbol);
// `call` fails with `code` `times` times, after `skip` calls that work.
void vattn_double_fail(const char* call, int skip, int times, int code);
// From now on every call answers CUDA_ERROR_DEINITIALIZED, as at process exit.
void vattn_double_deinitialize();

// Streams need no creation: any number is one. Work recorded on a busy stream ends when the stream
// becomes idle, and an idle stream that waits for an event stays busy until the event has passed.
void vattn_double_set_stream_busy(uintptr_t stream, int busy);
int vattn_double_stream_busy(uintptr_t stream);
// The work now in `stream` uses this range: unmapping it before the stream is idle is a breach.
void vattn_double_use_range(uintptr_t stream, uintptr_t base, size_t bytes);

size_t vattn_double_live_handles();
size_t vattn_double_live_mappings();
size_t vattn_double_live_reservations();
size_t vattn_double_live_events();
int vattn_double_context_references(int device);
size_t vattn_double_calls(const char* call);

}  // extern "C"
