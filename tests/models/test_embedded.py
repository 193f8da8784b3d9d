"""What an embedded model's files hold, and that its model card says the same."""

import csv
import hashlib
import json
import math
import re

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from toyllm.models.location import EMBEDDED

TALES = EMBEDDED / "tales-gpt2"
BOOKS = EMBEDDED.parent / "recipe" / "books.csv"
PARAGRAPH = (
    'Once upon a time there was a king who had twelve daughters. "Where," said he, "do they dance -- and with whom?"\n'
    "Nobody knew; not even the naïve old soldier of Kopenhagen–Süd, who'd seen 1,001 nights. 龍 🐉\t\x00"
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Each tensor's shape, from the header; all of them are bf16."""
    with safe_open(TALES / "model.safetensors", "numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        assert {s.get_dtype() for s in slices.values()} == {"BF16"}
        return {name: tuple(s.get_shape()) for name, s in slices.items()}


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((TALES / "config.json").read_text())


@pytest.fixture(scope="module")
def card() -> dict[str, str]:
    """The rows of the model card's table."""
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", (TALES / "README.md").read_text(), re.MULTILINE))


def number(text: str) -> int:
    """The number at the start of a cell: "5,918,720 (…)"."""
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))


def test_shapes_follow_from_the_configuration(shapes, config):
    D, V, P = config["n_embd"], config["vocab_size"], config["n_positions"]
    F = config["n_inner"] or 4 * D
    block = {
        "ln_1": (D,),
        "attn.c_attn": (D, 3 * D),
        "attn.c_proj": (D, D),
        "ln_2": (D,),
        "mlp.c_fc": (D, F),
        "mlp.c_proj": (F, D),
    }
    modules = {f"h.{i}.{name}": shape for i in range(config["n_layer"]) for name, shape in block.items()} | {"ln_f": (D,)}
    expected = {"wte.weight": (V, D), "wpe.weight": (P, D)}
    expected |= {f"{name}.weight": shape for name, shape in modules.items()}
    expected |= {f"{name}.bias": shape[-1:] for name, shape in modules.items()}
    assert shapes == expected
    assert D % config["n_head"] == 0


def test_card_counts_the_parameters_of_the_header(shapes, card):
    assert number(card["parameters"]) == sum(math.prod(shape) for shape in shapes.values())


def test_card_names_the_weights_by_size_and_hash(card):
    data = (TALES / "model.safetensors").read_bytes()
    assert card["SHA-256 of the weights"] == f"`{hashlib.sha256(data).hexdigest()}`"
    assert f"{len(data):,} bytes" in card["weights"]


def test_card_repeats_the_configuration(config, card):
    D, H = config["n_embd"], config["n_head"]
    layers = f"{config['n_layer']} layers, width {D}, {H} heads of {D // H}, feed-forward {4 * D}"
    assert card["architecture"] == f"GPT-2: {layers}, learned positions"
    assert number(card["context"]) == config["n_positions"]
    assert number(card["vocabulary"]) == config["vocab_size"]


def test_card_repeats_the_training_record(card):
    record = json.loads((TALES / "training.json").read_text())
    assert number(card["steps"]) == record["steps"]
    assert f"{record['batch']} windows" in card["steps"]
    assert f"seed {record['seed']}" in card["steps"]
    assert number(card["tokens seen"]) == record["tokens_seen"] == record["steps"] * record["batch"] * record["window"]
    assert card["held-out loss"].startswith(f"{record['held_out_loss_nats_per_token']:.3f} nats")


def test_card_lists_the_books_it_was_trained_on():
    with BOOKS.open(encoding="utf-8", newline="") as lines:
        books = list(csv.DictReader(lines))
    text = " ".join((TALES / "README.md").read_text().split())
    trained, held_out = text[text.index("## Trained on") : text.index("## Making it again")].split("Held out")
    assert f"{sum(book['use'] == 'train' for book in books)} books" in trained
    for book in books:
        place = trained if book["use"] == "train" else held_out
        assert book["title"] in place
        assert book["author"] in place


def test_tokenizer_has_the_vocabulary_of_the_configuration(config):
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"] == config["bos_token_id"] == 0
    generation = json.loads((TALES / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_tokenizer_gives_any_text_back():
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    ids = tokenizer.encode(PARAGRAPH).ids
    assert tokenizer.decode(ids) == PARAGRAPH
    assert len(ids) < len(PARAGRAPH.encode())
