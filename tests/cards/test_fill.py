"""Cards filled from a configuration: values stated, decided branches gone, and the same algorithm left."""

import numpy as np
import pytest

from toyllm.cards.catalogue import READING, called, find_card, library, reached, reading
from toyllm.cards.fill import fill
from toyllm.cards.interpreter import run
from toyllm.cards.text import parse, render
from toyllm.kernels.errors import ToyllmError

CARD = """\
Algorithm: my.Norm(x; ε)
  Input:    x ∈ R^{T×D}
  Output:   y ∈ R^{T×D}
  Hyper:    D ε scaled kind shift=2
  Param:    γ ∈ R^D   (scale) [norm.weight]
            β, δ ∈ R^D   [norm.bias, norm.other]
if scaled then
  if kind = "centred" then
    y ← (x - mean(x, axis=-1)) ⊙ γ + δ
  else if ε > 0 then
    y ← x ⊙ γ + δ
  else
    y ← x + δ
  end if
else
  y ← x + β
end if
for t ← 0, …, 1 do
  if ¬ scaled then
    return y
  end if
end for
return y
"""


def steps(**values: object) -> list[str]:
    return [s.expression for s in fill(parse(CARD), values).steps]  # type: ignore[arg-type]


def test_a_decided_choice_is_the_branch_that_is_taken() -> None:
    taken = ["(x - mean(x, axis=-1)) ⊙ γ + δ", "0, …, 1", "", "y"]
    assert steps(D=4, scaled=True, kind="centred") == taken
    made = fill(parse(CARD), {"D": 4, "scaled": True, "kind": "centred"})
    assert [s.depth for s in made.steps] == [0, 0, 0, 0]
    assert parse(render(made)) == made


def test_of_an_undecided_choice_stay_the_branches_that_may_be_taken() -> None:
    assert steps(scaled=True, kind="plain") == ["ε > 0", "x ⊙ γ + δ", "", "x + δ", "", "0, …, 1", "", "y"]
    made = fill(parse(CARD), {"scaled": True, "kind": "plain"})
    assert [s.kind for s in made.steps][:5] == ["if", "bind", "else", "bind", "end"]
    assert fill(parse(CARD), {}) == parse(CARD)


def test_what_follows_a_sure_return_is_gone() -> None:
    assert steps(scaled=False) == ["x + β", "0, …, 1", "y", "", "y"]


def test_parameters_and_hypers_that_only_other_branches_needed_are_gone() -> None:
    made = fill(parse(CARD), {"D": 4, "scaled": True, "kind": "centred"})
    assert [(d.names, d.keys) for d in made.params] == [(("γ",), ("norm.weight",)), (("δ",), ("norm.other",))]
    assert [(h.name, h.value) for h in made.hypers] == [("D", 4), ("ε", None), ("shift", 2)]
    (param,) = fill(parse(CARD), {"D": 4, "scaled": False}).params
    assert (param.names, param.keys) == (("β",), ("norm.bias",))


def test_a_hyper_that_is_handed_over_or_stated_keeps_its_value() -> None:
    made = fill(parse(CARD), {"ε": 0.5, "shift": 3})
    assert {h.name: h.value for h in made.hypers} == {"D": None, "ε": None, "scaled": None, "kind": None, "shift": 2}


@pytest.mark.parametrize("values", [{"scaled": True, "kind": "centred"}, {"scaled": True, "kind": "plain"}, {"scaled": False, "kind": ""}])
def test_a_filled_card_gives_what_the_card_gives(values: dict) -> None:
    values = {"D": 3, "ε": 1e-5, **values}
    tensors = {f"norm.{name}": np.arange(3.0) + n for n, name in enumerate(("weight", "bias", "other"))}
    x = np.arange(6.0).reshape(2, 3)
    card, made = parse(CARD), fill(parse(CARD), values)
    results = [run(c, {}, {"x": x, "ε": 1e-5}, values, tensors.__getitem__).results[0] for c in (card, made)]
    np.testing.assert_array_equal(*results)


def test_the_catalogue_has_every_card_of_the_library_and_says_what_it_is() -> None:
    names = [name for cards in READING.values() for name in cards]
    assert list(library()) == list(dict.fromkeys(names))
    assert all(what for cards in READING.values() for what in cards.values())


def test_reading_a_model_comes_to_each_of_its_cards_once() -> None:
    for family, cards in READING.items():
        assert [card.name for card in reading(library()[family], library())] == list(cards)
    assert [card.name for card in reading(library()["gpt2.Block"], library())] == ["gpt2.Block", "gpt2.LN", "gpt2.Attn", "gpt2.FFN"]


def test_calls_are_found_as_the_interpreter_finds_them() -> None:
    assert {c.name for c in called(library()["gpt2.Generate"], library())} == {"gpt2", "gpt2.Step", "Sample"}
    two = [parse("Algorithm: a.F(x)\nInput: x ∈ R\nreturn G(F(x))"), parse("Algorithm: a.G(x)\nInput: x ∈ R\nreturn a.F(sum(x))")]
    assert list(reached(two[1:], {card.name: card for card in two})) == ["a.G", "a.F"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt2", "gpt2"),
        ("GPT2.block", "gpt2.Block"),
        ("gpt-oss.attn-step", "gpt-oss.AttnStep"),
        ("mxfp4", "MXFP4"),
        ("router", "gpt-oss.Router"),
    ],
)
def test_names_are_found_in_any_spelling(name: str, found: str) -> None:
    assert find_card(name, library()).name == found


def test_the_family_decides_where_both_have_a_card_of_a_name() -> None:
    assert find_card("block", library()).name == "gpt2.Block"
    assert find_card("block", library(), ("gpt-oss", "gpt2")).name == "gpt-oss.Block"


def test_an_unknown_name_is_told_with_those_near_it() -> None:
    with pytest.raises(ToyllmError, match=r"^blok: no card of this name; did you mean gpt2\.Block or gpt-oss\.Block\?$"):
        find_card("blok", library())
    with pytest.raises(ToyllmError, match=r"did you mean gpt2\.LN\?$"):
        find_card("layernorm", library())
    with pytest.raises(ToyllmError, match="`toyllm card --list` lists them"):
        find_card("zzzz", library())
