// The driver's exported functions, third part: streams and events.
#include <mutex>
#include <set>

#include "abi.h"
#include "queue.h"
#include "state.h"

using namespace driver;

#define ENTER_CONTEXT(name) \
  if (const CUresult error = enter(name, true)) return error

namespace {

std::mutex events_lock;
std::set<CUevent> events;

bool event_ok(CUevent e) {
  std::lock_guard<std::mutex> guard(events_lock);
  return events.count(e) != 0;
}
TokenP recorded(CUevent e) {
  std::lock_guard<std::mutex> guard(events_lock);
  return e->recorded;
}

}  // namespace

// ---- streams ----

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  ENTER_CONTEXT("cuStreamCreate");
  return stream_create(stream, flags, 0);
}
EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  ENTER_CONTEXT("cuStreamCreate");
  return stream_create(stream, flags, priority);
}
EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
  ENTER_CONTEXT("cuStreamDestroy");
  return stream_destroy(stream);
}
EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  ENTER_CONTEXT("cuStreamSynchronize");
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  return ignored("cuStreamSynchronize") ? CUDA_SUCCESS : wait_stream(stream);
}
EXPORT CUresult cuStreamQuery(CUstream stream) {
  ENTER_CONTEXT("cuStreamQuery");
  return stream_ok(stream) ? query_stream(stream) : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuStreamIsCapturing(CUstream, int* status) {
  ENTER_CONTEXT("cuStreamIsCapturing");
  *status = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  ENTER_CONTEXT("cuStreamWaitEvent");
  if (!stream_ok(stream) || !event_ok(event)) return CUDA_ERROR_INVALID_HANDLE;
  return ignored("cuStreamWaitEvent") ? CUDA_SUCCESS : stream_wait(stream, recorded(event));
}
EXPORT CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data) {
  ENTER_CONTEXT("cuLaunchHostFunc");
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  submit(stream, {Item::Mark, "host function", {}, [=] { return function(data), CUDA_SUCCESS; }, nullptr, {}});
  return CUDA_SUCCESS;
}

// ---- events ----

EXPORT CUresult cuEventCreate(CUevent* event, unsigned flags) {
  ENTER_CONTEXT("cuEventCreate");
  std::lock_guard<std::mutex> guard(events_lock);
  *event = new EmuEvent{flags, nullptr};
  events.insert(*event);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  ENTER_CONTEXT("cuEventDestroy");
  std::lock_guard<std::mutex> guard(events_lock);
  if (!events.erase(event)) return CUDA_ERROR_INVALID_HANDLE;
  delete event;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  ENTER_CONTEXT("cuEventRecord");
  if (!stream_ok(stream) || !event_ok(event)) return CUDA_ERROR_INVALID_HANDLE;
  const TokenP token = submit(stream, {Item::Mark, "event", {}, nullptr, nullptr, {}});
  std::lock_guard<std::mutex> guard(events_lock);
  event->recorded = token;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cuEventRecord(event, stream); }
EXPORT CUresult cuEventSynchronize(CUevent event) {
  ENTER_CONTEXT("cuEventSynchronize");
  if (!event_ok(event)) return CUDA_ERROR_INVALID_HANDLE;
  return ignored("cuEventSynchronize") ? CUDA_SUCCESS : wait(recorded(event));
}
EXPORT CUresult cuEventQuery(CUevent event) {
  ENTER_CONTEXT("cuEventQuery");
  if (!event_ok(event)) return CUDA_ERROR_INVALID_HANDLE;
  return ignored("cuEventQuery") ? CUDA_SUCCESS : query(recorded(event));
}
EXPORT CUresult cuEventElapsedTime(float* ms, CUevent start, CUevent end) {
  ENTER_CONTEXT("cuEventElapsedTime");
  if (!event_ok(start) || !event_ok(end) || (start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  const TokenP a = recorded(start), b = recorded(end);
  if (!a || !b) return CUDA_ERROR_INVALID_HANDLE;
  for (const TokenP& t : {a, b})
    if (const CUresult error = query(t)) return error;
  *ms = (float)((b->when - a->when) * 1e3);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventElapsedTime_v2(float* ms, CUevent start, CUevent end) { return cuEventElapsedTime(ms, start, end); }
