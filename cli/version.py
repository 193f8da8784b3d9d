"""What `toyllm --version` says."""

import platform


def describe() -> str:
    """One line: version, processor path, threads, threading layer, and what carries them."""
    import numba

    from .. import __version__
    from ..kernels.host import best_backend, processor
    from ..kernels.threads import choose_threading_layer, set_threads, threading_layer

    choose_threading_layer()
    threads = set_threads()
    return (
        f"toyllm {__version__} · {best_backend()} on {processor()} · {threads} threads by {threading_layer()} · "
        f"Numba {numba.__version__}, Python {platform.python_version()}"
    )
