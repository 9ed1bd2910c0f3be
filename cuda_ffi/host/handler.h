// A host handler: reads its buffers and computes, on XLA's thread pool.
#pragma once

#include "cuda_ffi/ffi/checks.h"

namespace jfp4::host {

template <typename Call, auto kRun>
constexpr auto OnPool = [](ffi::ThreadPool pool, auto... buffers) -> ffi::Error {
  auto args = Call::Read(buffers...);
  if (args.has_error()) return args.error();
  kRun(*args, pool);
  return ffi::Error::Success();
};

}  // namespace jfp4::host

// Defines the handler `symbol` of a call.
#define JFP4_HOST_HANDLER(symbol, Call, run)                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, (::jfp4::host::OnPool<Call, run>), \
                                Call::Bind<::xla::ffi::ThreadPool>())
