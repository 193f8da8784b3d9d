"""Changes of a run: what is written is what is computed with, at every name, by slice, glob and position; without any, nothing is new."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import model as engine
from toyllm.models.activations import record
from toyllm.models.changes import Change, ablate, add, experts, patch, scale
from toyllm.models.compare_names import axes, names_of
from toyllm.models.generation import Settings
from toyllm.models.params import sizes

from . import gpt_oss_reference as reference

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ["gpt2", "gpt_oss"]
T, DECODED = 17, 3
IDS = np.random.default_rng(4).integers(0, 97, T + DECODED).tolist()

Arrays = dict[str, np.ndarray]


def load(family: str, **settings: Any) -> Any:
    return toyllm.load(str(GOLDENS / family / "baseline"), **settings)


def everything(model: Any, ids: Sequence[int] = IDS[:T]) -> Arrays:
    return record(model, ids, lambda name: True)[0]


def width(model: Any) -> int:
    return sizes(model.config).D


def prompt_and_steps(model: Any) -> np.ndarray:
    """Logits [1 + DECODED, V]: the prompt's last, and those of each decode step."""
    cache = model.new_cache(T + DECODED)
    rows = [model.forward(IDS[:T], np.arange(T), np.zeros(T, int), cache)[0]]
    rows += [model.forward(IDS[at : at + 1], [at], [0], cache)[0] for at in range(T, T + DECODED)]
    return np.array(rows)


# what can be read can be written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_and_shapes_that_can_be_changed_are_those_that_can_be_read(family: str) -> None:
    model = load(family)
    s, kinds = sizes(model.config), record(model, IDS[:T], lambda name: False)[1]
    assert list(kinds) == names_of(s.L, bool(s.E))
    lengths = vars(s) | {"T": T, "S": T}
    assert {name: tuple(lengths[letter] for letter in axes(name)) for name in kinds} == {name: kind[1] for name, kind in kinds.items()}


@pytest.mark.parametrize("chunk", [512, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_runs_own_activation_in_its_place_changes_nothing(family: str, chunk: int) -> None:
    """Recorded from a run in one pass: at each name alone, and at all of them, in a prompt in chunks and decode steps behind it."""
    own, model = everything(load(family), IDS), load(family, prefill_chunk=chunk)
    logits = prompt_and_steps(model)
    for name in own:
        np.testing.assert_array_equal(prompt_and_steps(model.changed([patch(name, own)])), logits, err_msg=name)
    found = everything(model.changed([patch("*", own)]), IDS)
    for name, array in own.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("algorithm", ["single", "grouped", "all"])
def test_a_runs_own_activation_changes_nothing_however_experts_are_mixed(algorithm: str) -> None:
    model = load("gpt_oss", moe=algorithm)
    changed = model.changed([patch("blocks.*.experts.*", everything(model)), scale("blocks.*.router.weights", 1)])
    np.testing.assert_array_equal(changed.logits(IDS[:T]), model.logits(IDS[:T]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_activation_can_be_changed_and_is_then_read_changed(family: str) -> None:
    """Another run's, of other tokens: what is read is what was put there, and the logits are no longer the run's own."""
    model, logits = load(family), load(family).logits(IDS[:T])
    other = everything(model, IDS[::-1][:T])
    for name, array in other.items():
        changed = model.changed([patch(name, array)])
        np.testing.assert_array_equal(everything(changed)[name], array, err_msg=name)
        assert not np.array_equal(changed.logits(IDS[:T]), logits), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factor_of_one_and_nothing_added_change_nothing(family: str) -> None:
    model = load(family)
    names = [name for name in everything(model) if not name.endswith("router.experts")]
    changed = model.changed([c for name in names for c in (scale(name, 1), add(name, 0))])
    np.testing.assert_array_equal(changed.logits(IDS[:T]), model.logits(IDS[:T]))


@pytest.mark.parametrize("chunk", [5, 1])
@pytest.mark.parametrize(
    "change",
    [
        scale("blocks.*.attn.scores[1]", 0.5),
        ablate("blocks.1.attn.weights[:, 4:9, :3]"),
        patch("blocks.0.attn.scores[:, :, 2]", -np.inf),
        scale("blocks.1.attn.k[3:9:2]", 2),
        add("blocks.0.attn.v[:, 1]", 1.5),
        ablate("blocks.2.norm_2[4:, ::3]"),
        scale("blocks.1.mlp.out[-2]", -1),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_a_pass_changes_no_changed_logits(family: str, change: Change, chunk: int) -> None:
    logits = [load(family, prefill_chunk=size).changed([change], T).logits(IDS[:T]) for size in (512, chunk)]
    np.testing.assert_array_equal(*logits)
    assert not np.array_equal(logits[0], load(family).logits(IDS[:T]))


# what it comes to


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_heads_a_block_adds_the_bias_of_its_attention(family: str) -> None:
    model = load(family)
    changed = model.changed([ablate("blocks.1.attn.heads")])
    found = everything(changed)
    np.testing.assert_array_equal(found["blocks.1.attn.out"], np.broadcast_to(model.weights.blocks[1].out.bias, (T, width(model))))
    dropped = model.changed([patch("blocks.1.attn.out", model.weights.blocks[1].out.bias)])
    np.testing.assert_array_equal(prompt_and_steps(changed), prompt_and_steps(dropped))
    one_by_one = model.changed([ablate(f"blocks.1.attn.heads[:, {h}]") for h in range(sizes(model.config).H)])
    np.testing.assert_array_equal(prompt_and_steps(one_by_one), prompt_and_steps(changed))
    of_nothing = everything(model.changed([ablate("blocks.1.attn.weights")]))
    np.testing.assert_array_equal(of_nothing["blocks.1.attn.heads"], 0)


def close(found: Arrays, expected: Arrays, names: Sequence[str]) -> None:
    """Within what the engine's f32 is of the reference's f64."""
    for name in names:
        a, b = found[name], expected[name]
        assert np.abs(a - b).max() < 2e-3 * np.abs(b).max(), name


def test_without_heads_is_a_model_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    found = everything(load("gpt_oss").changed([ablate("blocks.*.attn.heads")]))
    monkeypatch.setattr(reference, "attention_weights", lambda scores, sinks: np.zeros_like(scores))
    expected = reference.forward(GOLDENS / "gpt_oss" / "baseline", np.array(IDS[:T]))
    close(found, expected, ["blocks.0.resid_mid", "blocks.2.out", "logits"])


def test_scores_that_are_changed_make_other_weights_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head 1 of every block softer, and nobody but itself sees position 2."""
    changes = [scale("blocks.*.attn.scores[1]", 0.25), patch("blocks.*.attn.scores[:, 3:, 2]", -np.inf)]
    found, weigh = everything(load("gpt_oss").changed(changes)), reference.attention_weights

    def weigh_changed(scores: np.ndarray, sinks: np.ndarray) -> np.ndarray:
        scores = scores.copy()
        scores[1] *= 0.25
        scores[:, 3:, 2] = -np.inf
        return weigh(scores, sinks)

    monkeypatch.setattr(reference, "attention_weights", weigh_changed)
    expected = reference.forward(GOLDENS / "gpt_oss" / "baseline", np.array(IDS[:T]))
    close(found, expected, [f"blocks.{i}.attn.{part}" for i in range(3) for part in ("weights", "heads")] + ["logits"])


def test_keys_that_a_query_does_not_see_stay_unseen() -> None:
    model, seen = load("gpt_oss"), np.tril(np.ones((T, T), bool))
    window = seen & ~np.tril(seen, -model.config.sliding_window)
    for i, visible in enumerate((window, seen, window)):
        found = everything(model.changed([patch(f"blocks.{i}.attn.scores", 7), add(f"blocks.{i}.attn.weights", 1)]))
        np.testing.assert_array_equal(found[f"blocks.{i}.attn.scores"], np.broadcast_to(np.where(visible, 7, -np.inf), (8, T, T)))
        np.testing.assert_array_equal(found[f"blocks.{i}.attn.weights"] > 0, np.broadcast_to(visible, (8, T, T)))


@pytest.mark.parametrize("algorithm", ["auto", "all", "budget"])
def test_routing_to_some_experts_is_routing_with_the_others_masked(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    allowed = (1, 2, 4, 5, 7)
    model = load("gpt_oss", moe=algorithm, tokens_per_expert_ratio=8)
    found, route = everything(model.changed([experts(*allowed)])), reference.route
    assert {*found["blocks.1.router.experts"].flat} <= {*allowed}

    def masked(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rest = np.setdiff1d(np.arange(8), allowed)
        logits[:, rest] = -np.inf
        return route(logits, k)

    monkeypatch.setattr(reference, "route", masked)
    expected = reference.forward(GOLDENS / "gpt_oss" / "baseline", np.array(IDS[:T]))
    np.testing.assert_array_equal(found["blocks.2.router.experts"], expected["blocks.2.router.experts"])
    close(found, expected, ["blocks.0.mlp.out", "blocks.2.router.weights", "blocks.2.out", "logits"])


def test_fewer_experts_than_a_token_wants_answer_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "toyllm")
    found = everything(load("gpt_oss").changed([experts(3)]))
    assert caplog.messages == ["--experts 3: a token goes to 4 experts; those that are not allowed weigh 0"]
    np.testing.assert_array_equal(found["blocks.1.router.experts"][:, 0], 3)
    np.testing.assert_array_equal(found["blocks.1.router.weights"], np.broadcast_to([1, 0, 0, 0], (T, 4)))


def test_inside_the_experts_slots_are_in_the_order_of_choice() -> None:
    """Without what its first expert makes of it, a token gets what the others say, and the first one's bias."""
    model = load("gpt_oss", exact=True)
    own, found = everything(model), everything(model.changed([ablate("blocks.2.experts.hidden[:, 0]")]))
    w, chosen = model.weights.blocks[2].experts, own["blocks.2.router.experts"]
    down = reference.read_weights(GOLDENS / "gpt_oss" / "baseline", reference.read_config(GOLDENS / "gpt_oss" / "baseline"))
    first = np.einsum("tf,tdf->td", own["blocks.2.experts.hidden"][:, 0], down["model.layers.2.mlp.experts.down_proj"][chosen[:, 0]])
    expected = own["blocks.2.mlp.out"] - own["blocks.2.router.weights"][:, :1] * first
    assert w.down_bias[chosen[:, 0]].any()
    assert np.abs(found["blocks.2.mlp.out"] - expected).max() < 1e-5 * np.abs(expected).max()
    silent = everything(model.changed([ablate("blocks.2.experts.up"), add("blocks.2.experts.gate[3:5]", 1)]))
    gate = own["blocks.2.experts.gate"] + np.isin(np.arange(T), (3, 4))[:, None, None].astype(np.float32)
    np.testing.assert_array_equal(silent["blocks.2.experts.gate"], gate)
    np.testing.assert_allclose(
        silent["blocks.2.experts.hidden"], reference.activation(gate, np.zeros_like(gate), 7.0), rtol=1e-5, atol=1e-6
    )


def test_experts_and_their_weights_can_be_chosen() -> None:
    model = load("gpt_oss")
    own = everything(model)
    turned = own["blocks.1.router.experts"][:, ::-1]
    found = everything(model.changed([patch("blocks.1.router.experts", turned), patch("blocks.1.router.weights", own)]))
    np.testing.assert_array_equal(found["blocks.1.experts.gate"], own["blocks.1.experts.gate"][:, ::-1])
    both = [patch(f"blocks.1.router.{part}", own[f"blocks.1.router.{part}"][:, ::-1]) for part in ("experts", "weights")]
    np.testing.assert_array_equal(everything(model.changed(both))["blocks.1.mlp.out"], own["blocks.1.mlp.out"])
    token = int(np.flatnonzero((own["blocks.1.router.experts"][:, 1:] == 6).any(1))[0])
    with pytest.raises(ToyllmError, match=rf"^blocks\.1\.router\.experts: the token at position {token} would go to expert 6 twice"):
        model.changed([patch("blocks.1.router.experts[:, 0]", 6)]).logits(IDS[:T])


# causal tracing


def test_a_corrupted_run_goes_back_where_a_clean_residual_is_restored() -> None:
    """Meng et al. 2022: noise on the subject's embedding, then one layer's stream put back; on the model that tells tales."""
    model = toyllm.load("tales-gpt2")
    ids = model.tokenizer.encode("Once upon a time there was a poor man who had three sons, and the eldest of the three")
    clean, noise = everything(model, ids), np.random.default_rng(0).normal(0, 0.5, (5, 256)).astype(np.float32)

    def away(*changes: Change) -> float:
        logits = model.changed(changes, len(ids)).logits(ids)[-1]
        return float(np.abs(logits - clean["logits"][-1]).max())

    subject, last = add("embed[6:11]", noise), add("embed[-1]", noise[0])
    corrupted = away(subject)
    assert min(corrupted, away(last)) > 1
    for i in range(6):
        assert away(subject, patch(f"blocks.{i}.out", clean)) == 0
        assert away(last, patch(f"blocks.{i}.out[-1]", clean)) == 0  # nobody comes after it to carry it on
        assert away(subject, patch(f"blocks.{i}.out[6:11]", clean)) > 0.5  # attention has carried it to later tokens
    assert away(subject, patch("blocks.5.out[6:11]", clean)) == corrupted  # of the last block only the last token is read
    assert away(subject, patch("blocks.5.out[-1]", clean)) == 0


def test_the_references_layer_repairs_the_output_of_a_port_gone_wrong() -> None:
    """One bias of block 1 is off: the reference's blocks.1.out repairs the logits, its blocks.0.out does not."""
    right, port = load("gpt2"), load("gpt2")
    block = port.weights.blocks[1]
    object.__setattr__(block, "up", type(block.up)(block.up.weight, block.up.bias + np.float32(0.3)))
    expected, dump = right.logits(IDS[:T]), everything(right)
    assert not np.allclose(port.logits(IDS[:T]), expected, atol=1e-3)
    assert not np.allclose(port.changed([patch("blocks.0.out", dump)]).logits(IDS[:T]), expected, atol=1e-3)
    np.testing.assert_array_equal(port.changed([patch("blocks.1.out", dump)]).logits(IDS[:T]), expected)


# positions, slices, arrays


def test_an_array_of_some_tokens_leaves_those_behind_it_as_they_are() -> None:
    model, own = load("gpt2"), everything(load("gpt2"), IDS)
    other = everything(model, IDS[::-1][:T])
    found = everything(model.changed([patch("embed", other["embed"][:4])]), IDS)["embed"]
    np.testing.assert_array_equal(found, np.concatenate([other["embed"][:4], own["embed"][4:]]))
    rows = prompt_and_steps(model.changed([patch("blocks.2.out", other["blocks.2.out"])]))
    np.testing.assert_array_equal(rows[0], model.logits(IDS[::-1][:T])[-1])
    np.testing.assert_array_equal(rows[1:], prompt_and_steps(model)[1:])  # of the last block only the token's own row is used


def test_what_is_written_to_keys_and_values_is_what_later_tokens_see() -> None:
    model = load("gpt_oss")
    other = everything(model, IDS[::-1])
    changes = [patch(f"blocks.{i}.attn.{part}[:{T}]", other) for i in range(3) for part in "kv"]
    rows = prompt_and_steps(model.changed(changes))
    alike = [patch(f"blocks.{i}.attn.{part}[:{T}]", other[f"blocks.{i}.attn.{part}"][:T]) for i in range(3) for part in "kv"]
    np.testing.assert_array_equal(prompt_and_steps(model.changed(alike)), rows)
    assert not np.allclose(rows[-1], prompt_and_steps(model)[-1], atol=1e-2)


CASES = [  # where, an array as a function of the whole activation; all write the same elements of blocks.1.attn.q [T, H, Dh]
    ("[5:9, 2]", lambda a: a[5:9, 2]),
    ("[5:9, 2]", lambda a: a),
    ("[5:9, 2:3]", lambda a: a[5:9, 2:3]),
    ("[-12:-8, 2]", lambda a: a[5:9, 2]),
    ("[-12:-8, -1]", lambda a: a),
    ("[5:9, 2, ...]", lambda a: a[:9]),
    ("[5:9, 2, :]", lambda a: a[None]),
    ("[5:9, 2, :]", lambda a: a.reshape(T, -1)),
    (" [ 5 : 9 , 2 ]", lambda a: a.astype(np.float64)),
]


@pytest.mark.parametrize(("where", "take"), CASES, ids=[f"{where} {i}" for i, (where, _) in enumerate(CASES)])
def test_an_array_is_the_part_that_is_written_or_the_whole_of_which_it_is_taken(where: str, take: Any) -> None:
    model = load("gpt2")
    name, other, expected = "blocks.1.attn.q", everything(model, IDS[::-1][:T])["blocks.1.attn.q"], everything(model)["blocks.1.attn.q"]
    expected[5:9, 2] = other[5:9, 2]
    np.testing.assert_array_equal(everything(model.changed([patch(name + where, take(other))], T))[name], expected)


def test_fewer_axes_are_the_same_along_the_others() -> None:
    model, rng = load("gpt2"), np.random.default_rng(0)
    own = everything(model)["blocks.1.attn.heads"]
    H, Dh = own.shape[1:]
    for where, value, expected in [
        ("", row := rng.random(Dh, np.float32), own + row),
        ("", rows := rng.random((H, Dh), np.float32), own + rows),
        ("[:, 1]", row, np.where(np.arange(H)[:, None] == 1, own + row, own)),
        ("[3:]", np.float32(2), np.where(np.arange(T)[:, None, None] >= 3, own + 2, own)),
    ]:
        np.testing.assert_array_equal(
            everything(model.changed([add("blocks.1.attn.heads" + where, value)], T))["blocks.1.attn.heads"], expected
        )
    steered = prompt_and_steps(model.changed([add("blocks.0.out", rng.random(width(model), np.float32))], T))
    assert (steered != prompt_and_steps(model)).any(1).all(), "decode steps too"


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("blocks.*.norm_[12]", ["norm_1", "norm_2"]),
        ("blocks.*.norm_[12][3]", ["norm_1", "norm_2"]),
        ("blocks.*.attn.[qk]", ["attn.q", "attn.k"]),
        ("blocks.*norm_1[0, 0]", ["norm_1"]),
        ("blocks.?.mlp.hidden", ["mlp.hidden"]),
    ],
)
def test_globs_and_slices_are_told_apart(where: str, names: list[str]) -> None:
    changed = load("gpt2").changed([ablate(where)])
    assert [*changed.changes.writes] == [f"blocks.{i}.{name}" for i in range(3) for name in names]
    sliced = where.endswith(("[3]", "[0, 0]"))
    assert {len(writes[0].axes[0]) == 1 for writes in changed.changes.writes.values()} == {sliced}


def test_a_glob_that_means_several_kinds_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "toyllm")
    load("gpt2").changed([scale("blocks.*.out", 0.5), scale("blocks.*.mlp.out", 0.5)])
    assert caplog.messages == ["--scale blocks.*.out=0.5: changes 9 activations: attn.out, mlp.out, out"]


def test_changes_are_made_in_their_order_and_replace_those_before() -> None:
    model, own = load("gpt2"), everything(load("gpt2"))["embed"]
    twice = model.changed([add("embed", 1), scale("embed", 2), patch("embed[3]", 5)])
    expected = (own + 1) * 2
    expected[3] = 5
    np.testing.assert_array_equal(everything(twice)["embed"], expected)
    np.testing.assert_array_equal(everything(twice.changed([add("embed", 1)]))["embed"], own + 1)
    np.testing.assert_array_equal(everything(twice.changed([]))["embed"], own)


def test_a_generation_is_changed_in_prompt_and_continuation() -> None:
    model, settings = load("gpt2"), Settings(max_tokens=6, temperature=0)

    def tokens(model: Any) -> list[int]:
        return [event.token.id for event in model.generate(IDS[:T], settings) if event.token]

    favourite = np.zeros(model.vocab_size, np.float32)
    favourite[11] = 1e4
    assert tokens(model.changed([add("logits", favourite)])) == [11] * 6
    assert tokens(model.changed([add(f"logits[{T + 1}]", favourite)]))[:3] == [*tokens(model)[:2], 11]
    assert tokens(model.changed([ablate("blocks.*.attn.heads[:, 0]")])) != tokens(model)


# what it costs


def test_a_run_without_changes_knows_nothing_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        model = load(family)
        changed = model.changed([])
        logits = model.logits(IDS)
        monkeypatch.setattr(engine, "Tap", None)
        np.testing.assert_array_equal(model.logits(IDS), logits)
        np.testing.assert_array_equal(changed.logits(IDS), logits)
        monkeypatch.undo()


def test_only_what_a_change_needs_is_computed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the layer whose scores are changed; nothing inside experts unless that is changed."""
    from toyllm.models import taps

    model, calls = load("gpt_oss"), []
    softmax, inside = taps.softmax, taps.Inside
    monkeypatch.setattr(taps, "softmax", lambda *arguments: calls.append("softmax") or softmax(*arguments))
    monkeypatch.setattr(taps, "Inside", lambda *arguments: calls.append(arguments[1]) or inside(*arguments))
    model.changed([ablate("blocks.*.attn.heads[:, 0]"), scale("blocks.*.router.logits", 2)]).logits(IDS[:T])
    assert calls == []
    model.changed([scale("blocks.1.attn.weights", 2), ablate("blocks.2.experts.up")]).logits(IDS[:T])
    assert calls == ["softmax", "blocks.2"]


def test_heads_whose_weights_are_not_changed_keep_their_bits() -> None:
    model = load("gpt_oss")
    own, found = everything(model), everything(model.changed([ablate("blocks.0.attn.weights[3, 9:12]")]))
    changed = (own["blocks.0.attn.heads"] != found["blocks.0.attn.heads"]).any(-1)
    assert np.argwhere(changed).tolist() == [[9, 3], [10, 3], [11, 3]]
