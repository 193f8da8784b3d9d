"""Tensors read on demand: parts and pieces of arrays and weights, and MXFP4 decoded block by block, are NumPy's and ml_dtypes' values."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from toyllm.models.checkpoint import Checkpoint, open_checkpoint
from toyllm.models.location import find_model
from toyllm.models.mxfp4_blocks import stored_blocks
from toyllm.models.tensor_values import Values, cuts, of_array, weights

E, R, N = 3, 4, 5  # experts, rows, blocks a row


def open_tensors(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(find_model(str(tmp_path / "model.safetensors")))


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Checkpoint, np.ndarray]:
    """A checkpoint with gate_up_proj in MXFP4, and its values f32 [E, R, 32 N], from ml_dtypes."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (E, R, N, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (E, R, N), dtype=np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(E, R, N, 32).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = codes * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales, "bias": np.ones(3, np.float32)}
    return open_tensors(tmp_path, tensors), expected.reshape(E, R, N * 32)


def decoded(checkpoint: Checkpoint) -> Values:
    return weights(checkpoint)["experts.gate_up_proj"]


@given(shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), limit=st.integers(1, 40))
def test_pieces_follow_one_another_and_are_all(shape: tuple[int, ...], limit: int) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    pieces = list(of_array("x", array).pieces(limit))
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in pieces]) if pieces else np.empty(0), array.ravel())
    assert all(0 < piece.size <= limit for piece in pieces)


def test_pieces_are_as_large_as_they_may_be() -> None:
    assert len(list(cuts((4, 10, 10), 1000))) == 1
    assert len(list(cuts((4, 10, 10), 100))) == 4
    assert len(list(cuts((4, 10, 10), 20))) == 20


@pytest.mark.parametrize(
    "text", [None, "0", "-1, ::2", "..., 5", ":, :, 31:33", ":, 1::2, ::-7", "2, 3, 150:3:-33", "..., 40:40", "1, 2, 3", ":, :, 64:"]
)
def test_mxfp4_is_decoded_where_it_is_wanted(mxfp4: tuple[Checkpoint, np.ndarray], text: str | None) -> None:
    checkpoint, expected = mxfp4
    values = decoded(checkpoint)
    assert (values.kind, values.shape, values.nbytes) == ("MXFP4", expected.shape, E * R * N * 17)
    selected = eval(f"expected[{text or '...'}]", {"expected": expected})
    np.testing.assert_array_equal(values.part(text).read(), selected, strict=True)
    pieces = [p.ravel() for p in values.part(text).pieces(50)]
    np.testing.assert_array_equal(np.concatenate([*pieces, np.empty(0)]), selected.ravel())


def test_only_the_blocks_that_are_wanted_are_decoded(mxfp4: tuple[Checkpoint, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = decoded.__globals__["weights"].__globals__["dequantize_reference"]
    monkeypatch.setattr(
        "toyllm.models.tensor_values.dequantize_reference", lambda blocks, scales: seen.append(scales.shape) or real(blocks, scales)
    )
    decoded(mxfp4[0]).part("1, 2:4, 33:70").read()
    assert seen == [(1, 2, 2)]


def test_every_weight_is_listed_with_the_decoded_ones(mxfp4: tuple[Checkpoint, np.ndarray]) -> None:
    assert {name: v.kind for name, v in weights(mxfp4[0]).items()} == {
        "experts.gate_up_proj_blocks": "U8",
        "experts.gate_up_proj_scales": "U8",
        "bias": "F32",
        "experts.gate_up_proj": "MXFP4",
    }


def test_openai_names_are_decoded_too(tmp_path: Path) -> None:
    tensors = {"mlp.mlp1_weight.blocks": np.zeros((2, 4, 1, 16), np.uint8), "mlp.mlp1_weight.scales": np.zeros((2, 4, 1), np.uint8)}
    checkpoint = open_tensors(tmp_path, tensors)
    values = weights(checkpoint)["mlp.mlp1_weight"]
    assert values.shape == (2, 4, 32)
    assert [block.part for block in stored_blocks(checkpoint, values.part("0"), None) if block] == ["gate 0", "up 0", "gate 1", "up 1"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"w_blocks": np.zeros((2, 1, 16), np.uint8)},
        {"w_blocks": np.zeros((2, 1, 16), np.uint8), "w_scales": np.zeros((2, 2), np.uint8)},
        {"w_blocks": np.zeros((2, 1, 8), np.uint8), "w_scales": np.zeros((2, 1), np.uint8)},
        {"w_blocks": np.zeros((2, 1, 16), np.int8), "w_scales": np.zeros((2, 1), np.uint8)},
        {"w_blocks": np.zeros(16, np.uint8), "w_scales": np.zeros((), np.uint8)},
    ],
)
def test_what_only_looks_like_mxfp4_is_left_as_it_is(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    assert weights(open_tensors(tmp_path, tensors)).keys() == tensors.keys()


def test_a_stored_tensor_is_never_hidden_by_a_decoded_one(tmp_path: Path) -> None:
    tensors = {"w_blocks": np.zeros((2, 1, 16), np.uint8), "w_scales": np.zeros((2, 1), np.uint8), "w": np.ones(1, np.float32)}
    assert weights(open_tensors(tmp_path, tensors))["w"].kind == "F32"


def test_blocks_come_with_their_scale_gate_and_up_told_apart(mxfp4: tuple[Checkpoint, np.ndarray]) -> None:
    checkpoint, _ = mxfp4
    blocks, scales = (checkpoint.array(f"experts.gate_up_proj_{part}") for part in ("blocks", "scales"))
    found = list(stored_blocks(checkpoint, decoded(checkpoint).part("1, :, 40:100"), None))
    assert [(b.index, b.first, b.part) for b in found if b][:4] == [
        ((1, 0), 32, "gate 0"),
        ((1, 0), 64, "gate 0"),
        ((1, 0), 96, "gate 0"),
        ((1, 1), 32, "up 0"),
    ]
    for b in found:
        assert b
        assert b.codes == blocks[(*b.index, b.first // 32)].tobytes()
        assert b.scale == scales[(*b.index, b.first // 32)]


def test_blocks_are_cut_like_everything_else(mxfp4: tuple[Checkpoint, np.ndarray]) -> None:
    found = list(stored_blocks(mxfp4[0], decoded(mxfp4[0]).part("0, 0"), 1))
    assert [b and b.first for b in found] == [0, None, 128]
    assert str(found[0]).startswith("[0, 0, 0:32]  gate 0  scale 0x")


def test_a_scale_of_255_is_called_nan(tmp_path: Path) -> None:
    checkpoint = open_tensors(tmp_path, {"w_blocks": np.full((1, 1, 16), 0x21, np.uint8), "w_scales": np.full((1, 1), 255, np.uint8)})
    values = weights(checkpoint)["w"]
    assert np.isnan(values.read()).all()
    assert [str(b) for b in stored_blocks(checkpoint, values, None)] == ["[0, 0:32]  scale 0xff NaN  codes " + " ".join(["21"] * 16)]
