"""The tokenizer of gpt-oss, built from the ranks of o200k_base: the published layout, and the ids and bytes of tiktoken."""

import base64
import csv
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toyllm
from toyllm.models.harmony import special_ids
from toyllm.models.tokenizer import Tokenizer

ASSETS = Path(toyllm.__file__).parent.parent / "shared" / "assets"
MAKE = runpy.run_path(str(Path(__file__).parent / "make_o200k.py"))


@pytest.fixture(scope="module")
def tiktokens():
    """The tokenizer as tiktoken has it."""
    tiktoken = pytest.importorskip("tiktoken")
    path = ASSETS / "o200k" / "o200k_base.tiktoken"
    if not path.is_file():
        pytest.skip(f"no {path}")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    special = {token: i for i, token in MAKE["SPECIAL"].items()}
    return tiktoken.Encoding("o200k_harmony", pat_str=MAKE["WORDS"], mergeable_ranks=ranks, special_tokens=special)


def test_the_layout_is_the_published_one(o200k_path: Path) -> None:
    document = json.loads(o200k_path.read_text(encoding="utf-8"))
    model = document["model"]
    assert (model["type"], model["ignore_merges"], len(model["vocab"]), len(model["merges"])) == ("BPE", True, 199998, 446189)
    assert [token["id"] for token in document["added_tokens"]] == list(range(199998, 200019))
    assert all(token["special"] for token in document["added_tokens"])
    split, to_bytes = document["pre_tokenizer"]["pretokenizers"]
    assert (split["type"], split["behavior"], to_bytes["use_regex"], to_bytes["add_prefix_space"]) == ("Split", "Isolated", False, False)
    ids = [[model["vocab"][half] for half in pair] for pair in model["merges"]]
    made = [model["vocab"]["".join(pair)] for pair in model["merges"]]
    assert [(whole, *pair) for whole, pair in zip(made, ids, strict=True)] == sorted((m, *pair) for m, pair in zip(made, ids, strict=True))


def test_harmonys_tokens_have_their_published_ids(o200k: Tokenizer) -> None:
    assert o200k.vocab_size == 200019
    assert special_ids(o200k) == {
        "<|start|>": 200006,
        "<|channel|>": 200005,
        "<|constrain|>": 200003,
        "<|message|>": 200008,
        "<|end|>": 200007,
        "<|return|>": 200002,
        "<|call|>": 200012,
        "<|endoftext|>": 199999,
    }


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<|startoftext|><|start|><|message|>Hello World<|end|><|endoftext|>", [199998, 200006, 200008, 13225, 5922, 200007, 199999]),
        (
            "You are ChatGPT, a large language model trained by OpenAI.\n",
            [3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203, 656, 7788, 17527, 558],
        ),
        ("What is the capital of France?", [4827, 382, 290, 9029, 328, 10128, 30]),
        ("system", [17360]),
        ("user", [1428]),
        ("assistant", [173781]),
        ("analysis", [35644]),
        ("final", [17196]),
        ("hello world", [24912, 2375]),
    ],
)
def test_known_texts_have_their_ids(o200k: Tokenizer, text: str, ids: list[int]) -> None:
    assert o200k.encode(text) == ids
    assert o200k.decode(ids) == text


def test_a_whole_answer_has_its_ids(o200k: Tokenizer) -> None:
    thought = '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.<|end|>'
    answer = "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>"
    expected = "200005 35644 200008 1844 31064 25 392 4827 382 220 17 659 220 17 16842 12295 81645 13 51441 6052 13 200007 "
    expected += "200006 173781 200005 17196 200008 17 659 220 17 314 220 19 13 200002"
    assert " ".join(map(str, o200k.encode(thought + answer))) == expected


def test_a_special_token_in_plain_text_is_ordinary(o200k: Tokenizer) -> None:
    assert o200k.encode("<|start|>", special=False) == [27, 91, 5236, 91, 29]


def test_all_of_jtokkits_vectors(o200k: Tokenizer) -> None:
    with (ASSETS / "tokenizer-vectors" / "jtokkit" / "o200k_base_encodings.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["input"], json.loads(row["output"])) for row in csv.DictReader(file)]
    assert len(rows) == 421
    for text, ids in rows:
        assert o200k.encode(text, special=False) == ids, text
        assert o200k.decode(ids) == text


def test_every_token_stands_for_tiktokens_bytes(o200k: Tokenizer, tiktokens) -> None:
    assert tiktokens.n_vocab == 200019
    assert [o200k.token_bytes(i) for i in range(200019)] == [tiktokens.decode_single_token_bytes(i) for i in range(200019)]


@settings(deadline=None)  # a busy machine is no failure
@given(text=st.lists(st.sampled_from(["aaaa", "CamelCASE", "don't", "  \n", "१२३४", "👋🏽", "<|end|>"]) | st.text()).map("".join))
def test_any_text_has_tiktokens_ids(o200k: Tokenizer, tiktokens, text: str) -> None:
    assert o200k.encode(text, special=False) == tiktokens.encode_ordinary(text)


def test_ids_beyond_the_tokens_show_themselves(o200k: Tokenizer) -> None:
    assert o200k.decode([24912, 200019, 201087]) == "hello<|id 200019|><|id 201087|>"


def test_another_file_of_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("YQ== 0\n")
    with pytest.raises(SystemExit, match=r"not o200k_base\.tiktoken"):
        MAKE["write_tokenizer"](tmp_path / "ranks", tmp_path / "tokenizer.json")
