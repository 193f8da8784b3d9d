"""Changes of a run as they are given: files of arrays, and everything that does not fit, in one line before anything runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from toyllm.kernels.errors import ToyllmError
from toyllm.models.changes import Change, ablate, experts, patch, read_value, scale

from .test_changes import DECODED, IDS, T, everything, load

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
