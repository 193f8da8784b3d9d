"""The tokenizer: its bytes are exact, its files are checked, and its ids are those of tiktoken and transformers."""

import base64
import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import EMBEDDED, ModelFiles, find_model
from toyllm.models.tokenizer import Tokenizer, byte_characters, load_tokenizer

ASSETS = Path(toyllm.__file__).parent.parent / "shared" / "assets"
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's words, as tiktoken writes them
TALES = load_tokenizer(find_model("tales-gpt2"))
NO_FILES = ModelFiles(
    name="test", folder=Path(), weights=None, index=None, config=None, generation_config=None, tokenizer=None, vocab=None, merges=None
)


def tales_document() -> dict[str, Any]:
    """The embedded model's tokenizer.json, for a test to change."""
    return json.loads((EMBEDDED / "tales-gpt2" / "tokenizer.json").read_text(encoding="utf-8"))


def tokenizer_of(document: object, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    tokenizer = load_tokenizer(replace(NO_FILES, tokenizer=path))
    assert tokenizer is not None
    return tokenizer


def older_files(folder: Path, vocab: str | bytes, merges: str | bytes) -> ModelFiles:
    """A folder with vocab.json and merges.txt alone."""
    for name, text in (("vocab.json", vocab), ("merges.txt", merges)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return replace(NO_FILES, vocab=folder / "vocab.json", merges=folder / "merges.txt")


# What every text and every id must satisfy


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(), st.booleans())
def test_text_survives_a_round_trip(text: str, special: bool) -> None:
    assert TALES.decode(TALES.encode(text, special)) == text


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(alphabet=st.sampled_from("aé☃️👋🏽 \n\0<|>") | st.characters(codec="utf-8")))
def test_pieces_tile_the_text_byte_for_byte(text: str) -> None:
    pieces = TALES.pieces(text)
    assert [p.id for p in pieces] == TALES.encode(text)
    assert all(text.encode()[p.start : p.end] == TALES.token_bytes(p.id) for p in pieces)
    assert [0, *(p.end for p in pieces)] == [*(p.start for p in pieces), len(text.encode())]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 4095)))
def test_decoding_equals_the_librarys(ids: list[int]) -> None:
    assert TALES.decode(ids) == TALES.library.decode(ids, skip_special_tokens=False)


def test_each_byte_has_its_own_character_and_token() -> None:
    assert len(set(byte_characters())) == 256
    assert byte_characters()[ord(" ")] == "Ġ"
    assert [TALES.token_bytes(TALES.id_of(c)) for c in byte_characters()] == [bytes([b]) for b in range(256)]


def test_a_piece_may_be_part_of_a_character() -> None:
    first, *_, last = TALES.pieces("👋")
    assert (first.start, last.end) == (0, 4)
    assert first.text == "\ufffd"
    assert TALES.token_bytes(first.id) == "👋".encode()[first.start : first.end]


# Special tokens and ids without a token


def test_special_tokens_are_read_as_such_only_when_wanted() -> None:
    assert TALES.encode("<|endoftext|>") == [0]
    plain = TALES.encode("<|endoftext|>", special=False)
    assert len(plain) > 1
    assert 0 not in plain
    assert TALES.decode(plain) == TALES.decode([0]) == "<|endoftext|>"
    assert TALES.encode("<|endoftext|>") == [0], "the choice of one call must not last"


def test_a_special_token_stands_for_its_own_text(tmp_path: Path) -> None:
    document = tales_document()
    document["added_tokens"].append({**document["added_tokens"][0], "id": 4096, "content": "<|Ünde|>"})
    tokenizer = tokenizer_of(document, tmp_path)
    assert tokenizer.token_bytes(4096) == "<|Ünde|>".encode()  # its Ü is no byte character here
    assert [p[2:] for p in tokenizer.pieces("☃<|Ünde|>")][-1] == (3, 12)
    assert tokenizer.vocab_size == 4097


@pytest.mark.parametrize("token_id", [4096, 200500, 2**32, 10**30, np.int64(2**40)])
def test_an_id_without_a_token_shows_itself(token_id: int) -> None:
    assert TALES.decode([0, token_id]) == f"<|endoftext|><|id {token_id}|>"


def test_a_negative_id_is_an_error() -> None:
    with pytest.raises(ToyllmError, match="token id -1: ids begin at 0"):
        TALES.decode([-1])


def test_a_lone_surrogate_is_an_error_that_says_where() -> None:
    with pytest.raises(ToyllmError, match=r"lone surrogate \(U\+DC80\) at character 2"):
        TALES.encode("ab\udc80")


def test_tokens_are_found_by_their_string() -> None:
    assert TALES.id_of("<|endoftext|>") == 0
    assert TALES.id_of("<|return|>") is None
    assert TALES.vocab_size == 4096


# What a tokenizer.json may ask for


def test_tokens_that_the_file_puts_around_a_text_take_no_bytes(tmp_path: Path) -> None:
    around = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"<|endoftext|>": around}}
    tokenizer = tokenizer_of({**tales_document(), "post_processor": post}, tmp_path)
    assert [(p.id, p.start, p.end) for p in tokenizer.pieces("<|endoftext|>")] == [(0, 0, 0), (0, 0, 13)]
    assert 0 not in tokenizer.encode("Hi", special=False)


def test_where_a_normalizer_rewrote_the_text_offsets_are_whole_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of({**tales_document(), "normalizer": {"type": "NFC"}}, tmp_path)
    caplog.set_level(logging.INFO, logger="toyllm")
    pieces = tokenizer.pieces("e\u0301 x")  # e and an accent: the tokenizer sees one é of two bytes
    assert "rewrote the text" in caplog.text
    assert "".join(p.text for p in pieces if p.start >= 3) == " x"
    assert pieces[-1].end == 5


def test_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    document = tales_document()
    document["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    document["padding"]["pad_token"] = "<|endoftext|>"
    assert tokenizer_of(document, tmp_path).encode("Once upon a time") == TALES.encode("Once upon a time")


def test_a_vocabulary_word_not_made_of_byte_characters_is_its_own_text(tmp_path: Path) -> None:
    document = tales_document()
    document["model"]["vocab"]["世界"] = 4096
    assert tokenizer_of(document, tmp_path).decode([4096]) == "世界"


def test_a_tokenizer_of_another_kind_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokenizer.json"
    words = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": {"a": 0}}
    path.write_text(json.dumps({"version": "1.0", "model": words}))
    assert load_tokenizer(replace(NO_FILES, tokenizer=path)) is None
    assert f"{path}: not byte-level" in caplog.text


# Files


def test_the_two_older_files_make_the_same_tokenizer(tmp_path: Path) -> None:
    document = tales_document()["model"]
    merges = "".join(f"{a} {b}\n" for a, b in document["merges"])
    tokenizer = load_tokenizer(older_files(tmp_path, json.dumps(document["vocab"]), "#version: 0.2\n" + merges))
    text = "Once upon a time<|endoftext|> there was a café, it's 1812…\n\n  # # 👋"
    assert tokenizer.pieces(text) == TALES.pieces(text)
    assert tokenizer.encode(text, special=False) == TALES.encode(text, special=False)


def test_older_files_without_an_end_of_text_token_have_none(tmp_path: Path) -> None:
    vocab = {c: i for i, c in enumerate(byte_characters())}
    tokenizer = load_tokenizer(older_files(tmp_path, json.dumps(vocab), ""))
    assert tokenizer.id_of("<|endoftext|>") is None
    assert tokenizer.encode("<|end") == [vocab[c] for c in "<|end"]


def test_a_folder_without_a_tokenizer_has_none() -> None:
    assert load_tokenizer(NO_FILES) is None
    assert load_tokenizer(replace(NO_FILES, vocab=Path("vocab.json"))) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"version": "1.0"}', b'{"model": {"type": "BPE", "vocab": {"a": -1}}}']
)
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ToyllmError, match=r"tokenizer\.json: not a tokenizer that can be read .*; download it again"):
        load_tokenizer(replace(NO_FILES, tokenizer=path))


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", "", r"vocab\.json: not valid JSON"),
        ("[]", "", r"vocab\.json: expected a JSON object"),
        ('{"a": "0"}', "", r"vocab\.json with merges\.txt: not a tokenizer"),
        ('{"a": 0}', "#version: 0.2\na\n", r"merges\.txt: line 2: expected two tokens with a space between, found 'a'"),
        ('{"a": 0}', "a b\n", r"vocab\.json with merges\.txt: .*`b` out of vocabulary"),
        ('{"a": 0}', b"a \xff\n", r"merges\.txt: not UTF-8 at byte 2"),
    ],
)
def test_broken_older_files_are_named(tmp_path: Path, vocab: str, merges: str | bytes, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        load_tokenizer(older_files(tmp_path, vocab, merges))


# Held against others


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    """GPT-2's own tokenizer, from its two files."""
    folder = ASSETS / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return load_tokenizer(replace(NO_FILES, vocab=folder / "encoder.json", merges=folder / "vocab.bpe"))


def vectors() -> Iterator[tuple[str, list[int]]]:
    with (ASSETS / "tokenizer-vectors" / "jtokkit" / "r50k_base_encodings.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["input"], json.loads(row["output"])


def test_all_of_jtokkits_gpt2_vectors(gpt2: Tokenizer) -> None:
    rows = list(vectors())
    assert len(rows) == 423
    for text, ids in rows:
        assert gpt2.encode(text) == ids, text
        assert gpt2.decode(ids) == text
        assert b"".join(text.encode()[p.start : p.end] for p in gpt2.pieces(text)) == text.encode()


def test_ids_and_bytes_are_tiktokens(gpt2: Tokenizer) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    lines = (ASSETS / "gpt2-tokenizer" / "r50k_base.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    theirs = tiktoken.Encoding("r50k_base", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    assert gpt2.vocab_size == theirs.n_vocab == 50257
    assert [gpt2.token_bytes(i) for i in range(50257)] == [theirs.decode_single_token_bytes(i) for i in range(50257)]
    text = "<|endoftext|>".join(text for text, _ in vectors())
    assert gpt2.encode(text) == theirs.encode(text, allowed_special="all")
    assert gpt2.encode(text, special=False) == theirs.encode(text, disallowed_special=())


@pytest.mark.live
def test_ids_and_text_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / "tales-gpt2" / "tokenizer.json"))
    text = " <|endoftext|>\n\nOnce<|endoftext|> upon a café, it's 1812…  👋 "
    ids = TALES.encode(text)
    assert ids == theirs.encode(text)
    assert TALES.encode(text, special=False) == theirs.encode(text, split_special_tokens=True)
    assert TALES.decode(ids[:-2]) == theirs.decode(ids[:-2], clean_up_tokenization_spaces=False)
