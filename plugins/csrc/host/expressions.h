// SPDX-License-Identifier: Apache-2.0
// Dimension expressions as the builder would hand them out: numbers.
#pragma once

#include <NvInfer.h>

#include <deque>

namespace hstu_trt::host {

class Expression final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }

  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  int64_t value() const { return value_; }

 private:
  int64_t value_;
};

class Expressions final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  Expressions() { mImpl = this; }

  nvinfer1::IDimensionExpr const* constant(int64_t value) override { return &kept_.emplace_back(value); }
  nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
                                            nvinfer1::IDimensionExpr const&) override {
    return nullptr;
  }
  nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                    nvinfer1::IDimensionExpr const&) override {
    return nullptr;
  }

  nvinfer1::DimsExprs dims(std::initializer_list<int64_t> lengths) {
    nvinfer1::DimsExprs result{};
    for (int64_t const length : lengths) result.d[result.nbDims++] = &kept_.emplace_back(length);
    return result;
  }

  nvinfer1::IExprBuilder& builder() { return *this; }

 private:
  std::deque<Expression> kept_;
};

inline int64_t value(nvinfer1::IDimensionExpr const* expression) {
  return static_cast<Expression const*>(expression)->value();
}

}  // namespace hstu_trt::host
