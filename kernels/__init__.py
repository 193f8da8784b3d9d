"""Arithmetic on arrays: a kernel knows no model. Each module reads contract, NumPy reference, Numba kernels, validating wrapper.

The letters of all shapes, here and everywhere else:

    B  sequences            T  tokens of this pass     S  keys in position order   V  vocabulary
    D  width                H  query heads             G  key/value heads          Dh width of a head
    F  feed-forward width   E  experts                 k  experts a token          L  layers
    M, K, N  rows, inputs and outputs of a product
"""
