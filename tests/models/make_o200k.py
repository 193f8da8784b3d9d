"""Write the tokenizer of gpt-oss, as its repositories publish it, from the ranks of o200k_base.

    python tests/models/make_o200k.py o200k_base.tiktoken tokenizer.json

The ranks say in which order byte strings were learned; a tokenizer.json says which two tokens become one. Every way to split a token
into two others is a merge, ordered by the token's rank, then by the ranks of the two: 446,189 for the 199,998 tokens. Whole words are
looked up before any merge (`ignore_merges`). The order is that of the converter in transformers (`TikTokenConverter`).
"""

import argparse
import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toyllm.models.tokenizer import byte_characters

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
OTHER = (r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
WORDS = "|".join((CASED, CAPITALS, *OTHER))
NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
SPECIAL = {i: NAMED.get(i, f"<|reserved_{i}|>") for i in range(199998, 200019)}


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each byte string, in order of rank, which is its id."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{path}: not o200k_base.tiktoken: expected SHA-256 {SHA256}")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    """Every way to split a token into two others, as their ids."""
    for token in ranks:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        yield from sorted((ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks)


def document(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The content of tokenizer.json."""
    characters = byte_characters()
    tokens = ["".join(characters[byte] for byte in token) for token in ranks]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [[tokens[left], tokens[right]] for left, right in merges(ranks)],
        },
    }


def write_tokenizer(ranks: Path, target: Path) -> None:
    """Write tokenizer.json: 13 MB, within three seconds."""
    target.write_text(json.dumps(document(read_ranks(ranks)), ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=Path, help="o200k_base.tiktoken")
    parser.add_argument("target", type=Path, help="the tokenizer.json to write")
    arguments = parser.parse_args()
    write_tokenizer(arguments.ranks, arguments.target)
