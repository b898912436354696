// Squeeze-and-excitation in CUDA, forward and backward, in the plainest form: a first read.
//
// For contiguous float x[B, C, S] (S positions) and the block of Hu et al. (arXiv:1709.01507):
//
//   z = mean of x over S     h = relu(W1 z + b1)     g = sigmoid(W2 h + b2)     y = x g
//
// plain_cuda_se.py compiles it and makes it a function of PyTorch's; docs/kernels.md leads from
// here to the real kernels. Not yet run on a GPU: compiled for one, and its text run on a CPU.
#include <cuda_runtime.h>

constexpr int kThreads = 128;  // a power of two

// The sum over the block. `room` has a float for each thread.
__device__ float block_sum(float value, float* room) {
  room[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
    __syncthreads();
  }
  return room[0];
}

// A block per image and channel: the sum of a, or of a b, over its positions.
__global__ void row_sum(const float* a, const float* b, float* out, int S, float divisor) {
  extern __shared__ float shared[];
  const long long first = static_cast<long long>(blockIdx.x) * S;
  float sum = 0;
  for (int s = threadIdx.x; s < S; s += kThreads) sum += a[first + s] * (b ? b[first + s] : 1.0f);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum / divisor;
}

// A block per image: the two layers and the gate. A thread has hidden units, then channels.
__global__ void excite(const float* z, const float* w1, const float* b1, const float* w2,
                       const float* b2, float* h, float* g, int C, int R) {
  z += blockIdx.x * C, h += blockIdx.x * R, g += blockIdx.x * C;
  for (int r = threadIdx.x; r < R; r += kThreads) {
    float pre = b1[r];
    for (int c = 0; c < C; ++c) pre += w1[r * C + c] * z[c];
    h[r] = pre > 0 ? pre : 0;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += kThreads) {
    float u = b2[c];
    for (int r = 0; r < R; ++r) u += w2[c * R + r] * h[r];
    g[c] = 1 / (1 + expf(-u));
  }
}

// The chain rule through the gate and the two layers.
__global__ void excite_backward(const float* ds, const float* g, const float* h, const float* w1,
                                const float* w2, float* du, float* dh, float* dz, int C, int R) {
  ds += blockIdx.x * C, g += blockIdx.x * C, h += blockIdx.x * R;
  du += blockIdx.x * C, dh += blockIdx.x * R, dz += blockIdx.x * C;
  for (int c = threadIdx.x; c < C; c += kThreads) du[c] = ds[c] * g[c] * (1 - g[c]);
  __syncthreads();
  for (int r = threadIdx.x; r < R; r += kThreads) {
    float sum = 0;
    for (int c = 0; c < C; ++c) sum += w2[c * R + r] * du[c];
    dh[r] = h[r] > 0 ? sum : 0;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += kThreads) {
    float sum = 0;
    for (int r = 0; r < R; ++r) sum += w1[r * C + c] * dh[r];
    dz[c] = sum;
  }
}

// A block per image and channel: y = x scale, and + shift / S.
__global__ void scale_row(const float* x, const float* scale, const float* shift, float* y, int S) {
  const long long first = static_cast<long long>(blockIdx.x) * S;
  const float add = shift ? shift[blockIdx.x] / static_cast<float>(S) : 0;
  for (int s = threadIdx.x; s < S; s += kThreads) {
    y[first + s] = x[first + s] * scale[blockIdx.x] + add;
  }
}

// out[m, k] = sum over the batch of a[b, m] v[b, k]; v null: of a[b, m] alone, K being 1.
__global__ void sum_over_batch(const float* a, const float* v, float* out, int B, int M, int K) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= M * K) return;
  float sum = 0;
  for (int b = 0; b < B; ++b) sum += a[b * M + i / K] * (v ? v[b * K + i % K] : 1.0f);
  out[i] = sum;
}

extern "C" int se_forward(const float* x, const float* w1, const float* b1, const float* w2,
                          const float* b2, float* z, float* h, float* g, float* y, int B, int C,
                          int R, int S, cudaStream_t stream) {
  const int room = kThreads * sizeof(float);
  row_sum<<<B * C, kThreads, room, stream>>>(x, nullptr, z, S, static_cast<float>(S));
  excite<<<B, kThreads, 0, stream>>>(z, w1, b1, w2, b2, h, g, C, R);
  scale_row<<<B * C, kThreads, 0, stream>>>(x, g, nullptr, y, S);
  return cudaGetLastError();
}

extern "C" int se_backward(const float* dy, const float* x, const float* w1, const float* w2,
                           const float* z, const float* h, const float* g, float* ds, float* du,
                           float* dh, float* dz, float* dx, float* dw1, float* db1, float* dw2,
                           float* db2, int B, int C, int R, int S, cudaStream_t stream) {
  const int room = kThreads * sizeof(float), blocks = (C * R + kThreads - 1) / kThreads;
  row_sum<<<B * C, kThreads, room, stream>>>(dy, x, ds, S, 1.0f);
  excite_backward<<<B, kThreads, 0, stream>>>(ds, g, h, w1, w2, du, dh, dz, C, R);
  scale_row<<<B * C, kThreads, 0, stream>>>(dy, g, dz, dx, S);
  sum_over_batch<<<blocks, kThreads, 0, stream>>>(dh, z, dw1, B, R, C);
  sum_over_batch<<<blocks, kThreads, 0, stream>>>(du, h, dw2, B, C, R);
  sum_over_batch<<<blocks, kThreads, 0, stream>>>(dh, nullptr, db1, B, R, 1);
  sum_over_batch<<<blocks, kThreads, 0, stream>>>(du, nullptr, db2, B, C, 1);
  return cudaGetLastError();
}
