"""The streaming decoder: whole characters only, and in the end exactly the text of all bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import ModelFiles, find_model
from toyllm.models.tokenizer import Tokenizer, byte_characters, load_tokenizer

TALES = load_tokenizer(find_model("tales-gpt2"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer without merges: token i is byte i, and nothing else."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_characters())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = ModelFiles("bytes", folder, None, None, None, None, None, folder / "vocab.json", folder / "merges.txt")
    return load_tokenizer(files)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.push, ids), stream.finish()])


# Bytes that begin, continue, and break characters, far more often than chance has them.
TELLING = st.sampled_from(list(b"a\x7f\x80\x9f\xa0\xbf\xc0\xc2\xe0\xe2\xed\xef\xf0\xf4\xf5\xff"))


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(TELLING | st.integers(0, 255)))
def test_any_bytes_come_out_as_one_decoding_of_all(raw: Tokenizer, data: list[int]) -> None:
    assert streamed(raw, data) == bytes(data).decode("utf-8", "replace")


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_whole_text_comes_out_whole_and_never_ahead_of_its_bytes(raw: Tokenizer, text: str) -> None:
    stream, shown = raw.stream(), ""
    for i, byte in enumerate(text.encode()):
        shown += stream.push(byte)
        assert text.startswith(shown)
        assert i + 1 - len(shown.encode()) <= 3, "no more than three bytes wait"
    assert shown == text
    assert stream.finish() == ""


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 4095) | st.integers(4096, 300_000)))
def test_any_ids_come_out_as_one_decoding_of_all(ids: list[int]) -> None:
    assert streamed(TALES, ids) == TALES.decode(ids) == b"".join(map(TALES.token_bytes, ids)).decode("utf-8", "replace")


def test_a_character_appears_with_its_last_byte(raw: Tokenizer) -> None:
    stream = raw.stream()
    assert [stream.push(b) for b in "é👋".encode()] == ["", "é", "", "", "", "👋"]


def test_a_special_token_is_shown_after_what_it_cut_short() -> None:
    stream = TALES.stream()
    assert stream.push(TALES.id_of("ð")) == ""  # the byte F0
    assert stream.push(0) == "\ufffd<|endoftext|>"
    assert stream.finish() == ""


def test_finishing_flushes_the_tail_once_and_begins_anew(raw: Tokenizer) -> None:
    stream = raw.stream()
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(ord("a")) == "a"


def test_streams_of_one_tokenizer_are_apart(raw: Tokenizer) -> None:
    a, b = raw.stream(), raw.stream()
    a.push(0xC3)
    assert b.push(0xA9) == "\ufffd"
    assert a.push(0xA9) == "é"


def test_a_negative_id_is_an_error() -> None:
    with pytest.raises(ToyllmError, match="token id -7"):
        TALES.stream().push(-7)
