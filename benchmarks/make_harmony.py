"""Write a small random checkpoint of gpt-oss that speaks harmony, the chat format: for trying chat, where what it says does not matter.

    python benchmarks/make_harmony.py OUT [--ranks o200k_base.tiktoken] [--layers N]

OUT becomes a folder with config.json, generation_config.json, model.safetensors and tokenizer.json. With the ranks of o200k_base (which
OpenAI publishes at openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken) the tokenizer and the 201,088 rows of the embedding
are gpt-oss's: 65 MB. Without them a token is a byte, the special tokens follow, and three ids have none: 190 kB.

Layers slide and see everything in turn, experts are in MXFP4, values are drawn as make_gpt_oss.py draws them. The same command writes
the same bytes.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from make_gpt_oss import GENERATION, Tensors, config_of, write_file

from toyllm.models.config import read_config
from toyllm.models.gpt_oss import Config, normalise, specs

MAKE_O200K = Path(__file__).parents[1] / "tests" / "models" / "make_o200k.py"
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"num_experts_per_tok": 2, "experts_per_token": 2, "sliding_window": 16, "max_position_embeddings": 4096}
E = 4  # experts a layer
WITHOUT_TOKEN = 3  # rows of the embedding behind the last token, as gpt-oss has them, too


def tokenizer_of(ranks: Path | None) -> dict[str, Any]:
    """tokenizer.json: gpt-oss's, or one of bytes, with the same special tokens behind them."""
    o200k = runpy.run_path(str(MAKE_O200K))
    if ranks:
        return o200k["document"](o200k["read_ranks"](ranks))
    document = o200k["document"]({bytes([i]): i for i in range(256)})
    document["added_tokens"] = [token | {"id": 256 + i} for i, token in enumerate(document["added_tokens"])]
    return document


def generation_of(ids: dict[str, int]) -> dict[str, Any]:
    """generation_config.json as published, with the tokenizer's own ids."""
    begin, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    return GENERATION | {"bos_token_id": begin, "eos_token_id": [ids["<|return|>"], end, ids["<|call|>"]], "pad_token_id": end}


def tensors_of(config: dict[str, Any], where: Path) -> Tensors:
    """Every tensor under its published name."""
    shapes = {spec.name: spec.shape for spec in specs(read_config(Config, normalise(config), where)).values()}
    return {
        name if name.startswith("lm_head") else f"model.{name}": ("U8" if name.endswith(("blocks", "scales")) else "BF16", shape)
        for name, shape in shapes.items()
    }


def write_checkpoint(folder: Path, L: int = 2, ranks: Path | None = None) -> None:
    """Write the folder's files. Raises FileExistsError where there are weights already."""
    tokenizer = tokenizer_of(ranks)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    rows = {"vocab_size": 201_088 if ranks else 256 + len(ids) + WITHOUT_TOKEN}
    config = config_of(L, E) | SMALL | rows | {"eos_token_id": ids["<|return|>"], "pad_token_id": ids["<|endoftext|>"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", tensors_of(config, folder), seed=0, sparse=False)
    for name, document in (("config", config), ("generation_config", generation_of(ids)), ("tokenizer", tokenizer)):
        (folder / f"{name}.json").write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--ranks", type=Path, metavar="FILE", help="o200k_base.tiktoken")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    options = parser.parse_args()
    if options.layers < 1:
        parser.error(f"--layers: expected at least 1, found {options.layers}")
    try:
        write_checkpoint(options.out, options.layers, options.ranks)
    except FileExistsError as error:
        sys.exit(f"error: {error.filename} exists; name another folder")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    print(f"{options.out}: try toyllm chat -m {options.out} --max-tokens 60")


if __name__ == "__main__":
    main()
