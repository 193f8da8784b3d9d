"""A model as a command runs it: loaded with the shared options, its files read ahead where they are not in memory."""

from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from ..models.model import Model

LOADING = ("prefill_chunk", "cache_dtype", "moe", "tokens_per_expert_ratio", "threads", "backend", "exact", "poison_cache")


def load(name: str, running: dict[str, Any]) -> "Model":
    """The model, with the options of `options.RUNNING`."""
    from ..models.model import load as load_model
    from ..models.preload import read_ahead

    loaded = load_model(name, **{key: running[key] for key in LOADING})
    if not running["no_preload"]:
        with output.byte_bar(f"reading {name}") as progress:
            read_ahead(loaded.checkpoint.shards, progress)
    return loaded


def settings_entry(loaded: "Model", room: int) -> dict[str, Any]:
    """How the model ran, as a JSON document's settings have it."""
    return {
        "model": loaded.files.name,
        "context": room,
        "prefill_chunk": loaded.prefill_chunk,
        "cache_dtype": loaded.cache_dtype,
        "threads": loaded.threads,
        "backend": loaded.kernels.name,
        "moe": loaded.kernels.mixing.algorithm,
        "tokens_per_expert_ratio": loaded.kernels.mixing.ratio,
    }


def mixture_rows(loaded: "Model") -> list[tuple[str, str]]:
    """Which algorithms mixed the experts, and what a budget dropped; nothing for a model without."""
    mixing = loaded.kernels.mixing
    rows = [("mixture of experts", ", ".join(sorted(mixing.ran)))] if mixing.ran else []
    return [*rows, ("dropped pairs", str(mixing.dropped))] if "budget" in mixing.ran else rows
