"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with YaRN's frequencies (Peng et al. 2023, arXiv:2309.00071).

A pair (a, b) of a head at position p turns by the angle p · f:  (a cos − b sin, b cos + a sin). Pairs are (i, i + Dh/2), the
half split, or (2 i, 2 i + 1), interleaved. x f32 [T, H, Dh], turned in place; cos, sin f32 [T, Dh/2], which may carry a factor.
"""

import math

import numpy as np

from .checks import check_array
from .errors import ToyllmError
from .jit import kernel


def yarn_frequencies(
    Dh: int, base: float, factor: float, original_context: int, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = False
) -> tuple[np.ndarray, float]:
    """Frequencies f64 [Dh/2] of YaRN and the factor on cos and sin, 0.1 · ln(factor) + 1.

    Pairs that turn more than `beta_fast` times within the original context keep their frequency, those that turn less than `beta_slow`
    times are slowed by `factor`, a ramp lies between. `truncate` rounds the ramp's ends to whole pairs; gpt-oss does not.
    """
    half = Dh / 2
    frequencies = base ** (-np.arange(0, Dh, 2) / Dh)
    low, high = (half * (math.log(original_context / (2 * math.pi)) - math.log(beta)) / math.log(base) for beta in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, Dh - 1)
    ramp = np.clip((np.arange(Dh // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotations(positions: np.ndarray, frequencies: np.ndarray, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin f32 [T, Dh/2] of each position's angles, times `factor`; the angles are formed in f32, as the references do."""
    angles = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def rotate_reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> None:
    """The formula in NumPy, in place."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    c, s = cos[:, None], sin[:, None]
    a[...], b[...] = a * c - b * s, b * c + a * s


@kernel
def _rotate(x, cos, sin, interleaved):
    T, H, Dh = x.shape
    half = Dh // 2
    for t in range(T):
        for h in range(H):
            if interleaved:
                for i in range(half):
                    a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                    x[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
                    x[t, h, 2 * i + 1] = b * cos[t, i] + a * sin[t, i]
            else:
                for i in range(half):
                    a, b = x[t, h, i], x[t, h, i + half]
                    x[t, h, i] = a * cos[t, i] - b * sin[t, i]
                    x[t, h, i + half] = b * cos[t, i] + a * sin[t, i]


def rotate_kernel(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> None:
    """The kernel, unchecked."""
    _rotate(x, cos, sin, interleaved)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool = False) -> np.ndarray:
    """x f32 [T, H, Dh] turned by cos and sin f32 [T, Dh/2]: a new f32 [T, H, Dh]. Raises ToyllmError on other arrays and an odd Dh."""
    T, _, Dh = check_array("x", x, (None, None, None))
    if Dh % 2:
        raise ToyllmError(f"x: expected an even head size, found {Dh}")
    check_array("cos", cos, (T, Dh // 2))
    check_array("sin", sin, (T, Dh // 2))
    out = x.copy()
    rotate_kernel(out, cos, sin, interleaved)
    return out
