"""toyllm: run GPT-2 and GPT-OSS checkpoints in pure Python, and see everything inside them.

>>> import toyllm
>>> model = toyllm.load("tales-gpt2")
>>> model.logits([464, 329]).shape  # float32 [T, V]
(2, 4096)
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Numba is imported only when a model is really loaded: `import toyllm` and `toyllm --help` stay light.
    if name == "load":
        from .models import load

        return load
    raise AttributeError(f"module 'toyllm' has no attribute {name!r}")
