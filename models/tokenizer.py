"""Text to token ids and back: byte-level BPE, as GPT-2 and GPT-OSS have it, over the `tokenizers` library.

A byte-level tokenizer writes each byte as one printable character, so a token's string says exactly which bytes it stands for.
Everything that leaves this module as text is made from those bytes: decoding, the pieces of a text, and the stream of a generation
agree by construction.
"""

import codecs
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..kernels.errors import ToyllmError
from .json_files import brief, read_bytes, read_object
from .location import ModelFiles

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Library

log = logging.getLogger("toyllm")

END_OF_TEXT = "<|endoftext|>"
SENTENCE_PIECE = re.compile(rb'"type"\s*:\s*"Precompiled"')
MAX_TOKENIZER = 2**28  # bytes of a tokenizer.json or a merges.txt: ten times the largest there are
PARTS = {
    *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"),
    *("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("TemplateProcessing", "RobertaProcessing", "BertProcessing"),
}


def byte_characters() -> list[str]:
    """List the character that stands for each byte: itself where Latin-1 prints it, else the next free one from U+0100.

    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


class Piece(NamedTuple):
    """One token of a text: its id, its own text, and where it lies in the text, in bytes of UTF-8.

    A token may hold part of a character; its text then has U+FFFD there, and `start` and `end` say which bytes are meant.
    """

    id: int
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer. Safe to share between threads."""

    library: "Library"
    added: dict[int, str]  # id -> text of the tokens beside the BPE vocabulary: the special ones, and any a fine-tune added
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included. A model's embedding may have more rows."""
        return self.library.get_vocab_size()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its string in the tokenizer's file, such as "<|endoftext|>"; None where there is none."""
        return self.library.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Turn a text into ids. Raises ToyllmError for a lone surrogate, which no UTF-8 text can hold.

        With `special`, as transformers encodes: special tokens written in the text become their ids, and what the tokenizer's file puts
        around every text is put there. Without, the text is only text: `<|endoftext|>` comes out as the characters it is made of.
        """
        return self.encoding(text, special).ids

    def pieces(self, text: str, special: bool = True) -> list[Piece]:
        """Split a text into its tokens, with their places in it, in bytes of its UTF-8.

        The places are exact, inside characters too, while the tokens spell the text; a token that the tokenizer put there by itself has
        an empty one. Where a normalizer rewrote the text, the places are the library's, in whole characters, and a note says so.
        """
        encoding = self.encoding(text, special)
        own = [b"" if inserted else self.token_bytes(i) for i, inserted in zip(encoding.ids, encoding.special_tokens_mask, strict=True)]
        if b"".join(own) == text.encode():
            places: Iterable[tuple[int, int]] = pairwise(accumulate(map(len, own), initial=0))
        else:
            log.info("the tokenizer rewrote the text before encoding it: byte offsets are those of whole characters of the original")
            at = list(accumulate((len(character.encode()) for character in text), initial=0))
            places = [(at[start], at[end]) for start, end in encoding.offsets]
        return [Piece(i, self.decode([i]), start, end) for i, (start, end) in zip(encoding.ids, places, strict=True)]

    def encoding(self, text: str, special: bool) -> "Encoding":
        """Return what the library makes of a text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ToyllmError(
                f"text: expected Unicode, found a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
                "give text that is valid UTF-8"
            ) from error
        with (
            self.lock,
            refusals("the text cannot be encoded: the tokenizers library fails on the model's tokenizer"),
        ):  # the library keeps this choice as a setting of the whole tokenizer
            self.library.encode_special_tokens = not special
            return self.library.encode(text, add_special_tokens=special)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; of a special token, its text in UTF-8.

        An embedding may have rows without a token (GPT-OSS: 200019 to 201087), and a model may draw one: such an id stands for a text
        that shows it, `<|id 200500|>`.
        Raises ToyllmError for a negative id.
        """
        if token_id < 0:
            raise ToyllmError(f"token id {token_id}: ids begin at 0")
        if token_id in self.added:
            return self.added[token_id].encode()
        token = self.library.id_to_token(token_id) if token_id < 2**32 else None  # the library counts in 32 bits
        if token is None:
            return f"<|id {token_id}|>".encode()
        try:
            return bytes(BYTE_OF[character] for character in token)
        except KeyError:  # not made of byte characters: a word that someone put into the vocabulary as it is
            return token.encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text, special tokens shown. Bytes that are not UTF-8 become U+FFFD, ids without a token as `token_bytes` says."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> "Stream":
        """Start decoding ids that arrive one by one."""
        return Stream(self)


class Stream:
    """Text of ids that arrive one by one, in whole characters: what was pushed and then finished equals `decode` of all ids.

    At most three bytes wait for the rest of their character. Special tokens are shown; who does not want them does not push them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, possibly empty. Raises ToyllmError for a negative id."""
        return self.decoder.decode(self.tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what still waited: U+FFFD for a character that never became whole, else nothing. The stream then begins anew."""
        return self.decoder.decode(b"", final=True)


def load_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """Read a model's tokenizer: tokenizer.json, else vocab.json with merges.txt; None without them, and token ids alone work.

    A tokenizer that is not byte-level (WordPiece, SentencePiece), or has parts that byte-level ones do without, is passed over with a
    warning: None as well. Raises ToyllmError that names the file where one is broken.
    """
    not_ours = "%s: not byte-level, the kind of tokenizer that toyllm knows; the model works with token ids alone"
    if files.tokenizer:
        document = read_bytes(files.tokenizer, MAX_TOKENIZER)
        if SENTENCE_PIECE.search(document):  # unread: on a broken one the library writes pages to stderr
            log.warning(not_ours, files.tokenizer)
            return None
        library = parse(str(files.tokenizer), document)
    elif files.vocab and files.merges:
        library = parse(f"{files.vocab} with {files.merges.name}", json.dumps(gpt2_document(files.vocab, files.merges)).encode())
    else:
        return None
    if not is_byte_level(library):
        log.warning(not_ours, files.tokenizer)
        return None
    if strange := strange_part(library):
        log.warning("%s: has a part %s, which toyllm does not run; the model works with token ids alone", files.tokenizer, brief(strange))
        return None
    library.no_truncation()
    library.no_padding()
    return Tokenizer(library, {i: token.content for i, token in library.get_added_tokens_decoder().items()})


def parse(where: str, document: bytes) -> "Library":
    """Make the library's tokenizer from the text of a tokenizer.json. Raises ToyllmError that says where it came from."""
    from tokenizers import Tokenizer as Library

    with refusals(f"{where}: not a tokenizer that can be read"):
        return Library.from_buffer(document)


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn what the library raises into one line. Its own code is Rust, whose panics are no `Exception`. Raises ToyllmError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = brief(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: "))[1:-1]
        raise ToyllmError(f"{what} ({reason}); download it again") from error


def strange_part(library: "Library") -> str:
    """The first part of a tokenizer, by its type, that is not among those known to be harmless; "" if all are.

    A normalizer that replaces text can make gigabytes of a line; the library fails on parts that lack what they name.
    """
    for part in (library.normalizer, library.pre_tokenizer, library.post_processor):
        for kind in part_types(json.loads(part.__getstate__())) if part else ():
            if kind not in PARTS:
                return kind
    return ""


def part_types(part: Any) -> Iterator[str]:
    """The types of a part and of all parts in it; a template that names a special token it does not define is of a type of its own."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        if part.get("type") == "TemplateProcessing":
            pieces = [piece["SpecialToken"]["id"] for piece in (*part["single"], *part["pair"]) if "SpecialToken" in piece]
            yield from (f"TemplateProcessing without its {name}" for name in pieces if name not in part["special_tokens"])
    if isinstance(part, (dict, list)):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from part_types(inner)


def gpt2_document(vocab: Path, merges: Path) -> dict[str, Any]:
    """Write GPT-2's two older files as a tokenizer.json: their vocabulary and merges, with GPT-2's own splitting into words."""
    ids = read_object(vocab)
    special = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[END_OF_TEXT], "content": END_OF_TEXT, **special}] if END_OF_TEXT in ids else [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": list(merge_lines(merges))},
    }


def merge_lines(path: Path) -> Iterator[str]:
    """Read the merges of a merges.txt, first to last, each two tokens with a space between. Raises ToyllmError."""
    try:
        text = read_bytes(path, MAX_TOKENIZER).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToyllmError(f"{path}: not UTF-8 at byte {error.start}; download it again") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#version"):  # the first line
            continue
        if line.count(" ") != 1:
            raise ToyllmError(f"{path}: line {number}: expected two tokens with a space between, found {line[:80]!r}; download it again")
        yield line


def is_byte_level(library: "Library") -> bool:
    """Tell whether tokens are written in byte characters: by the decoder, alone or as one of several."""
    decoder = library.decoder
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
