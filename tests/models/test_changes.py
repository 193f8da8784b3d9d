"""Changes of a run: what is written is what is computed with, at every name, by slice, glob and position; without any, nothing is new."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import model as engine
from toyllm.models.activations import record
from toyllm.models.changes import Change, ablate, add, experts, patch, read_value, scale
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
    model = load("gpt_oss")
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
    assert tokens(model.changed([add(f"logits[{T + 1}]", favourite)])) == [
        *tokens(model)[:2],
        11,
        *tokens(model.changed([add(f"logits[{T + 1}]", favourite)]))[3:],
    ]
    assert tokens(model.changed([ablate("blocks.*.attn.heads[:, 0]")])) != tokens(model)


# files


def test_files_hold_one_array_or_those_of_many_names(tmp_path: Path) -> None:
    model = load("gpt2")
    other = everything(model, IDS[::-1][:T])
    np.save(tmp_path / "a.npy", other["blocks.1.out"])
    np.savez(tmp_path / "a.npz", ids=np.array(IDS[::-1][:T]), **{name: array[None] for name, array in other.items()})
    save_file({"theirs.1": other["blocks.1.out"].astype(np.float16)}, tmp_path / "a.safetensors")
    (tmp_path / "map.toml").write_text('"theirs.{i}" = "blocks.{i}.out"')
    expected = model.logits(IDS[::-1][:T])
    for file, near in (("a.npy", 0), ("a.npz", 0), ("a.safetensors", 1e-2)):
        value = read_value(tmp_path / file, tmp_path / "map.toml" if near else None)
        np.testing.assert_allclose(model.changed([patch("blocks.1.out", value)]).logits(IDS[:T]), expected, atol=near, rtol=0)
    with pytest.raises(ToyllmError, match=r"^--patch blocks\.2\.out=x: it has no blocks\.2\.out$"):
        model.changed([patch("blocks.2.out", read_value(tmp_path / "a.safetensors", tmp_path / "map.toml"), "x")])


@pytest.mark.parametrize(
    "content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + b"\n."]
)
def test_a_file_that_is_no_array_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ToyllmError, match=r"a\.npy: cannot be read \([^\n]*\); expected a \.npy, \.npz or \.safetensors file, or a number"):
        read_value(tmp_path / "a.npy")
    with pytest.raises(ToyllmError, match=r"b\.npy: cannot be read \(No such file or directory\)"):
        read_value(tmp_path / "b.npy")


# refusals


def nan_at(*shape: int) -> np.ndarray:
    array = np.zeros(shape)
    array[(1,) * len(shape)] = np.nan
    return array


THERE = r"there are embed, blocks\.0-2\.\(norm_1 attn\.q .*mlp\.hidden mlp\.out out\), norm_f, logits$"
REFUSED = [
    (ablate("blocks.3.out"), r"no activation of this model is called 'blocks\.3\.out'; did you mean blocks\.\d\.out or .*\? " + THERE),
    (ablate("zzz"), rf"called 'zzz'; {THERE}"),
    (ablate("blocks.0.router.logits"), r"called 'blocks\.0\.router\.logits'"),
    (experts(3), r"^--experts 3: this model has no mixture of experts$"),
    (
        ablate("blocks.0.attn.heads[:, 3]"),
        r"^--ablate blocks\.0\.attn\.heads\[:, 3\]: '3' at axis 1 of .*, length 3: expected an index from -3 to 2$",
    ),
    (ablate("embed[0, 0, 0]"), r"3 axes, but embed has 2: shape \[20, 24\]"),
    (ablate("embed[x]"), r"^--ablate embed\[x\]: 'x' at axis 0 of embed: expected an index, start:stop"),
    (ablate("embed[20]"), r"'20' at axis 0 of embed: expected one of the run's positions, 0 to 19"),
    (ablate("embed[-18]"), r"'-18' at axis 0 of embed: expected one of the run's positions"),
    (ablate("embed[25:]"), r"'25:' at axis 0 of embed: takes nothing of the 20 positions of the run"),
    (ablate("embed[:, 24:]"), r"'24:' at axis 1 of embed: takes nothing of the 24 there are"),
    (ablate("embed[:, ::-1]"), r"'::-1' at axis 1 of embed: expected ascending places"),
    (ablate("embed[::0]"), "the step cannot be 0"),
    (
        patch("embed", np.zeros((21, 24))),
        r"^--patch embed=\(array\): found shape \[21, 24\], expected \[T, 24\], or their last axes; T up to 20$",
    ),
    (patch("embed", np.zeros((3, 2, 24))), r"found shape \[3, 2, 24\]"),
    (patch("embed", np.zeros((0, 24))), r"found shape \[0, 24\]"),
    (
        patch("blocks.*.attn.q[4:7, 1]", np.zeros((2, 4)), "x.npy"),
        r"=x\.npy: blocks\.0\.attn\.q: found shape \[2, 4\], expected \[3, 8\] or, whole, \[T, 3, 8\], or their last axes; T up to 20$",
    ),
    (patch("embed[5:9]", np.zeros((8, 24))), r"found shape \[8, 24\], expected \[4, 24\] or, whole, \[T, 24\]"),
    (patch("embed", nan_at(3, 24)), r"expected numbers of f32, found nan at \[1, 1\] of what is written"),
    (patch("embed", np.full((3, 24), 1e300)), r"found 1e\+300 at \[0, 0\]"),
    (patch("embed", np.zeros((3, 24), complex)), "expected numbers, found dtype complex128"),
    (patch("embed", {"logits": np.zeros(3)}), "it has no embed"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, Change) else "")
def test_what_does_not_fit_is_one_line_before_anything_runs(change: Change, message: str) -> None:
    with pytest.raises(ToyllmError) as refused:
        load("gpt2").changed([change], T, T + DECODED)
    assert re.search(message, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (experts(3, 8), r"^--experts 3,8: expected numbers from 0 to 7, this model's experts$"),
        (experts(), "expected numbers from 0 to 7"),
        (ablate("blocks.0.router.experts"), "patch them, ablate router.weights, or take --experts"),
        (patch("blocks.0.router.experts[:, 0]", 8), "expected whole numbers from 0 to 7"),
        (patch("blocks.0.router.experts[:, 0]", 1.5), "expected whole numbers"),
        (patch("blocks.0.router.experts[:, 0]", np.inf), "expected whole numbers"),
        (patch("blocks.0.router.experts", np.zeros((3, 4))), "expected whole numbers"),
        (ablate("blocks.0.mlp.hidden"), "no activation of this model"),
    ],
)
def test_what_a_mixture_refuses(change: Change, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        load("gpt_oss").changed([change])


def test_a_budget_disregards_what_a_token_chose() -> None:
    model = load("gpt_oss", moe="budget")
    for name in ("router.weights", "experts.up"):
        with pytest.raises(
            ToyllmError, match=rf"--moe budget moves and drops tokens by router\.logits alone, whatever blocks\.0\.{name} are"
        ):
            model.changed([ablate(f"blocks.*.{name}")])
    model.changed([ablate("blocks.*.router.logits")])


def test_a_negative_position_needs_a_prompt_to_count_back_from() -> None:
    with pytest.raises(
        ToyllmError, match=r"'-1' at axis 0 of embed: a negative position counts back from a prompt's end, and here is none"
    ):
        load("gpt2").changed([ablate("embed[-1]")])


def test_a_number_may_be_nan_which_is_then_meant() -> None:
    """What is computed from it is NaN, and nothing else: here all from position 5 on."""
    logits = load("gpt2").changed([patch("blocks.1.attn.v[5, 0, 0]", np.nan)]).logits(IDS[:T])
    np.testing.assert_array_equal(np.isnan(logits).any(1), np.arange(T) >= 5)


def test_scores_are_changed_in_one_sequence_at_a_time() -> None:
    model = load("gpt2")
    batch = ([1, 2], [0, 0], [0, 1])
    changed = model.changed([ablate("blocks.0.attn.scores")])
    with pytest.raises(ToyllmError, match=r"sequences: expected one at a time where attn\.scores or attn\.weights are changed"):
        changed.forward(*batch, model.new_cache(4, 2))
    both = model.changed([scale("blocks.0.attn.heads", 0.5)]).forward(*batch, model.new_cache(4, 2), all_logits=True)
    alone = model.changed([scale("blocks.0.attn.heads", 0.5)]).logits([2])
    np.testing.assert_array_equal(both[1], alone[0])


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
