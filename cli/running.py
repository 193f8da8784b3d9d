"""A model as a command runs it: loaded with the shared options, its files read ahead where they are not in memory."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..kernels.errors import OutOfMemory
from . import output
from .changing import check_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..models.changes import Change
    from ..models.memory import Allocation
    from ..models.model import Model

LOADING = (
    "prefill_chunk",
    "cache_dtype",
    "moe",
    "tokens_per_expert_ratio",
    "threads",
    "backend",
    "exact",
    "activations",
    "attention",
    "weights",
    "poison_cache",
)


def load(name: str, running: dict[str, Any], changes: "Sequence[Change]" = ()) -> "Model":
    """The model, with the options of `options.RUNNING`; one that does not have what `changes` mean is not read."""
    from ..models.model import load as load_model
    from ..models.preload import read_ahead
    from .vanished import end_in_words

    check_names(name, changes)

    def preload(shards: "tuple[Path, ...]") -> None:
        end_in_words(name)
        if not running["no_preload"]:
            with output.byte_bar(f"reading {name}") as progress:
                read_ahead(shards, progress)

    with output.byte_bar(f"quantising {name}") as progress:
        return load_model(name, **{key: running[key] for key in LOADING}, preload=preload, progress=progress)


def settings_entry(loaded: "Model", room: int) -> dict[str, Any]:
    """How the model ran, as a JSON document's settings have it."""
    return {
        "model": loaded.files.name,
        "context": room,
        "prefill_chunk": loaded.prefill_chunk,
        "cache_dtype": loaded.cache_dtype,
        "threads": loaded.threads,
        "backend": loaded.kernels.name,
        "activations": loaded.kernels.activations,
        "exact": loaded.kernels.exact,
        "weights": loaded.kernels.weights,
        "moe": loaded.kernels.mixing.algorithm,
        "tokens_per_expert_ratio": loaded.kernels.mixing.ratio,
    }


def mixture_rows(loaded: "Model") -> list[tuple[str, str]]:
    """Which algorithms mixed the experts, and what a budget dropped; nothing for a model without."""
    mixing = loaded.kernels.mixing
    rows = [("mixture of experts", ", ".join(sorted(mixing.ran)))] if mixing.ran else []
    return [*rows, ("dropped pairs", str(mixing.dropped))] if "budget" in mixing.ran else rows


def memory_lines(pieces: "Iterable[Allocation]") -> list[str]:
    """A memory plan, or what came of it, as the lines of a table: a row a part, bytes of each kind, status."""
    from ..models.memory import KINDS, memory_rows, total

    def cell(nbytes: int | None) -> str:
        return f"{nbytes:,}" if nbytes else "-"

    pieces = tuple(pieces)
    kinds = [kind for kind in KINDS if kind != "quantised" or total(pieces, kind)]
    rows = [(part, *(cell(sizes.get(kind)) for kind in kinds), status) for part, sizes, status in memory_rows(pieces)]
    rows.append(("total", *(f"{total(pieces, kind):,}" for kind in kinds), ""))
    return output.table_lines(("memory", *kinds, "status"), rows, right=range(1, len(kinds) + 1))


def show_memory(loaded: "Model", room: int, sequences: int = 1, keep: int = 0) -> None:
    """What a run of so many positions a sequence allocated, to stderr; `keep` as in `Model.new_cache`."""
    from ..models.memory import ALLOCATED, KINDS, mark, of_model

    pieces = of_model(loaded, room, sequences, keep)
    for kind in KINDS:
        pieces = mark(pieces, kind, ALLOCATED)
    output.say("\n".join(memory_lines(pieces)))


@contextmanager
def memory_told(loaded: "Model") -> "Iterator[None]":
    """Shows the memory plan to stderr where a KV cache is refused, or fails to be allocated."""
    try:
        yield
    except OutOfMemory as error:
        from ..models.memory import FAILED, mark, of_model

        output.say("\n".join(memory_lines(mark(of_model(loaded, error.context), "cache", FAILED))))
        raise
