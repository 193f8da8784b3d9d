"""A single token's experts in MXFP4, activations held in 16 bits: `moe.single` with the tiles of `split`."""

from typing import cast

import numba
import numpy as np
from numba import prange

from .jit import kernel
from .moe import Experts, Mxfp4, Scratch, swiglu
from .split import RECORD, ROWS, STEP, one_rows, split_rows


@kernel(parallel=True)
def _up(record, lift, blocks, scales, bias, experts, limit, alpha, h, z):
    """h f32 [k, 2F] and z f32 [k, F] for the chosen experts, of one row of x."""
    _, N, n, _ = blocks.shape
    groups = N // ROWS
    w_at, s_at, x_at, lift_at, h_at = blocks.ctypes.data, scales.ctypes.data, record.ctypes.data, lift.ctypes.data, h.ctypes.data
    for task in prange(len(experts) * groups):
        i, first = task // groups, task % groups * ROWS
        row = experts[i] * N + first
        one_rows(w_at + row * n * 16, n * 16, s_at + row * n, n, x_at, 0, lift_at, n, h_at + (i * N + first) * 4, 0)
        for j in range(first, first + ROWS, 2):
            h[i, j] += bias[experts[i], j]
            h[i, j + 1] += bias[experts[i], j + 1]
            z[i, j // 2] = swiglu(h[i, j], h[i, j + 1], limit, alpha)


@kernel(parallel=True)
def _down(records, lift, blocks, scales, bias, experts, weights, out, panels):
    """out f32 [1, D]: each row of down of every chosen expert, weighed and summed; D is a multiple of BLOCK, and so of ROWS."""
    _, N, n, _ = blocks.shape
    w_at, s_at, x_at, lift_at = blocks.ctypes.data, scales.ctypes.data, records.ctypes.data, lift.ctypes.data
    size = (n + STEP - 1) // STEP * RECORD
    for task in prange(N // ROWS):
        y = panels[numba.get_thread_id()]
        first = task * ROWS
        for j in range(first, first + ROWS):
            out[0, j] = 0
        for i in range(len(experts)):
            row = experts[i] * N + first
            one_rows(w_at + row * n * 16, n * 16, s_at + row * n, n, x_at + i * size, 0, lift_at + 4 * i, n, y.ctypes.data, 0)
            for j in range(ROWS):
                y[j] += bias[experts[i], first + j]
                out[0, first + j] += weights[i] * y[j]


def single_split(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, w: Experts, scratch: Scratch, out: np.ndarray) -> None:
    """As `moe.single`, with activations in 16 bits; of the scratch it does not need halves. Unchecked."""
    h, z, _, panels = scratch
    order = experts.argsort()
    experts, weights = experts[order], weights[order]
    up, down = cast("Mxfp4", w.gate_up), cast("Mxfp4", w.down)
    _up(*split_rows(x), up.blocks, up.scales, w.gate_up_bias, experts, np.float32(w.limit), np.float32(w.alpha), h, z)
    _down(*split_rows(z), down.blocks, down.scales, w.down_bias, experts, weights, out, panels)
