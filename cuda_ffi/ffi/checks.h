// What every handler asks of its buffers, and the words in which it refuses one.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
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
    case ffi::U32:
      return "u32";
    default:
      return "another type";
  }
}

inline std::string Describe(ffi::DataType type, const std::vector<int64_t>& dims) {
  std::string text = std::string(Name(type)) + "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline std::string Describe(Buffer buffer) {
  const auto dims = buffer.dimensions();
  return Describe(buffer.element_type(), {dims.begin(), dims.end()});
}

template <typename Args>
ffi::ErrorOr<Args> Refusal(const ffi::Error& error) {
  return ffi::ErrorOr<Args>(ffi::Unexpected<ffi::Error>(error));
}

// Turns a call's buffers into pointers, once they have been found to be what the kernels take. The
// first operand settles the leading (batch) dimensions, which all others share; an operand or a
// result that may be absent is so when its last dimension is 0. Of several mistakes the first is
// kept.
class Checker {
 public:
  using Dims = std::initializer_list<int64_t>;

  // `lead` is a batch of arrays of `rank` dimensions, none of them empty.
  Checker(const char* name, Buffer lead, size_t rank)
      : lead_name_(name), lead_(lead), rank_(rank), fits_(lead.dimensions().size() >= rank) {
    if (!fits_) {
      Refuse(name, lead, "at least " + std::to_string(rank) + " dimensions");
    } else if (lead.element_count() == 0) {
      Refuse(name, lead, "no empty dimension");
    }
  }

  // The first operand's dimension i, less the leading ones.
  int64_t dim(size_t i) const { return fits_ ? lead_.dimensions()[leading() + i] : 1; }

  int64_t batch() const {
    int64_t product = 1;
    for (size_t i = 0; i < leading(); ++i) product *= lead_.dimensions()[i];
    return product;
  }

  // Dimension i, less the leading ones, of a buffer of `rank` more; 0 if it has another number.
  int64_t Last(Buffer buffer, size_t rank, size_t i) const {
    const auto dims = buffer.dimensions();
    return dims.size() == leading() + rank ? dims[leading() + i] : 0;
  }

  // The same where any size is right, but another number of dimensions is not.
  int64_t Size(const char* name, Buffer buffer, size_t rank, size_t i) {
    if (buffer.dimensions().size() != leading() + rank) {
      Refuse(name, buffer, std::to_string(leading() + rank) + " dimensions");
    }
    return Last(buffer, rank, i);
  }

  template <typename T>
  T* Take(const char* name, Buffer buffer, ffi::DataType type, Dims dims) {
    if (buffer.element_type() != type || !Matches(buffer, dims)) {
      const auto lead = lead_.dimensions();
      std::vector<int64_t> expected(lead.begin(), lead.begin() + leading());
      expected.insert(expected.end(), dims.begin(), dims.end());
      Refuse(name, buffer, Describe(type, expected));
    }
    return static_cast<T*>(buffer.untyped_data());
  }

  // A vector, or with `rows` a matrix, of `last` columns; null if it has none.
  template <typename T>
  T* TakeIfPresent(const char* name, Buffer buffer, ffi::DataType type, int64_t last) {
    const bool present = IsPresent(buffer);
    T* data = Take<T>(name, buffer, type, {present ? last : 0});
    return present ? data : nullptr;
  }

  template <typename T>
  T* TakeIfPresent(const char* name, Buffer buffer, ffi::DataType type, int64_t rows,
                   int64_t last) {
    const bool present = IsPresent(buffer);
    T* data = Take<T>(name, buffer, type, {rows, present ? last : 0});
    return present ? data : nullptr;
  }

  TileCounter* TakeCounter(const char* name, Buffer buffer) {
    return reinterpret_cast<TileCounter*>(Take<uint32_t>(name, buffer, ffi::U32, {kCounterWords}));
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

  void Refuse(const std::string& message) {
    if (error_.success()) error_ = ffi::Error::InvalidArgument(message);
  }

  // `args`, or what is wrong with the call.
  template <typename Args>
  ffi::ErrorOr<Args> Finish(const Args& args) const {
    return error_.failure() ? Refusal<Args>(error_) : ffi::ErrorOr<Args>(args);
  }

 private:
  size_t leading() const { return fits_ ? lead_.dimensions().size() - rank_ : 0; }

  static bool IsPresent(Buffer buffer) {
    const auto dims = buffer.dimensions();
    return dims.size() == 0 || dims.back() != 0;
  }

  bool Matches(Buffer buffer, Dims dims) const {
    const auto given = buffer.dimensions(), lead = lead_.dimensions();
    return given.size() == leading() + dims.size() &&
           std::equal(lead.begin(), lead.begin() + leading(), given.begin()) &&
           std::equal(dims.begin(), dims.end(), given.begin() + leading());
  }

  void Refuse(const char* name, Buffer buffer, const std::string& expected) {
    std::string text = std::string(name) + " is " + Describe(buffer) + "; expected " + expected;
    if (std::string_view(name) != lead_name_) {
      text += ", beside " + std::string(lead_name_) + " " + Describe(lead_);
    }
    Refuse(text);
  }

  const char* lead_name_;
  Buffer lead_;
  size_t rank_;
  bool fits_;
  ffi::Error error_;
};

// What carries the codes of a format.
inline ffi::DataType CodeType(Format format) {
  return format == Format::kE5M2 ? ffi::F8E5M2 : ffi::F8E4M3FN;
}

inline Format CheckFormat(Checker& check, int32_t format) {
  if (0 <= format && format <= static_cast<int32_t>(Format::kE5M2)) {
    return static_cast<Format>(format);
  }
  check.Refuse("format is " + std::to_string(format) + "; expected 0 to 5");
  return Format::kE2M1;
}

}  // namespace jfp4
