"""tokenizer.json, damaged: refused in a line, passed over, or a tokenizer that encodes and decodes. In a process of its own, as it may die.

    python -m tests.fuzz.tokenizers FOLDER

is that process: for each line on stdin it loads FOLDER's tokenizer.json anew, tries it, and says on stdout how it went.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import find_model
from toyllm.models.tokenizer import byte_characters, load_tokenizer

from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text

SECONDS = 20  # of the processor for one file
MEMORY = 4 << 30  # bytes of address space
TEXTS = [
    "",
    "a",
    "Once upon a time",
    "<|endoftext|>",
    "  \n\t ",
    "é👋🏽 世界",
    "\0\x1b[2J",
    "a" * 3000,
    "a" * 40 + "!",
    "ab " * 500,
    "\u0301" * 50,
    "<|x|>",
]

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
SPECIAL = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
PATTERNS = r"(a+)+$ (a|a)*b ( [ a{0,99999} (?=a) ^ $ \b (?:)* a** (\w+\s?)+: \p{X}"
REGEXES = [*PATTERNS.split(), "", "." * 3000, "(" * 300 + ")" * 300, "\0"]
MORE = """
normalizer {"type": "NFC"}
normalizer {"type": "NFKD"}
normalizer {"type": "Lowercase"}
normalizer {"type": "StripAccents"}
normalizer {"type": "Strip", "strip_left": true, "strip_right": true}
normalizer {"type": "Replace", "pattern": {"String": "a"}, "content": ""}
normalizer {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
normalizer {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aa"}
normalizer {"type": "Prepend", "prepend": "▁"}
normalizer {"type": "ByteLevel"}
normalizer {"type": "Nmt"}
normalizer {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
normalizer {"type": "Sequence", "normalizers": []}
pre_tokenizer {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}
pre_tokenizer {"type": "Split", "pattern": {"Regex": "\\\\p{L}+|\\\\s+"}, "behavior": "Isolated", "invert": false}
pre_tokenizer {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "Whitespace"}]}
pre_tokenizer {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}
pre_tokenizer {"type": "Punctuation", "behavior": "Removed"}
pre_tokenizer {"type": "UnicodeScripts"}
pre_tokenizer {"type": "FixedLength", "length": 0}
pre_tokenizer {"type": "CharDelimiterSplit", "delimiter": "a"}
pre_tokenizer null
decoder {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]}
decoder {"type": "ByteFallback"}
decoder {"type": "Metaspace", "replacement": "▁"}
decoder null
post_processor {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
post_processor {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}
post_processor {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 9}}], "pair": [], "special_tokens": {}}
post_processor {"type": "BertProcessing", "sep": ["b", 1], "cls": ["a", 2147483648]}
post_processor {"type": "RobertaProcessing", "sep": ["b", 1], "cls": ["a", 0], "trim_offsets": true, "add_prefix_space": true}
post_processor {"type": "Sequence", "processors": []}
truncation {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
truncation {"direction": "Left", "max_length": 0, "strategy": "OnlySecond", "stride": 0}
padding {"strategy": {"Fixed": 99999999999}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 1, "pad_type_id": 0, "pad_token": ""}
"""
USUAL: dict[str, Any] = {"normalizer": None, "pre_tokenizer": LEVEL, "decoder": LEVEL, "post_processor": None}
USUAL |= {"truncation": None, "padding": None}
PARTS = [(part, json.loads(text)) for part, text in (line.split(" ", 1) for line in MORE.strip().splitlines())]
OTHERS = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**32,
    2**63,
    1.5,
    1e300,
    "",
    "a",
    "Ġ",
    "世",
    "\0",
    "<|x|>",
    "WordPiece",
    "Unigram",
    [],
    {},
    [["a"]],
    ["a", "b"],
]
BEHAVIOURS = ("Isolated", "MergedWithNext", "Removed", "Contiguous")


def vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    """A byte-level vocabulary of some merges."""
    ids = {c: i for i, c in enumerate(byte_characters())}
    merges = [["a", "b"], ["Ġ", "t"], ["i", "m"], ["e", "Ġt"], ["im", "eĠt"], ["a", "a"], ["aa", "aa"]]
    for first, second in merges:
        ids[first + second] = len(ids) + 1  # 256 is the special token's
    return ids, merges


def document(rng: Random) -> dict[str, Any]:
    """A tokenizer.json, sound in most of its parts."""
    ids, merges = vocabulary()
    model = {"type": "BPE", "vocab": ids, "merges": merges, "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    made: dict[str, Any] = {"version": "1.0", "added_tokens": [{"id": 256, "content": "<|endoftext|>", **SPECIAL}], "model": model}
    made |= USUAL
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        part, other = rng.choice(PARTS)
        made[part] = other
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        damage(rng, made, model)
    return made


def damage(rng: Random, made: dict[str, Any], model: dict[str, Any]) -> None:
    """Change a part in a way that a reader might not look for, in place."""
    how, other = rng.randrange(9), rng.choice(OTHERS)
    if how == 0:
        model[rng.choice([*model])] = other
    elif how == 1 and isinstance(model["vocab"], dict):
        model["vocab"] |= {rng.choice(("a", "x" * 3000, "", "世", "Ġ", "<|endoftext|>", "\ud800")): other}
    elif how == 2:
        model["vocab"] = rng.choice(({}, {"a": 0}, {"a": 2**32 - 1}, {"a": 0, "b": 0}, {c: i for i, c in enumerate("abc")}))
    elif how == 3:
        pair = rng.choice((["a", "zz"], ["a"], ["", ""], ["a", "b", "c"], "a b", "ab", "a b c", other, ["Ġ", "Ġ"]))
        model["merges"] = [*model["merges"], pair] if isinstance(model["merges"], list) else [pair]
    elif how == 4:
        added = {
            "id": rng.choice((0, 5, 256, 300, 2**32 - 1, 10**6, -1)),
            "content": rng.choice(("", "a", "<|x|>", " ", "é", "\0", "a" * 999)),
        }
        made["added_tokens"] = [
            *(made["added_tokens"] if isinstance(made["added_tokens"], list) else ()),
            added | SPECIAL | {rng.choice([*SPECIAL]): chance(rng, 0.5)},
        ]
    elif how == 5:
        pattern = {rng.choice(("Regex", "String")): rng.choice(REGEXES)}
        made["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": rng.choice(BEHAVIOURS), "invert": chance(rng, 0.2)}
    elif how == 6:
        pattern = {rng.choice(("Regex", "String")): rng.choice(REGEXES)}
        made["normalizer"] = {"type": "Replace", "pattern": pattern, "content": rng.choice(("", "a", "aa"))}
    elif how == 7:
        made[rng.choice([*made])] = other
    else:
        affixes = {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}
        model |= rng.choice(({"dropout": 0.5}, {"dropout": 1.0}, {"unk_token": "zz"}, {"byte_fallback": True}, *affixes))


def file_bytes(rng: Random) -> bytes:
    """A tokenizer.json."""
    return json_text(rng, document(rng), most=rng.choice((0, 0, 0, 1, 2)))


# ---- the process that tries them --------------------------------------------------------------------------------------------


def attempt(folder: Path) -> str:
    """Load the folder's tokenizer and use it. Raises Find."""
    try:
        tokenizer = load_tokenizer(find_model(str(folder)))
        if tokenizer is None:
            return "passed over"
        ids = set()
        for text in TEXTS:
            for special in (True, False):
                ids |= {*tokenizer.encode(text, special)}
                tokenizer.pieces(text, special)
        for i in (*ids, 0, 255, 256, 257, 300, 2**31, 2**32 - 1, 2**32):
            tokenizer.decode([i])
        if tokenizer.vocab_size < 0 or tokenizer.id_of("<|endoftext|>") == -1:
            raise Find("a negative number of tokens")
    except ToyllmError as error:
        refused(error)
        return "refused"
    return "used"


def serve(folder: Path) -> None:
    """Answer each line on stdin with one about the file that then lies in the folder."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for _ in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = {"ended": attempt(folder)}
        except BaseException as error:  # noqa: BLE001 - a panic of a Rust library is a BaseException
            answer = {"find": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


class Attempts:
    """The process, started again where it has died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, content: bytes) -> str:
        """What became of a file. Raises Find."""
        (self.folder / "tokenizer.json").write_bytes(content)
        if self.process is None:
            command = [sys.executable, "-m", "tests.fuzz.tokenizers", str(self.folder)]
            where, quiet = Path(__file__).parents[2], subprocess.DEVNULL
            self.process = subprocess.Popen(command, cwd=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet)
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.close()
            raise Find(f"the process ended with {signal.Signals(-code).name if code < 0 else code}")
        answer = json.loads(line)
        if "find" in answer:
            raise Find(answer["find"])
        return answer["ended"]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self.process and self.process.stdin and self.process.stdout:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        self.process = None


def prepare(folder: Path) -> Trial:
    attempts = Attempts(folder)
    return lambda rng: attempts(file_bytes(rng))


LEG = Leg("tokenizer.json, damaged, in a process of its own", prepare)

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
