// SPDX-License-Identifier: Apache-2.0
// Device memory, streams and elements on the host.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "checks.h"

namespace hstu_trt::host {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    must(cudaMalloc(&data_, bytes + 1));
    clear();
  }
  template <class T>
  explicit Buffer(std::vector<T> const& values) : Buffer(values.size() * sizeof(T)) {
    write(values);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* data() const { return data_; }
  // Both are done when they return: streams of the host do not wait for the default stream.
  void clear() {
    must(cudaMemset(data_, 0, bytes_));
    must(cudaStreamSynchronize(nullptr));
  }

  template <class T>
  void write(std::vector<T> const& values) {
    must(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    must(cudaStreamSynchronize(nullptr));
  }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    must(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

class Stream {
 public:
  Stream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(Stream const&) = delete;
  Stream& operator=(Stream const&) = delete;

  operator cudaStream_t() const { return stream_; }
  void wait() const { must(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// What `work(stream)` enqueues, as a graph that can be launched again.
class Graph {
 public:
  template <class Work>
  explicit Graph(Work&& work) {
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    work(stream_);
    cudaGraph_t graph = nullptr;
    must(cudaStreamEndCapture(stream_, &graph));
    must(cudaGraphInstantiate(&graph_, graph, 0));
    must(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(graph_); }
  Graph(Graph const&) = delete;
  Graph& operator=(Graph const&) = delete;

  void replay() {
    must(cudaGraphLaunch(graph_, stream_));
    stream_.wait();
  }

 private:
  Stream stream_;
  cudaGraphExec_t graph_ = nullptr;
};

inline size_t element_bytes(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFP8: return 1;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT64: return 8;
    default: return 4;
  }
}

// Floats as elements of a type, in device memory.
inline Buffer upload(std::vector<float> const& values, nvinfer1::DataType type) {
  auto const convert = [&values](auto one) {
    std::vector<decltype(one)> result;
    for (float const value : values) result.emplace_back(value);
    return Buffer(result);
  };
  switch (type) {
    case nvinfer1::DataType::kFP8: return convert(__nv_fp8_e4m3());
    case nvinfer1::DataType::kHALF: return convert(__half());
    case nvinfer1::DataType::kBF16: return convert(__nv_bfloat16());
    default: return Buffer(values);
  }
}

inline std::vector<float> download(Buffer const& buffer, nvinfer1::DataType type) {
  auto const convert = [](auto const& values) {
    std::vector<float> result;
    for (auto const& value : values) result.push_back(static_cast<float>(value));
    return result;
  };
  switch (type) {
    case nvinfer1::DataType::kHALF: return convert(buffer.read<__half>());
    case nvinfer1::DataType::kBF16: return convert(buffer.read<__nv_bfloat16>());
    default: return buffer.read<float>();
  }
}

inline std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// |a - b| / |b|; NaNs do not pass for small.
inline double relative_l2(std::vector<float> const& a, std::vector<float> const& b) {
  if (a.size() != b.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return norm > 0 ? std::sqrt(difference / norm) : INFINITY;
}

}  // namespace hstu_trt::host
