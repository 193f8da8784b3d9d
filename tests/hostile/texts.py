"""Bad tokenizers, prompts and settings: what a stranger's tokenizer.json could do, and what a person could ask for."""

import shutil
from pathlib import Path
from typing import Any

from toyllm.models.location import EMBEDDED
from toyllm.models.tokenizer import byte_characters

from .making import Case, Command, Make, generate, gpt2, runs, with_config, with_file

# ---- tokenizer.json ---------------------------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
CHARACTERS = [*byte_characters()[32:127], byte_characters()[0]]
VOCAB = {character: i for i, character in enumerate(CHARACTERS)}  # a token for each character of ASCII, 0 to 94, and for NUL
SPECIAL = {
    "id": 96,
    "content": "<|endoftext|>",
    "special": True,
    "normalized": False,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
}


def tokenizer(**changes: Any) -> dict[str, Any]:
    """A sound tokenizer.json of 96 tokens, but for the changes; those of "model" are made in it."""
    model = {"type": "BPE", "vocab": VOCAB, "merges": []} | changes.pop("model", {})
    document = {"version": "1.0", "added_tokens": [SPECIAL], "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
    return document | {"model": model} | changes


def template(**tokens: Any) -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens}


def split(pattern: str) -> dict[str, Any]:
    parts = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]
    return {"type": "Sequence", "pretokenizers": parts}


def with_tokenizer(document: object = None, base: Make = gpt2) -> Make:
    return with_file("tokenizer.json", tokenizer() if document is None else document, base)


def tokenize(says: str, text: str = "A fox", code: int = 1, *more: str) -> Command:
    return Command(("tokenize", text, "-m", "{}", *more), code, says)


UNREAD = "tokenizer.json: not a tokenizer that can be read"
DOUBLING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "f"}, "content": "ff"}] * 60}
TOKENIZERS: dict[str, tuple[object, str]] = {
    "empty": (b"", UNREAD),
    "not JSON": (b"{nonsense", UNREAD),
    "not UTF-8": (b'{"version":"\xff"}', UNREAD),
    "an array": ([], UNREAD),
    "100,000 nested brackets": (b"[" * 100_000, UNREAD),
    "no model": ({"version": "1.0", "decoder": BYTE_LEVEL}, UNREAD),
    "another version": (tokenizer(version="9.0\x1b[2J"), UNREAD),
    "vocabulary a list": (tokenizer(model={"vocab": [1]}), UNREAD),
    "negative id": (tokenizer(model={"vocab": {"a": -1}}), UNREAD),
    "id of 2^33": (tokenizer(model={"vocab": {"a": 2**33}}), UNREAD),
    "merges of unknown tokens": (tokenizer(model={"merges": ["q \x1b[31mzzz"]}), UNREAD),
    "a merge of one": (tokenizer(model={"merges": ["abc"]}), UNREAD),
    "dropout of 2": (tokenizer(model={"dropout": 2}), UNREAD),
    "a pattern that is none": (tokenizer(pre_tokenizer=split("(")), UNREAD),
    "an unknown token that is missing": (tokenizer(model={"unk_token": "zz", "vocab": {"A": 0}}), "library fail"),
    "WordLevel without its unknown": (tokenizer(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}), "library fail"),
    "Unigram without words": (tokenizer(model={"type": "Unigram", "vocab": [], "unk_id": None}), f"library fail|{UNREAD}"),
}
PASSED_OVER: dict[str, object] = {
    "text doubled 60 times": tokenizer(normalizer=DOUBLING),
    "nothing replaced by something": tokenizer(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
    "nothing put before": tokenizer(normalizer={"type": "Prepend", "prepend": ""}),
    "a broken character map": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "pieces of length 0": tokenizer(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}, BYTE_LEVEL]}
    ),
    "a template without its tokens": tokenizer(post_processor=template()),
    "WordPiece": tokenizer(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
}
SOUND: dict[str, object] = {
    "an empty special token": tokenizer(added_tokens=[SPECIAL | {"content": ""}]),
    "a special token twice": tokenizer(added_tokens=[SPECIAL, SPECIAL]),
    "truncated to nothing": tokenizer(truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"}),
    "padded to 10^12": tokenizer(
        padding={
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ),
    "a cache of 2^60": tokenizer(model={"cache_capacity": 2**60}),
}
TEXTS = [
    Case("tokenizer", name, with_tokenizer(document), (tokenize(says), generate(says, "A fox", ids="")))
    for name, (document, says) in TOKENIZERS.items()
]
TEXTS += [
    Case(
        "tokenizer",
        name,
        with_tokenizer(document),
        (tokenize("no byte-level tokenizer"), runs("works with token ids alone"), generate("no tokenizer", "A", ids="")),
    )
    for name, document in PASSED_OVER.items()
]
TEXTS += [
    Case("tokenizer", name, with_tokenizer(document), (tokenize("endoftext|fox|x", code=0), runs("", "A fox", ids="")))
    for name, document in SOUND.items()
]


def older_files(vocab: object, merges: bytes) -> Make:
    return with_file("merges.txt", merges, with_file("vocab.json", vocab))


def without_weights(folder: Path) -> None:
    with_tokenizer()(folder)
    (folder / "model.safetensors").unlink()


TEXTS += [
    Case("tokenizer", "a key twice in vocab.json", older_files(b'{"a":0,"a":1}', b""), (tokenize("the name 'a' occurs twice"),)),
    Case("tokenizer", "ids in vocab.json as text", older_files({"a": "b"}, b""), (tokenize("not a tokenizer that can be read"),)),
    Case("tokenizer", "merges not UTF-8", older_files(VOCAB, b"a \xff"), (tokenize("merges.txt: not UTF-8 at byte 2"),)),
    Case(
        "tokenizer",
        "a merge of three",
        older_files(VOCAB, b"#version: 0.2\na b \x1b[2J"),
        (tokenize("merges.txt: line 2: expected two tokens"),),
    ),
    Case("tokenizer", "merges of unknown tokens", older_files(VOCAB, b"zz \xc3\xa9"), (tokenize("not a tokenizer that can be read"),)),
    Case(
        "tokenizer", "without weights", without_weights, (tokenize("fox|x", code=0), generate("no safetensors|neither model", "A", ids=""))
    ),
    Case(
        "tokenizer",
        "more tokens than the embedding has rows",
        with_tokenizer(tokenizer(model={"vocab": VOCAB | {"x": 97}})),
        (generate(r"token id 97 \(number 5 of 5\): expected 0 to 96", "A fox", ids=""), tokenize("97", code=0)),
    ),
    Case(
        "tokenizer",
        "an id of 2^32 - 1",
        with_tokenizer(tokenizer(model={"vocab": VOCAB | {"x": 2**32 - 1}})),
        (generate("token id 4294967295", "A fox", ids=""), tokenize("4294967295", code=0)),
    ),
    Case(
        "tokenizer",
        "fewer tokens than the embedding has rows",
        with_tokenizer(tokenizer(model={"vocab": {"A": 0}}, added_tokens=[])),
        (runs(r"<\|id \d+\|>", "A", ids=""), tokenize("0", "A", 0)),
    ),
]

# ---- prompts ----------------------------------------------------------------------------------------------------------------


def with_tales(folder: Path) -> None:
    """The tokenizer of the embedded model, which knows every byte."""
    gpt2(folder)
    shutil.copy(EMBEDDED / "tales-gpt2" / "tokenizer.json", folder)


def text(name: str, *commands: Command, make: Make | None = None) -> Case:
    return Case("tokens", name, make or with_tokenizer(), commands)


def ids(name: str, given: str, says: str, code: int = 1, make: Make = gpt2) -> Case:
    return Case("tokens", name, make, (generate(says, ids=given, code=code),))


USAGE = "Invalid value for .*--prompt-ids"
EXACTLY, ONE_MORE = " ".join(["1"] * 64), " ".join(["1"] * 65)
TEXTS += [
    text("empty prompt", generate("the prompt is empty, and this model has no beginning-of-text token", "", ids="")),
    text("empty prompt, a beginning in config.json", runs("", "", ids=""), make=with_config(with_tokenizer(), bos_token_id=5)),
    text(
        "empty prompt, a beginning in generation_config.json",
        runs("", "", ids=""),
        make=with_file("generation_config.json", {"bos_token_id": 5}, with_tokenizer()),
    ),
    text(
        "empty prompt, a beginning beyond the vocabulary",
        generate("token id 97", "", ids=""),
        make=with_config(with_tokenizer(), bos_token_id=97),
    ),
    text(
        "lone surrogates", generate(r"lone surrogate \(U\+D800\) at character 1", "a\ud800", ids=""), tokenize("lone surrogate", "\udfff")
    ),
    text("NUL", runs("", "a\0b", ids=""), tokenize("x00", "\0", 0)),
    text("escape sequences", tokenize(r"x1b", "\x1b[2J\x1b]52;c;AA\x07", 0), make=with_tales),
    text("a split emoji", tokenize(r"b'\\xf0", "\U0001f600", 0), make=with_tales),
    text(
        "text that looks like special tokens",
        tokenize("96", "<|endoftext|>", 0, "--ids"),
        tokenize("28 92 69|27 91 68", "<|endoftext|>", 0, "--ids", "--no-special"),
    ),
    text("no tokenizer", generate("no tokenizer beside the weights; give ids with --prompt-ids", "A", ids=""), make=gpt2),
    text("far too long", generate("tokens and the context 64", "x " * 20_000, ids="")),
    ids("exactly the context", EXACTLY, "^$", 0),
    ids("the context and one more", ONE_MORE, "the prompt has 65 tokens and the context 64"),
    ids("negative", "1 -2", USAGE, 2),
    ids("beyond the vocabulary", "1 97", r"token id 97 \(number 2 of 2\): expected 0 to 96"),
    ids("of 18 digits", "9" * 18, "token id 999999999999999999"),
    ids("of 19 digits", "9" * 19, USAGE, 2),
    ids("of a million digits", "9" * 1_000_000, USAGE, 2),
    ids("fractions", "1.5", USAGE, 2),
    ids("words", "one\x1b[2J", USAGE, 2),
    ids("full-width digits", "\uff11", USAGE, 2),
    ids("none", " ", USAGE, 2),
    Case(
        "tokens",
        "detokenized beyond everything",
        with_tokenizer(),
        (Command(("detokenize", "4294967296", "-m", "{}"), 1, "token id 4294967296: .* has ids 0 to 96"),),
    ),
]


# ---- settings ---------------------------------------------------------------------------------------------------------------


def setting(name: str, *options: str, says: str = "", code: int = 1, make: Make = gpt2) -> Case:
    return Case("sampling", name, make, (generate(says, "--max-tokens", "3", *options, code=code),))


DRAWN = ("--seed", "1", "--temperature", "1")
TEXTS += [
    setting("temperature negative", "--temperature", "-1", says="--temperature: expected a finite number from 0"),
    setting("temperature NaN", "--temperature", "nan", says="--temperature: expected a finite number"),
    setting("temperature infinite", "--temperature", "inf", says="--temperature: expected a finite number"),
    setting("temperature of 1e-300", "--temperature", "1e-300", "--seed", "1", code=0),
    setting("temperature of 1e300", "--temperature", "1e300", "--seed", "1", code=0),
    setting("temperature as text", "--temperature", "hot\x1b[2J", says="not a valid float", code=2),
    setting("top-k over V", "--top-k", "98", *DRAWN, code=0),
    setting("top-k of 2^31", "--top-k", str(2**31), says="--top-k: expected 0"),
    setting("top-k negative", "--top-k", "-1", says="--top-k: expected 0"),
    setting("top-p of 0", "--top-p", "0", *DRAWN, code=0),
    setting("top-p of 1", "--top-p", "1", *DRAWN, code=0),
    setting("top-p of 1.1", "--top-p", "1.1", says="--top-p: expected 0 to 1"),
    setting("top-p NaN", "--top-p", "nan", says="--top-p: expected 0 to 1"),
    setting("min-p NaN", "--min-p", "nan", says="--min-p: expected 0 to 1"),
    setting("repetition penalty of 0", "--repetition-penalty", "0", says="--repetition-penalty: expected 1e-9 to 1e9"),
    setting("penalties at their ends", "--repetition-penalty", "1e-9", "--presence-penalty", "-1e9", "--frequency-penalty", "1e9", code=0),
    setting("presence penalty infinite", "--presence-penalty", "inf", says="--presence-penalty: expected -1e9 to 1e9"),
    setting("seed negative", "--seed", "-1", says="--seed: expected 0"),
    setting("seed of 2^63", "--seed", str(2**63), says="--seed: expected 0"),
    setting("no tokens", "--max-tokens", "0", code=0),
    setting("tokens negative", "--max-tokens", "-1", says="--max-tokens: expected 0 or more"),
    setting("tokens without end", "--max-tokens", str(10**30), "--temperature", "0", code=0),
    setting("logprobs over V", "--logprobs", "1000", "--temperature", "0", code=0),
    setting("logprobs negative", "--logprobs", "-1", says="--logprobs: expected 0 or more"),
    setting("an empty stop", "--stop", "", says="--stop: expected texts of at least one character"),
    setting("a stop without a tokenizer", "--stop", "x", says="--stop: this model has no tokenizer"),
    setting("context of 0", "--context", "0", says="--context 0: expected 1 to 64"),
    setting("context beyond the model's", "--context", "65", says="--context 65: expected 1 to 64"),
    setting("context shorter than the prompt", "--context", "2", says="the prompt has 3 tokens and the context 2"),
    setting("prefill-chunk of 0", "--prefill-chunk", "0", says="--prefill-chunk 0: expected at least 1"),
    setting("prefill-chunk of 10^9", "--prefill-chunk", str(10**9), "--temperature", "0", code=0),
    setting("threads of 0", "--threads", "0", says="--threads"),
    setting("threads of 10^9", "--threads", str(10**9), says="--threads"),
    setting("an unknown backend", "--backend", "cuda\x1b[2J", says="backend"),
    setting("an unknown cache", "--cache-dtype", "f8\x1b", says="--cache-dtype"),
]
