// The innermost loops of the host's product, for the instructions that the machine has.
#pragma once

#include <cstdint>

namespace jfp4::host {

// Sums of products of small integers, kIntegerRows rows of a by kIntegerCols of b, each row along
// k, a multiple of kIntegerLanes: c[i][j] = sum a[i][p] b[j][p], where rows of c are `stride`
// apart. Pairs of products may be added up lane by lane in int16, which `exact` of them along k
// leave exact.
constexpr int64_t kIntegerRows = 4, kIntegerCols = 2, kIntegerLanes = 32;
using IntegerTile = void (*)(const uint8_t* a, const int8_t* b, int64_t k, int64_t exact,
                             int32_t* c, int64_t stride);
IntegerTile ChooseIntegerTile();

// Sums of products of float32: c[i][j] += sum a[p][i] b[p][j] for p below k, where a holds
// kFloatRows and b kFloatCols numbers a step of p, and rows of c are `stride` apart.
constexpr int64_t kFloatRows = 6, kFloatCols = 16;
using FloatTile = void (*)(const float* a, const float* b, int64_t k, float* c, int64_t stride);
FloatTile ChooseFloatTile();

}  // namespace jfp4::host
