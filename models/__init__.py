"""Checkpoints, tokenizers, caches, the models themselves, sampling and generation. A model knows no terminal."""


def __getattr__(name: str):
    # NumPy and Numba are imported when a model is loaded, not by those who only look for one.
    if name in ("Model", "load"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
