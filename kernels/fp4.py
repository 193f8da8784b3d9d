"""MXFP4 as a format: its tables, and the values that its bytes stand for, in NumPy alone, for those who only look at weights.

    W[..., 32 b + 2 i]     = CODES[blocks[..., b, i] & 15] · 2^(scales[..., b] − 127)
    W[..., 32 b + 2 i + 1] = CODES[blocks[..., b, i] >> 4] · 2^(scales[..., b] − 127)

Source: OCP Microscaling Formats (MX) v1.0, E2M1 elements and an E8M0 scale. `kernels.mxfp4` computes with it.
"""

import numpy as np

BLOCK = 32  # values that share a scale
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1
SCALES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))  # E8M0: 2^(s − 127), 255 is NaN
PAIRS = np.stack([np.tile(CODES, 16), np.repeat(CODES, 16)], axis=-1)  # byte -> its two values


def dequantize_reference(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """f32 [..., 32 n] of blocks u8 [..., n, 16] and scales u8 [..., n]. What f32 cannot hold, at scales 253 and 254, is infinite."""
    pairs = PAIRS.view(np.uint64).ravel().take(blocks)  # two values a byte, moved as one
    values = pairs.view(np.float32)
    with np.errstate(over="ignore"):
        values *= SCALES[scales][..., None]
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)
