"""What the embedded models' files hold, that their model cards say the same, and that they print what the cards show."""

import csv
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import toyllm
from toyllm.models.generation import settings_for
from toyllm.models.location import EMBEDDED

BOOKS = EMBEDDED.parent / "recipe" / "books.csv"
PARAGRAPH = (
    'Once upon a time there was a king who had twelve daughters. "Where," said he, "do they dance -- and with whom?"\n'
    "Nobody knew; not even the naïve old soldier of Kopenhagen–Süd, who'd seen 1,001 nights. 龍 🐉\t\x00"
)
OPTIONS = {"--temperature": float, "--seed": int, "--max-tokens": int}
Shapes = dict[str, tuple[int, ...]]


def gpt2_shapes(c: dict[str, Any]) -> Shapes:
    """Every tensor of a GPT-2 and its shape, from config.json."""
    D, V, P = c["n_embd"], c["vocab_size"], c["n_positions"]
    F = c["n_inner"] or 4 * D
    block = {"ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "ln_2": (D,), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    modules = {f"h.{i}.{name}": shape for i in range(c["n_layer"]) for name, shape in block.items()} | {"ln_f": (D,)}
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    biases = {f"{name}.bias": shape[-1:] for name, shape in modules.items()}
    return {"wte.weight": (V, D), "wpe.weight": (P, D)} | weights | biases


def gpt_oss_shapes(c: dict[str, Any]) -> Shapes:
    """Every tensor of a GPT-OSS and its shape, from config.json; 16 bytes and a scale hold 32 weights."""
    D, F, V, E = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_local_experts"]
    H, G, Dh = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    block: Shapes = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "self_attn.sinks": (H,)}
    projections = {"q_proj": (H * Dh, D), "k_proj": (G * Dh, D), "v_proj": (G * Dh, D), "o_proj": (D, H * Dh)}
    linear = {f"self_attn.{name}": shape for name, shape in projections.items()} | {"mlp.router": (E, D)}
    for name, shape in linear.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, rows, columns in (("mlp.experts.gate_up_proj", 2 * F, D), ("mlp.experts.down_proj", D, F)):
        groups = (E, rows, columns // 32)
        block |= {f"{name}_blocks": (*groups, 16), f"{name}_scales": groups, f"{name}_bias": (E, rows)}
    blocks = {f"model.layers.{i}.{name}": shape for i in range(c["num_hidden_layers"]) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)} | blocks


def gpt2_architecture(c: dict[str, Any]) -> str:
    """The card's line on the architecture, from config.json."""
    D, H = c["n_embd"], c["n_head"]
    return f"GPT-2: {c['n_layer']} layers, width {D}, {H} heads of {D // H}, feed-forward {4 * D}, learned positions"


def gpt_oss_architecture(c: dict[str, Any]) -> str:
    """The card's line on the architecture, from config.json."""
    sliding = " and ".join(str(i) for i, kind in enumerate(c["layer_types"]) if kind == "sliding_attention")
    rope = c["rope_scaling"]
    return (
        f"GPT-OSS: {c['num_hidden_layers']} layers, width {c['hidden_size']}, {c['num_attention_heads']} query and "
        f"{c['num_key_value_heads']} key/value heads of {c['head_dim']}, {c['num_local_experts']} experts of width "
        f"{c['intermediate_size']}, {c['num_experts_per_tok']} a token, window {c['sliding_window']} on layers {sliding}, a sink a head, "
        f"YaRN {rope['original_max_position_embeddings']} × {rope['factor']:g}"
    )


@dataclass(frozen=True)
class Embedded:
    """An embedded model: what its family makes of its configuration, and its files."""

    name: str
    shapes_of: Callable[[dict[str, Any]], Shapes]
    architecture_of: Callable[[dict[str, Any]], str]
    positions: str  # the key of the context's length in config.json

    def read(self, filename: str) -> str:
        return (EMBEDDED / self.name / filename).read_text(encoding="utf-8")

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self.read("config.json"))

    @cached_property
    def card(self) -> dict[str, str]:
        """The rows of the model card's table."""
        return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", self.read("README.md"), re.MULTILINE))

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Each tensor's dtype and shape, from the header."""
        with safe_open(EMBEDDED / self.name / "model.safetensors", "numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}

    def samples(self) -> list[tuple[str, str]]:
        """The commands that the card shows, and what they print."""
        return re.findall(r"```console\n\$ (.+)\n((?:.*\n)+?)```\n", self.read("README.md"))


TALES_GPT2 = Embedded("tales-gpt2", gpt2_shapes, gpt2_architecture, "n_positions")
TALES_GPT_OSS = Embedded("tales-gpt-oss", gpt_oss_shapes, gpt_oss_architecture, "max_position_embeddings")
MODELS = [TALES_GPT2, TALES_GPT_OSS]
SAMPLES = [pytest.param(model, *sample, id=sample[0].removeprefix("toyllm generate -m ")) for model in MODELS for sample in model.samples()]


@pytest.fixture(scope="module", params=MODELS, ids=[model.name for model in MODELS])
def model(request) -> Embedded:
    return request.param


@cache
def loaded(name: str) -> Any:
    return toyllm.load(name)


def number(text: str) -> int:
    """The number at the start of a cell: "5,918,720 (…)"."""
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))


def parameters(tensors: dict[str, tuple[str, tuple[int, ...]]], part: str = "") -> int:
    """Weights in the tensors with `part` in their names: two codes a byte of MXFP4, whose scales are none."""
    per_element = {"blocks": 2, "scales": 0}
    return sum(math.prod(shape) * per_element.get(name.rsplit("_", 1)[-1], 1) for name, (_, shape) in tensors.items() if part in name)


def test_every_embedded_model_is_tested_here():
    assert {model.name for model in MODELS} == {path.parent.name for path in EMBEDDED.glob("*/config.json")}


def test_shapes_follow_from_the_configuration(model):
    assert {name: shape for name, (_, shape) in model.tensors.items()} == model.shapes_of(model.config)


def test_tensors_are_bf16_but_for_mxfp4(model):
    for name, (dtype, _) in model.tensors.items():
        assert dtype == ("U8" if name.endswith(("_blocks", "_scales")) else "BF16"), name


def test_card_counts_the_parameters_of_the_header(model):
    assert number(model.card["parameters"]) == parameters(model.tensors)


def test_card_counts_what_a_token_uses():
    tensors, config, cell = TALES_GPT_OSS.tensors, TALES_GPT_OSS.config, TALES_GPT_OSS.card["active per token"]
    E, k = config["num_local_experts"], config["num_experts_per_tok"]
    idle = parameters(tensors, ".experts.") * (E - k) // E
    assert number(cell) == parameters(tensors) - idle - parameters(tensors, "embed_tokens")
    assert f"({k} of {E} experts" in cell


def test_card_names_the_weights_by_size_and_hash(model):
    data = (EMBEDDED / model.name / "model.safetensors").read_bytes()
    assert model.card["SHA-256 of the weights"] == f"`{hashlib.sha256(data).hexdigest()}`"
    assert f"{len(data):,} bytes" in model.card["weights"]


def test_card_repeats_the_configuration(model):
    assert model.card["architecture"] == model.architecture_of(model.config)
    assert number(model.card["context"]) == model.config[model.positions]
    assert number(model.card["vocabulary"]) == model.config["vocab_size"]


def test_card_repeats_the_training_record(model):
    record, card = json.loads(model.read("training.json")), model.card
    assert number(card["steps"]) == record["steps"]
    assert f"{record['batch']} windows" in card["steps"]
    assert f"seed {record['seed']}" in card["steps"]
    assert f"windows of {record['window']}" in card["context"]
    assert number(card["tokens seen"]) == record["tokens_seen"] == record["steps"] * record["batch"] * record["window"]
    assert card["held-out loss"].startswith(f"{record['held_out_loss_nats_per_token']:.3f} nats")


def test_card_lists_the_books_it_was_trained_on(model):
    with BOOKS.open(encoding="utf-8", newline="") as lines:
        books = list(csv.DictReader(lines))
    text = " ".join(model.read("README.md").split())
    trained, held_out = text[text.index("## Trained on") : text.index("## Making it again")].split("Held out")
    assert f"{sum(book['use'] == 'train' for book in books)} books" in trained
    for book in books:
        place = trained if book["use"] == "train" else held_out
        assert book["title"] in place
        assert book["author"] in place


def test_tokenizer_has_the_vocabulary_of_the_configuration(model):
    tokenizer = Tokenizer.from_str(model.read("tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == model.config["eos_token_id"] == model.config["bos_token_id"] == 0
    assert json.loads(model.read("generation_config.json"))["eos_token_id"] == model.config["eos_token_id"]


def test_tokenizer_gives_any_text_back(model):
    tokenizer = Tokenizer.from_str(model.read("tokenizer.json"))
    ids = tokenizer.encode(PARAGRAPH).ids
    assert tokenizer.decode(ids) == PARAGRAPH
    assert len(ids) < len(PARAGRAPH.encode())


@pytest.mark.parametrize(("model", "command", "printed"), SAMPLES)
def test_the_commands_of_the_card_print_what_it_shows(model, command, printed):
    program, subcommand, flag, name, prompt, *options = shlex.split(command)
    assert (program, subcommand, flag, name) == ("toyllm", "generate", "-m", model.name)
    given = {option[2:].replace("-", "_"): OPTIONS[option](value) for option, value in zip(options[::2], options[1::2], strict=True)}
    assert given.get("temperature") == 0 or "seed" in given
    runs = loaded(name)
    text = "".join(event.text for event in runs.generate(prompt, settings_for(runs.defaults, runs.config, given)))
    assert text + "\n" == printed


def test_every_card_has_a_greedy_sample_and_drawn_ones(model):
    greedy = ["--temperature 0" in command for command, _ in model.samples()]
    assert any(greedy)
    assert not all(greedy)
