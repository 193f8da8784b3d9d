"""MXFP4 for the recipe: the nearest values, their codes, and back. NumPy alone; nothing here is in the path of inference.

A block is 32 consecutive f32 values x of the last axis. It becomes one scale byte s, read as 2^(s - 127), and 32 codes of four bits:

    x ≈ sign · [0, ½, 1, 1½, 2, 3, 4, 6][code & 7] · 2^(s - 127)        sign: bit 3 of the code

The scale is the smallest power of two with which the largest |x| of the block does not exceed 6, so nothing saturates. Each value takes
the nearest code, ties the even one, as the OCP Microscaling specification v1.0 rounds. A zero is always code 0, never the negative zero.

Byte j of a block's 16 holds element 2j in its low half and element 2j + 1 in its high half.
"""

import numpy as np

from ...kernels.errors import ToyllmError

BLOCK = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
SMALLEST_EXPONENT = -126  # 2^-127 is subnormal in f32, and readers that shift the byte into an exponent lose it


def encode(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [..., n] → blocks u8 [..., n/32, 16] and scales u8 [..., n/32]. ToyllmError unless n is a multiple of 32 and all is finite."""
    if weights.shape[-1] % BLOCK:
        raise ToyllmError(f"MXFP4 needs a last axis that is a multiple of {BLOCK}, found shape {list(weights.shape)}")
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ToyllmError("MXFP4 holds finite values only, found NaN or infinity: did the training diverge?")
    exponents = scale_exponents(largest)
    scaled = blocks * np.ldexp(np.float32(1), -exponents)[..., None]
    magnitude = np.abs(scaled)
    # Codes step by ½ below 2, by 1 below 4 and by 2 from there on; rint sends ties to the even code.
    step_half, step_one, step_two = np.rint(2 * magnitude), np.rint(magnitude) + 2, np.rint(magnitude / 2) + 4
    codes = np.where(magnitude < 2, step_half, np.where(magnitude < 4, step_one, step_two)).astype(np.uint8)
    codes |= ((scaled < 0) & (codes > 0)).astype(np.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def scale_exponents(largest: np.ndarray) -> np.ndarray:
    """For the largest magnitude of each block (f32), the smallest integer e ≥ -126 with largest ≤ 6 · 2^e."""
    mantissa, exponent = np.frexp(largest)  # largest = mantissa · 2^exponent with ½ ≤ mantissa < 1, and 6 = ¾ · 2^3
    exponents = exponent - np.where(mantissa <= 0.75, 3, 2)
    return np.where(largest > 0, np.maximum(exponents, SMALLEST_EXPONENT), SMALLEST_EXPONENT)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks u8 [..., n/32, 16] and scales u8 [..., n/32] → f32 [..., n], exactly."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = VALUES[codes] * np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def nearest(weights: np.ndarray) -> np.ndarray:
    """f32 [..., n] → the nearest values that MXFP4 can hold, f32 of the same shape."""
    return decode(*encode(weights))
