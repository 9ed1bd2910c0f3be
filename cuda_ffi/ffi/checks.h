// What every handler asks of its buffers, and the words in which it refuses one.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cuda_ffi/kernels/types.h"
#include "xla/ffi/api/ffi.h"

namespace jfp4 {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Output = ffi::Result<ffi::AnyBuffer>;

inline const char* Name(ffi::DataType type) {
  switch (type) {
    case ffi::BF16:
      return "bf16";
    case ffi::F16:
      return "f16";
    case ffi::F32:
      return "f32";
    case ffi::F8E4M3FN:
      return "f8e4m3fn";
    case ffi::F8E5M2:
      return "f8e5m2";
    case ffi::U8:
      return "u8";
    default:
      return "another type";
  }
}

template <typename Dims>
std::string Describe(ffi::DataType type, const Dims& dims) {
  std::string text = std::string(Name(type)) + "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline std::string Describe(Buffer buffer) {
  return Describe(buffer.element_type(), buffer.dimensions());
}

// Turns a call's buffers into pointers, once they have been found to be what the kernels take. The
// first operand settles the leading (batch) dimensions, which all others share; an operand or a
// result that may be absent is so when its last dimension is 0. Of several mistakes the first is
// kept.
class Checker {
 public:
  // `lead` is a batch of arrays of `rank` dimensions, none of them empty.
  Checker(const char* name, Buffer lead, size_t rank) : lead_name_(name), lead_(lead) {
    const auto dims = lead.dimensions();
    if (dims.size() < rank) {
      Refuse(name, lead, "at least " + std::to_string(rank) + " dimensions");
      dims_.assign(rank, 1);
      return;
    }
    if (lead.element_count() == 0) Refuse(name, lead, "no empty dimension");
    leading_.assign(dims.begin(), dims.end() - rank);
    dims_.assign(dims.end() - rank, dims.end());
  }

  int64_t dim(size_t i) const { return dims_[i]; }

  int64_t batch() const {
    int64_t product = 1;
    for (const int64_t d : leading_) product *= d;
    return product;
  }

  // The last dimensions of an operand that share the leading ones; zeros if it has another rank.
  int64_t Last(Buffer buffer, size_t rank, size_t i) const {
    const auto dims = buffer.dimensions();
    return dims.size() == leading_.size() + rank ? dims[leading_.size() + i] : 0;
  }

  template <typename T>
  T* Take(const char* name, Buffer buffer, ffi::DataType type, std::vector<int64_t> dims) {
    dims.insert(dims.begin(), leading_.begin(), leading_.end());
    if (buffer.element_type() != type || !Same(buffer, dims)) {
      Refuse(name, buffer, Describe(type, dims));
    }
    return static_cast<T*>(buffer.untyped_data());
  }

  template <typename T>
  T* TakeIfPresent(const char* name, Buffer buffer, ffi::DataType type, std::vector<int64_t> dims) {
    const auto given = buffer.dimensions();
    if (given.size() == 0 || given.back() != 0) return Take<T>(name, buffer, type, dims);
    dims.back() = 0;
    Take<T>(name, buffer, type, dims);
    return nullptr;
  }

  // The type of a tensor outside the kernels.
  DType FloatType(const char* name, Buffer buffer) {
    switch (buffer.element_type()) {
      case ffi::BF16:
        return DType::kBF16;
      case ffi::F16:
        return DType::kF16;
      case ffi::F32:
        return DType::kF32;
      default:
        Refuse(name, buffer, "bf16, f16 or f32");
        return DType::kF32;
    }
  }

  // Whether codes are E5M2's; all other formats are carried in E4M3.
  bool IsE5M2(const char* name, Buffer buffer) {
    const ffi::DataType type = buffer.element_type();
    if (type != ffi::F8E4M3FN && type != ffi::F8E5M2) {
      Refuse(name, buffer, "f8e4m3fn or f8e5m2");
    }
    return type == ffi::F8E5M2;
  }

  void Require(bool ok, const std::string& message) {
    if (!ok && error_.success()) error_ = ffi::Error::InvalidArgument(message);
  }

  // `args`, or what is wrong with the call.
  template <typename Args>
  ffi::ErrorOr<Args> Finish(const Args& args) const {
    if (error_.failure()) return ffi::ErrorOr<Args>(ffi::Unexpected<ffi::Error>(error_));
    return ffi::ErrorOr<Args>(args);
  }

 private:
  static bool Same(Buffer buffer, const std::vector<int64_t>& dims) {
    const auto given = buffer.dimensions();
    return std::equal(given.begin(), given.end(), dims.begin(), dims.end());
  }

  void Refuse(const char* name, Buffer buffer, const std::string& expected) {
    std::string text = std::string(name) + " is " + Describe(buffer) + "; expected " + expected;
    if (name != lead_name_) text += ", beside " + std::string(lead_name_) + " " + Describe(lead_);
    Require(false, text);
  }

  const char* lead_name_;
  Buffer lead_;
  std::vector<int64_t> leading_, dims_;
  ffi::Error error_;
};

// What carries the codes of a format.
inline ffi::DataType CodeType(Format format) {
  return format == Format::kE5M2 ? ffi::F8E5M2 : ffi::F8E4M3FN;
}

inline Format CheckFormat(Checker& check, int32_t format) {
  const bool known = 0 <= format && format <= static_cast<int32_t>(Format::kE5M2);
  check.Require(known, "format is " + std::to_string(format) + "; expected 0 to 4");
  return known ? static_cast<Format>(format) : Format::kE2M1;
}

}  // namespace jfp4
