"""Token ids to text: what comes out in pieces is the decoding of the whole, whatever bytes the tokens hold."""

import json
from pathlib import Path
from random import Random

from toyllm.models.location import find_model
from toyllm.models.tokenizer import Tokenizer, byte_characters, load_tokenizer, parse

from .leg import Find, Leg, Trial
from .mutate import chance

ALPHABET = [
    "a",
    " ",
    "é",
    "ß",
    "\u0301",
    "☃",
    "\ufe0f",
    "世",
    "👋",
    "🏽",
    "👩\u200d🚀",
    "🇸🇪",
    "\ufffd",
    "\ufeff",
    "\0",
    "\x1b[2J",
    "\n",
    "<|endoftext|>",
    "<|",
    "𝔘",
]
TELLING = b"a\x7f\x80\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe2\xed\xef\xf0\xf4\xf5\xff"  # they begin, continue and break characters
WHERE = ("<|message|>", "<|channel|>", "<|return|>", "<|end|>", "<|start|>")


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, ids 0 to 255; then special tokens, one of which no byte character spells."""
    ids = {c: i for i, c in enumerate(byte_characters())}
    special = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": 256 + i, "content": content, **special} for i, content in enumerate(("<|endoftext|>", *WHERE, "<|Ünde 👋|>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {"type": "BPE", "vocab": ids | {"世界": 300}, "merges": []}
    document = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    library = parse("bytes", json.dumps(document).encode())
    return Tokenizer(library, {i: token.content for i, token in library.get_added_tokens_decoder().items()})


def some_bytes(rng: Random) -> bytes:
    """Bytes of text, whole or cut, or of no text."""
    made = b""
    for _ in range(rng.randint(0, 8)):
        piece = rng.choice(ALPHABET).encode()
        made += rng.choice(
            (piece, piece, piece[: rng.randint(0, len(piece))], piece[rng.randint(0, len(piece)) :], bytes([rng.choice(TELLING)]))
        )
    return made + (rng.randbytes(rng.randint(0, 6)) if chance(rng, 0.3) else b"")


def some_ids(rng: Random, tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens, in an order that a model might draw them in, and of none."""
    size = tokenizer.vocab_size
    ids = tokenizer.encode("".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 6))), special=chance(rng, 0.5))
    for _ in range(rng.randint(0, 6)):
        new = rng.choice((rng.randrange(size), rng.randrange(size), size + rng.randrange(9), 2**31, 2**32, 10**30, 0))
        ids.insert(rng.randint(0, len(ids)), new)
    if chance(rng, 0.3):
        del ids[: rng.randint(0, len(ids))]
    return ids


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What a generation shows. Raises Find where more waits than the beginning of one character."""
    stream, shown, held = tokenizer.stream(), "", b""
    for i in ids:
        held += tokenizer.token_bytes(i)
        shown += stream.push(i)
        whole = held.decode("utf-8", "replace")
        if not (held + b"\x80").decode("utf-8", "replace").startswith(shown) and not whole.startswith(shown):
            raise Find(f"{shown!r} was shown before it was certain, of {held!r}")
        if len(whole) - len(shown) > 3:
            raise Find(f"{shown!r} was shown of {whole!r}: more waits than three bytes")
    return shown + stream.finish()


def check_stream(rng: Random, raw: Tokenizer, tales: Tokenizer) -> str:
    """Random bytes, ids or text through a stream, against one decoding of all, ours and the library's. Raises Find."""
    how = rng.randrange(3)
    if how == 0:
        data = some_bytes(rng)
        if (shown := streamed(raw, [*data])) != data.decode("utf-8", "replace"):
            raise Find(f"{data!r} came out as {shown!r}")
        return "bytes"
    tokenizer = rng.choice((raw, tales))
    if how == 1:
        ids = some_ids(rng, tokenizer)
        shown, whole = streamed(tokenizer, ids), tokenizer.decode(ids)
        if shown != whole:
            raise Find(f"{ids} came out as {shown!r}, decoded whole they are {whole!r}")
        known = [i for i in ids if i < 256 or (tokenizer is tales and i < tales.vocab_size)]
        if tokenizer.decode(known) != (theirs := tokenizer.library.decode(known, skip_special_tokens=False)):
            raise Find(f"{known}: {tokenizer.decode(known)!r}, the library's is {theirs!r}")
        return "ids"
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 9)))
    special = chance(rng, 0.5)
    if streamed(tokenizer, tokenizer.encode(text, special)) != text:
        raise Find(f"{text!r} did not survive")
    if b"".join(text.encode()[p.start : p.end] for p in tokenizer.pieces(text, special)) != text.encode():
        raise Find(f"{text!r}: its pieces do not tile it")
    return "text"


def prepare(folder: Path) -> Trial:
    raw, tales = byte_tokenizer(), load_tokenizer(find_model("tales-gpt2"))
    assert tales is not None
    return lambda rng: check_stream(rng, raw, tales)


LEG = Leg("streams of tokens: bytes, ids and text, whole and broken", prepare)
