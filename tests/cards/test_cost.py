"""What the cards come to: the published counts to the unit, what `params` says of a token, and what running them computes."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from toyllm.cards import operators
from toyllm.cards.catalogue import READING, library
from toyllm.cards.cost import Filled, cost, cost_lines, costs, count_text, filled_cards, reach, shares, tensors
from toyllm.cards.interpreter import run
from toyllm.cards.operators import Limits
from toyllm.cards.settings import source
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.location import ModelFiles, find_model
from toyllm.models.memory import per_token
from toyllm.models.params import anatomy, count
from toyllm.models.parts import whole

CONFIGS = Path(__file__).with_name("configs")
PUBLISHED = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))


def of_config(name: str) -> Filled:
    path = CONFIGS / f"{name}.json"
    return filled_cards(anatomy(ModelFiles(name, CONFIGS, None, None, path, None, None, None, None)))


def assert_adds_up(model: Filled) -> None:
    """The model's cards, and the shares of all cards in it, come to what `params` says."""
    said, token = count(model.anatomy.entries), per_token(model.anatomy, whole(model.anatomy), model.run)
    parts = [one for _, one in shares(model).values()]
    for name in ("parameters", "active"):
        assert sum(getattr(one, name) for one in parts) == getattr(said, name)
    for name in ("flops", "weight_bytes", "cache_bytes"):
        assert sum(getattr(one, name) for one in parts) == getattr(token, name)
    for name in (model.family, f"{model.family}.Step"):
        one = cost(reach(name, "", model), model)
        assert (one.parameters, one.active) == (said.parameters, said.active)
        assert (one.flops, one.weight_bytes, one.cache_bytes) == (token.flops, token.weight_bytes, token.cache_bytes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_cards_of_published_models_add_up_to_the_published_counts_and_to_params(name: str) -> None:
    model = of_config(name)
    assert sum(one.parameters for _, one in shares(model).values()) == PUBLISHED[name]
    assert_adds_up(model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_that_the_cards_declare_are_those_of_the_architecture(name: str) -> None:
    model = of_config(name)
    declared = {e.key: e.shape for e in reach(model.family, "", model).entries.values()}
    assert declared == {e.key: e.shape for e in model.anatomy.entries if e.counted}


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_the_embedded_models_add_up(name: str) -> None:
    assert_adds_up(filled_cards(anatomy(find_model(name))))


@pytest.mark.parametrize(
    "more",
    [
        {"n_inner": 20},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "gelu"},
        {"dtype": "bfloat16"},
    ],
)
def test_gpt2_adds_up_whatever_its_options(tmp_path: Path, more: dict) -> None:
    assert_adds_up(of_document(tmp_path, hollow["GPT2"] | more))


@pytest.mark.parametrize(
    "more",
    [
        {"tie_word_embeddings": True},
        {"quantization_config": None},
        {"layer_types": ["full_attention"]},
        {"num_hidden_layers": 3, "sliding_window": 5, "max_position_embeddings": 9},
    ],
)
def test_gpt_oss_adds_up_whatever_its_options(tmp_path: Path, more: dict) -> None:
    assert_adds_up(of_document(tmp_path, hollow["GPT_OSS"] | more))


def of_document(folder: Path, document: dict) -> Filled:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return filled_cards(anatomy(ModelFiles("it", folder, None, None, path, None, None, None, None)))


def test_queries_keys_and_values_stored_as_one_add_up(tmp_path: Path) -> None:
    original = {"num_hidden_layers": 2, "num_experts": 4, "experts_per_token": 2, "swiglu_limit": 7.0, "vocab_size": 64}
    model = of_document(tmp_path, original)
    assert "0.qkv.weight" in model.stored
    assert_adds_up(model)


def test_a_stored_copy_of_the_tied_head_is_no_parameter_of_a_card(tmp_path: Path) -> None:
    hollow["write"](tmp_path, hollow["GPT2"], hollow["gpt2"]() | {"lm_head.weight": ("F32", (50, 12))})
    assert_adds_up(filled_cards(anatomy(find_model(str(tmp_path)))))


# ---- held against what a run computes ---------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The operations of each matrix product that the interpreter computes."""
    counted: list[int] = []
    product = operators.BINARY["·"]

    def watched(numbers: object, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = product(numbers, a, b)
        if np.ndim(a) and np.ndim(b):
            counted.append(2 * np.size(result) * np.shape(a)[-1])
        return result

    monkeypatch.setitem(operators.BINARY, "·", watched)
    return counted


LIMITS = Limits(work=1 << 62)


def test_decoding_at_the_last_position_computes_as_many_operations_as_gpt2s_cards_say(products: list[int]) -> None:
    files = find_model("tales-gpt2")
    model = filled_cards(anatomy(files))
    h = model.hypers
    cache = np.zeros((h["L"], 2, model.position, h["H"], h["Dh"]))
    read = source(open_checkpoint(files), model.anatomy.config)
    run(model.cards["gpt2.Step"], model.cards, {"t": 5, "C": cache}, source=read, limits=LIMITS)
    (one,) = costs("gpt2.Step", model)
    assert sum(products) == one.flops


def test_and_as_many_as_gpt_osss_cards_say(products: list[int]) -> None:
    files = find_model("tales-gpt-oss")
    model = filled_cards(anatomy(files))
    h = model.hypers
    rings = np.zeros((h["L"], 2, model.run.context, h["G"], h["Dh"]))
    read = source(open_checkpoint(files), model.anatomy.config)
    inputs = {"x": 5, "p": model.position, "C": rings}
    run(model.cards["gpt-oss.Step"], model.cards, inputs, {"moe": "auto", "ρ": 1.0}, read, limits=LIMITS)
    (one,) = costs("gpt-oss.Step", model)
    assert sum(products) == one.flops


@pytest.mark.parametrize("algorithm", ["single", "grouped", "all", "budget"])
def test_each_mixture_computes_for_a_decoded_token_what_its_card_says(algorithm: str, products: list[int]) -> None:
    files = find_model("tales-gpt-oss")
    model = filled_cards(anatomy(files))
    read = source(open_checkpoint(files), model.anatomy.config)
    x = np.random.default_rng(0).standard_normal((1, model.hypers["D"]))
    run(model.cards["gpt-oss.MoE"], model.cards, {"x": x}, {"moe": algorithm, "ρ": 1.0}, read, group="blocks.0", limits=LIMITS)
    (mixture,) = costs(f"gpt-oss.{algorithm.capitalize()}", model)
    (router,) = costs("gpt-oss.Router", model)
    assert sum(products) == mixture.flops + router.flops


# ---- in words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (81_912_576, "81.91M"), (124_439_808, "124.44M"), (1_557_611_200, "1.56B"), (20_914_757_184, "20.91B"), (1_500, "1.5K"),
        (2_000, "2K"), (999, "999"), (0, "0"), (100_000_000, "100M"), (999_960, "1M"), (995_000, "995K"), (999_999_999, "1B"),
        (1_000_000, "1M"), (12_345, "12.3K"),
    ],
)  # fmt: skip
def test_counts_are_written_as_the_anchor_writes_them(n: int, text: str) -> None:
    assert count_text(n) == text


def test_a_models_card_ends_its_parameters_with_the_total() -> None:
    assert of_config("distilgpt2").cards["gpt2"].lines == ("total 81.91M, embeddings tied: z = e · W_e^⊤",)
    assert of_config("gpt-oss-20b").cards["gpt-oss"].lines == ("total 20.91B, active a token 3.61B",)


def test_every_card_of_a_family_says_what_it_costs() -> None:
    for name in ("gpt2", "gpt-oss-20b"):
        model = of_config(name)
        said = {card: cost_lines(model.cards[card], model) for card in READING[model.family]}
        assert all(lines and all(line.startswith("# ") for line in lines) for lines in said.values())
    assert said["gpt-oss.RMSNorm"] == ["# 2,880 parameters, which its caller hands over; no matrix product"]
    assert said["MXFP4"] == ["# no parameters, no matrix product"]
    assert [line.split(";")[0] for line in said["gpt-oss.Attn"]] == ["# 26,550,144 parameters in each of 12 layers"] * 2


def test_the_members_of_a_family_of_tensors_are_all_counted() -> None:
    gammas = next(d for d in library()["gpt2.Step"].params if d.names[0].startswith("γ_ℓ^1"))
    keys = [key for key, _ in tensors(gammas, {"L": 3})]
    assert len(keys) == 6
