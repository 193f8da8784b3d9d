"""What a cache holds: prompts are resumed, windows are found again, and a full context goes on as a plain run over what is kept would."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.models.cache import DTYPES
from toyllm.models.gpt_oss import frequencies
from toyllm.models.held import Held, common_prefix, members, windowed
from toyllm.models.model import Model

harmony_model = runpy.run_path(str(Path(__file__).parents[1] / "harmony_model.py"))
WINDOW = 16  # of the sliding layers of `small`
LOADED: dict[tuple[Any, ...], Model] = {}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small random gpt-oss: one layer slides over 16 positions, one sees all."""
    path: Path = tmp_path_factory.mktemp("harmony")
    harmony_model["maker"]().write_checkpoint(path)
    return toyllm.load(str(path), poison_cache=True)


def tales(name: str, **options: Any) -> Model:
    key = (name, *options.items())
    if key not in LOADED:
        LOADED[key] = toyllm.load(name, poison_cache=True, **options)
    return LOADED[key]


def some_ids(model: Model, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def fresh(model: Model, ids: list[int], room: int) -> Held:
    held = Held(model, room)
    held.read(ids)
    return held


def bits(logits: np.ndarray) -> np.ndarray:
    return logits.view(np.uint32).copy()


def one_by_one(held: Held, ids: list[int]) -> None:
    for i in ids:
        held.read([i])


@pytest.mark.parametrize(("a", "b", "n"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)])
def test_the_common_prefix_of_two_texts(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == n


# Stepping back


def test_a_prompt_is_resumed_where_it_first_differs_and_one_token_is_left_to_read() -> None:
    model = tales("tales-gpt2")
    ids = some_ids(model, 40)
    held = fresh(model, ids, 128)
    assert held.resume([*ids[:30], 7, 8]) == 30
    assert held.ids == ids[:30]
    assert held.resume(ids[:20]) == 19
    np.testing.assert_array_equal(bits(held.read(ids[19:20])), bits(Held(model, 128).read(ids[:20])))
    assert held.resume([(ids[0] + 1) % model.vocab_size, 3]) == 0
    assert held.ids == []


@pytest.mark.parametrize("answer", [1, 5, WINDOW, 100])
def test_the_mark_is_found_however_far_a_window_has_moved_on(small: Model, answer: int) -> None:
    ids, more = some_ids(small, 50), some_ids(small, answer, 2)
    held = fresh(small, ids, 512)
    held.mark()
    one_by_one(held, more)
    assert held.step_back(50) == 50
    np.testing.assert_array_equal(bits(held.read([3, 4])), bits(fresh(small, ids, 512).read([3, 4])))
    one_by_one(held, more)  # and once more: the mark has stayed
    assert held.resume([*ids, 9]) == 50
    np.testing.assert_array_equal(bits(held.read([9])), bits(fresh(small, ids, 512).read([9])))


def test_without_a_mark_a_window_that_has_moved_on_is_read_anew(small: Model) -> None:
    ids = some_ids(small, 100)
    held = Held(small, 512)
    one_by_one(held, ids)
    assert held.step_back(99) == 99, "one token can be taken back always"
    assert held.step_back(60) == 0
    held = fresh(small, ids[:50], 512)
    held.mark()
    one_by_one(held, ids[50:])
    assert held.step_back(40) == 0, "the mark lies behind it"
    np.testing.assert_array_equal(bits(held.read(ids)), bits(Held(small, 512).read(ids)))


def test_windows_that_were_made_to_step_back_do_so_without_a_mark(small: Model) -> None:
    ids = some_ids(small, 150)
    held = Held(small, 512, back=50)
    one_by_one(held, ids)
    other = Held(small, 512)
    other.restore(held.ids, held.states())  # more of a window than this one keeps
    np.testing.assert_array_equal(bits(other.read([9])), bits(fresh(small, ids, 512).read([9])))
    assert held.step_back(100) == 100
    np.testing.assert_array_equal(bits(held.read([9])), bits(fresh(small, ids[:100], 512).read([9])))
    held.step_back(100)
    assert held.step_back(40) == 0


def test_a_mark_costs_the_windows_and_nothing_else(small: Model) -> None:
    held = fresh(small, some_ids(small, 200), 512)
    held.mark()
    ((length, states),) = held._marks
    assert length == 200
    sizes = [sum(array.nbytes for array in state[1:]) if state else 0 for state in states]
    cell = 2 * 2 * 16 * 4  # a layer's keys and values of two heads of 16
    assert sizes == [WINDOW * cell if windowed(member) else 0 for member in members(held.cache)]
    assert sum(sizes) == WINDOW * cell


def test_the_first_mark_and_the_latest_are_kept(small: Model) -> None:
    ids = some_ids(small, 200)
    held = Held(small, 512)
    for i in range(0, 200, 50):
        held.read(ids[i : i + 50])
        held.mark()
    assert held.step_back(120) == 50, "those at 100 and 150 have made way for the one at 200"
    np.testing.assert_array_equal(bits(held.read([9])), bits(fresh(small, ids[:50], 512).read([9])))


def test_the_opening_is_marked_when_it_is_read_and_found_again(small: Model) -> None:
    ids, other = some_ids(small, 100), some_ids(small, 100, 2)
    held = Held(small, 512, opening=30)
    np.testing.assert_array_equal(bits(held.read(ids)), bits(Held(small, 512).read(ids)))
    for seed in (3, 4):
        one_by_one(held, other)
        rest = [(ids[30] + seed) % small.vocab_size, *some_ids(small, 60, seed)]
        assert held.resume([*ids[:30], *rest]) == 30
        np.testing.assert_array_equal(bits(held.read(rest)), bits(fresh(small, ids[:30], 512).read(rest)))
    full, marked = Held(small, 64), Held(small, 64, opening=30)
    for each in (full, marked):
        one_by_one(each, [*ids[:30], *other[:34]])
        each.shift(32)
    assert marked.resume(ids) == 30, "what is kept of a full context keeps its mark"
    assert full.resume(ids) == 0


@pytest.mark.parametrize("where", ["remove", "restore"])
def test_an_interrupt_while_stepping_back_leaves_nothing_that_is_wrong(small: Model, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(small, 50)
    held = fresh(small, ids, 512)
    held.mark()
    one_by_one(held, some_ids(small, 60, 2))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    last = members(held.cache)[0]
    monkeypatch.setattr(last, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.step_back(50)
    monkeypatch.undo()
    assert held.resume(ids) == 0
    np.testing.assert_array_equal(bits(held.read(ids)), bits(Held(small, 512).read(ids)))


# A full context


@pytest.mark.parametrize("keep", [0, 1, 10, 62])
def test_a_shifted_gpt2_is_a_plain_run_over_what_is_kept(keep: int) -> None:
    model, room = tales("tales-gpt2"), 64
    ids = some_ids(model, room)
    held = Held(model, room)
    one_by_one(held, ids)
    half = (room - keep) // 2
    assert held.shift(keep) == ids[keep : keep + half]
    rest = ids[:keep] + ids[keep + half :]
    assert held.ids == rest
    np.testing.assert_array_equal(bits(held.read([5])), bits(fresh(model, rest, room).read([5])))


def turned(keys: np.ndarray, model: Model, by: int) -> np.ndarray:
    """Keys f32 [..., Dh] as they are `by` positions on: each pair of numbers turned by its own angle, in f64."""
    inverse, _ = frequencies(model.config)
    cos, sin = np.cos(by * inverse), np.sin(by * inverse)
    if model.config.hf_rope_impl:
        a, b = np.split(keys.astype(np.float64), 2, axis=-1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
    a, b = keys[..., 0::2].astype(np.float64), keys[..., 1::2].astype(np.float64)
    return np.stack((a * cos - b * sin, b * cos + a * sin), -1).reshape(keys.shape)


@pytest.mark.parametrize("keep", [0, 7, 60])
def test_a_shifted_gpt_oss_has_its_keys_turned_and_all_else_as_it_was(keep: int) -> None:
    model, room = tales("tales-gpt-oss"), 512
    ids = some_ids(model, room)
    held = fresh(model, ids, room)
    before = [member.state(0) for member in members(held.cache)]
    passes, half = held.passes, (room - keep) // 2
    held.shift(keep)
    assert held.passes == passes, "nothing was read anew"
    assert held.ids == ids[:keep] + ids[keep + half :]
    for (positions, keys, values), (old, old_keys, old_values) in zip(
        (member.state(0) for member in members(held.cache)), before, strict=True
    ):
        stay, move = old < keep, old >= keep + half
        np.testing.assert_array_equal(positions, np.concatenate((old[stay], old[move] - half)))
        np.testing.assert_array_equal(values, np.concatenate((old_values[:, :, stay], old_values[:, :, move]), 2))
        n = stay.sum()
        np.testing.assert_array_equal(keys[:, :, :n], old_keys[:, :, stay])
        expected = turned(old_keys[:, :, move], model, -half)
        assert np.abs(keys[:, :, n:] - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.isfinite(held.read([5])).all(), "and no cell is read that was never written"


def test_where_a_window_needs_what_it_has_forgotten_all_that_is_kept_is_read_anew(small: Model) -> None:
    room, keep = 24, 4
    ids = some_ids(small, room)
    held = Held(small, room)
    one_by_one(held, ids)
    held.next = 7
    held.shift(keep)
    rest = ids[:4] + ids[14:]
    assert (held.ids, held.text) == (rest, [*rest, 7])
    np.testing.assert_array_equal(bits(held.read([5])), bits(fresh(small, rest, room).read([5])))


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_an_interrupt_while_shifting_leaves_nothing_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tales(name)
    ids = some_ids(model, 64)
    held = fresh(model, ids, 64)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((held.cache, "can_resume") if name == "tales-gpt-oss" else (held, "read")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.shift(4)
    monkeypatch.undo()
    assert held.resume(ids) == 0
    np.testing.assert_array_equal(bits(held.read(ids)), bits(Held(model, 64).read(ids)))


# Saved and restored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
@pytest.mark.parametrize("shifted", [False, True])
def test_what_is_restored_goes_on_bit_for_bit(name: str, dtype: str, shifted: bool) -> None:
    model, room = tales(name, cache_dtype=dtype), 512
    held = fresh(model, some_ids(model, room if shifted else 300), room)
    one_by_one(held, [1, 2, 3] if not shifted else [])
    if shifted:
        held.shift(5)
    other = fresh(model, some_ids(model, 20, 9), room)
    other.restore(held.ids, held.states())
    assert other.ids == held.ids
    for i in some_ids(model, 70, 3):
        np.testing.assert_array_equal(bits(held.read([i])), bits(other.read([i])))
    tail = some_ids(model, 90, 4)
    np.testing.assert_array_equal(bits(held.read(tail)), bits(other.read(tail)))
