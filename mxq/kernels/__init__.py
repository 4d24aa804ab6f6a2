"""Kernels that compute on packed weights: generated, checked without a GPU, fastest on Hopper."""
