// What a build of torch for CUDA registers when it is loaded, without any CUDA: hooks that say there
// are eight GPUs, c10's own fake device guard, and the step from an LSTM to cuDNN's operator. No
// kernel is registered, so tensors of shapes alone pass, and real numbers would raise an error.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/RNN.h>
#include <ATen/ops/_cudnn_rnn.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Gpus = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Gpus)

namespace at {
namespace {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs /*unused*/) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  bool supportsBFloat16RNNWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  double batchnormMinEpsilonCuDNN() const override { return 0.0; }
  bool hasPrimaryContext(DeviceIndex /*unused*/) const override { return true; }
  DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  int getNumGPUs() const override { return deviceCount(); }
  DeviceIndex current_device() const override { return Gpus::getDeviceIndex(); }
  DeviceIndex getCurrentDevice() const override { return Gpus::getDeviceIndex(); }
  void setCurrentDevice(DeviceIndex index) const override { Gpus::setDeviceIndex(index); }
  bool isPinnedPtr(const void* /*unused*/) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)  // torch looks for this name

}  // namespace

namespace native {
namespace {

// As cuDNN's wrapper calls it: one buffer of all weights, mode 2 for an LSTM.
void lstm(Tensor& output, Tensor& hidden, Tensor& cell, const Tensor& input, TensorList start,
          TensorList weights, bool biases, int64_t layers, double dropout, bool train,
          bool bidirectional, bool batch_first) {
  int64_t count = 0;
  for (const auto& weight : weights) count += weight.numel();
  auto buffer = at::empty({count}, weights[0].options());
  auto all = at::_cudnn_rnn(input, weights, biases ? 4 : 2, buffer, start[0], start[1], 2,
                            start[0].size(2), 0, layers, batch_first, dropout, train, bidirectional,
                            {}, std::nullopt);
  output = std::get<0>(all);
  hidden = std::get<1>(all);
  cell = std::get<2>(all);
}

const bool registered = [] {
  lstm_cudnn_stub.set_cuda_dispatch_ptr(&lstm);
  return true;
}();

}  // namespace
}  // namespace native
}  // namespace at
