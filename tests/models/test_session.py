"""Sessions in files: what goes on is what would have gone on, and nothing in a file is believed, or written over, before it is checked."""

import hashlib
import json
import os
import runpy
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import DTYPES
from toyllm.models.changes import Change
from toyllm.models.chat import Conversation
from toyllm.models.generation import Settings, generate
from toyllm.models.harmony import Message
from toyllm.models.held import Held
from toyllm.models.model import Model
from toyllm.models.session import FORMAT, SessionFile, Talk, checksum, fingerprint, made_with, write

harmony_model = runpy.run_path(str(Path(__file__).parents[1] / "harmony_model.py"))
OPENING: dict[str, str | None] = {"reasoning": "low", "date": None, "instructions": "Rhyme."}
MESSAGES = (Message("user", "Hello, 👋"), Message("assistant", "Easy.", "analysis"), Message("assistant", "4.", "final"))
LOADED: dict[tuple[Any, ...], Model] = {}


def tales(name: str, **options: Any) -> Model:
    key = (name, *options.items())
    if key not in LOADED:
        LOADED[key] = toyllm.load(name, poison_cache=True, **options)
    return LOADED[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("harmony")
    harmony_model["maker"]().write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def small(folder: Path) -> Model:
    """A small random gpt-oss that can chat."""
    return toyllm.load(str(folder), poison_cache=True)


def some_ids(model: Model, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def holding(model: Model, ids: list[int], room: int = 512) -> Held:
    held = Held(model, room)
    held.read(ids)
    return held


def restored(path: Path, model: Model, room: int = 512) -> Held:
    session = SessionFile(path, model).session
    assert session
    held = Held(model, room)
    held.restore(session.ids, session.states)
    return held


def bits(logits: np.ndarray) -> np.ndarray:
    return logits.view(np.uint32).copy()


# What goes on


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_a_restored_session_goes_on_as_if_it_had_never_stopped(tmp_path: Path, name: str, dtype: str) -> None:
    model, path = tales(name, cache_dtype=dtype), tmp_path / "s"
    held = holding(model, some_ids(model, 200))
    for i in some_ids(model, 40, 2):
        held.read([i])
    held.next = 5
    SessionFile(path, model).save(held)
    again = restored(path, toyllm.load(name, cache_dtype=dtype, poison_cache=True))
    assert (again.ids, again.next) == (held.ids, 5)
    for i in [5, *some_ids(model, 70, 3)]:
        np.testing.assert_array_equal(bits(held.read([i])), bits(again.read([i])))


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_two_greedy_runs_with_a_session_between_are_one(tmp_path: Path, name: str) -> None:
    model, path = tales(name), tmp_path / "s"
    prompt = some_ids(model, 30)

    def tokens(ids: list[int], n: int, held: Held) -> list[int]:
        settings = Settings(max_tokens=n, temperature=0, seed=0)
        return [event.token.id for event in generate(model, ids, settings, held=held) if event.token]

    whole = tokens(prompt, 60, Held(model, 512))
    held = Held(model, 512)
    first = tokens(prompt, 25, held)
    SessionFile(path, model).save(held)
    again = restored(path, model)
    assert again.text == prompt + first
    assert first + tokens(again.text, 35, again) == whole


def test_a_conversation_goes_on_where_it_ended(tmp_path: Path, small: Model) -> None:
    path, settings = tmp_path / "s", Settings(max_tokens=40, temperature=0.9, seed=5, logprobs=3)

    def answer(conversation: Conversation, question: str) -> tuple[list[Any], int]:
        events = list(conversation.ask(question))
        assert events[-1].result
        return [event.token for event in events if event.token], events[-1].result.reused_tokens or 0

    one, other = (Conversation(small, settings, context=1024) for _ in range(2))
    for question in ("Hello", "Who?"):
        assert answer(one, question) == answer(other, question)
    SessionFile(path, small, talks=True).save(one.held, Talk(OPENING, tuple(one.messages[1:]), one.turns))
    session = SessionFile(path, small, talks=True).session
    assert session
    assert session.talk
    assert session.talk.opening == OPENING
    again = Conversation(small, settings, context=1024)
    again.restore(session)
    assert (again.messages, again.turns) == (other.messages, 2)
    expected = answer(other, "What?")
    assert answer(again, "What?") == expected
    assert expected[1] > 200, "what was read need not be read again"


def test_text_of_any_kind_comes_back_as_it_was(tmp_path: Path, small: Model) -> None:
    messages = (
        *MESSAGES,
        Message("assistant", "{}", "commentary", "functions.now", "<|constrain|>json"),
        Message("user", "<|end|>\x1b[2J\0"),
    )
    path = tmp_path / "s"
    SessionFile(path, small, talks=True).save(Held(small, 64), Talk(OPENING, messages, 7))
    session = SessionFile(path, small, talks=True).session
    assert session
    assert session.talk == Talk(OPENING, messages, 7)
    assert (session.ids, [len(state[0]) for state in session.states]) == ([], [0, 0])


def test_nan_is_data(tmp_path: Path) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "s"
    held = holding(model, some_ids(model, 9))
    positions, keys, values = held.states()[0]
    keys[0, 0, 3], values[:] = np.nan, np.inf
    held.restore(held.ids, [(positions, keys, values)])
    SessionFile(path, model).save(held)
    _, found, infinite = restored(path, model).states()[0]
    np.testing.assert_array_equal(found, keys)
    np.testing.assert_array_equal(infinite, values)


def test_the_file_is_what_the_safetensors_library_reads_and_only_its_owner_does(tmp_path: Path, small: Model) -> None:
    path = tmp_path / "s"
    held = holding(small, some_ids(small, 100))
    SessionFile(path, small).save(held)
    found = load_file(path)
    assert {name: array.shape for name, array in found.items()} == {
        "ids": (100,),
        "0.positions": (16,),
        "0.keys": (1, 2, 16, 16),
        "0.values": (1, 2, 16, 16),
        "1.positions": (100,),
        "1.keys": (1, 2, 100, 16),
        "1.values": (1, 2, 100, 16),
    }
    assert found["ids"].tolist() == held.ids
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Where it is written


def test_a_turn_replaces_the_file_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "s"
    file, held = SessionFile(path, model), holding(model, [1, 2, 3])
    file.save(held)
    path.chmod(0o640)
    before = path.read_bytes()
    with path.open("rb") as opened:
        held.read([4])
        file = SessionFile(path, model)
        file.save(held)
        assert opened.read() == before, "who reads it meanwhile reads what was there"
    held.read([5])
    file.save(held)
    assert restored(path, model).ids == [1, 2, 3, 4, 5]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "real"
    (tmp_path / "link").symlink_to("real")
    for n in (1, 2):
        SessionFile(tmp_path / "link", model).save(holding(model, [1] * n))
        assert (tmp_path / "link").is_symlink()
        assert len(restored(path, model).ids) == n


def test_a_file_that_another_program_has_written_meanwhile_is_left_alone(tmp_path: Path) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "s"
    one, other = SessionFile(path, model), SessionFile(path, model)
    one.save(holding(model, [1]))
    with pytest.raises(ToyllmError, match=r"s: another program has written or removed it since .* give another --session$"):
        other.save(holding(model, [2]))
    assert restored(path, model).ids == [1]


def test_an_interrupt_while_saving_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "s"
    file, held = SessionFile(path, model), holding(model, [1, 2, 3])
    file.save(held)
    held.read([4])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("toyllm.models.session.data_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.save(held)
    monkeypatch.undo()
    assert restored(path, model).ids == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]
    file.save(held)
    assert restored(path, model).ids == [1, 2, 3, 4]


def test_a_place_that_is_none_is_said_at_once(tmp_path: Path) -> None:
    model = tales("tales-gpt2")
    with pytest.raises(ToyllmError, match=r"no folder .*nowhere to write to"):
        SessionFile(tmp_path / "nowhere" / "s", model)
    with pytest.raises(ToyllmError, match="a folder, where a file is expected"):
        SessionFile(tmp_path, model)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ToyllmError, match="a device or pipe, where a file is expected"):
        SessionFile(tmp_path / "pipe", model)


# Which model


def test_the_fingerprint_is_the_models_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    assert fingerprint(toyllm.load(str(folder))) == fingerprint(toyllm.load(str(shutil.copytree(folder, tmp_path / "copy"))))


@pytest.mark.parametrize("change", ["first byte", "last byte", "configuration", "name"])
def test_a_change_of_the_model_is_another_fingerprint(folder: Path, tmp_path: Path, change: str) -> None:
    path = shutil.copytree(folder, tmp_path / "other")
    weights, config = path / "model.safetensors", path / "config.json"
    data = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    if change == "configuration":
        config.write_text(config.read_text().replace('"rope_theta": 150000', '"rope_theta": 10000'))
    elif change == "name":
        weights.write_bytes(bytes(data).replace(b"model.norm.weight", b"model.norm.Weight", 1))
        model = toyllm.load(str(folder))
        model.checkpoint = toyllm.models.checkpoint.map_files([weights])
        assert fingerprint(model) != fingerprint(toyllm.load(str(folder)))
        return
    else:
        data[begin if change == "first byte" else -1] ^= 1
        weights.write_bytes(data)
    assert fingerprint(toyllm.load(str(path))) != fingerprint(toyllm.load(str(folder)))


def test_a_session_of_another_model_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    SessionFile(path, tales("tales-gpt2")).save(holding(tales("tales-gpt2"), [1, 2]))
    before = path.read_bytes()
    with pytest.raises(ToyllmError, match=r"s: a session of another model, 'tales-gpt2', not of tales-gpt-oss; give another --session$"):
        SessionFile(path, tales("tales-gpt-oss"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "bf16"}, "made with --cache-dtype f32, and this run has bf16"),
        ({"weights": "q8"}, "made with --weights stored, and this run has q8"),
        ({"exact": True}, "made with --exact no, and this run has yes"),
        ({"activations": "bf16"}, "made with --activations f32, and this run has bf16"),
        ({"moe": "budget"}, r"made with --moe auto, and this run has budget, --tokens-per-expert-ratio 1\.0"),
    ],
)
def test_keys_and_values_made_in_another_way_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "s"
    SessionFile(path, tales("tales-gpt-oss")).save(holding(tales("tales-gpt-oss"), [1, 2]))
    with pytest.raises(ToyllmError, match=rf"s: {message}; give the same, or another --session$"):
        SessionFile(path, toyllm.load("tales-gpt-oss", **options))


def test_a_text_is_no_conversation_and_a_conversation_no_text(tmp_path: Path, small: Model) -> None:
    SessionFile(tmp_path / "text", small).save(holding(small, [1]))
    SessionFile(tmp_path / "talk", small, talks=True).save(Held(small, 64), Talk(OPENING, MESSAGES, 1))
    with pytest.raises(ToyllmError, match="text: no conversation; go on with generate"):
        SessionFile(tmp_path / "text", small, talks=True)
    with pytest.raises(ToyllmError, match="talk: a conversation; go on with chat"):
        SessionFile(tmp_path / "talk", small)


def test_a_changed_run_has_no_session(tmp_path: Path) -> None:
    changed = tales("tales-gpt2").changed([Change("ablate", "embed")])
    with pytest.raises(ToyllmError, match="the run changes activations"):
        SessionFile(tmp_path / "s", changed)


def test_more_than_the_context_holds_is_refused_with_both_numbers(tmp_path: Path) -> None:
    model, path = tales("tales-gpt2"), tmp_path / "s"
    SessionFile(path, model).save(holding(model, [1] * 65))
    with pytest.raises(ToyllmError, match="the session holds 65 tokens, and the context 64: raise --context"):
        restored(path, model, 64)


# Files that are damaged, or mean harm


Parts = tuple[dict[str, np.ndarray], dict[str, str]]


@pytest.fixture(scope="module")
def parts(small: Model) -> Parts:
    """What a good file of a conversation is made of: arrays, metadata."""
    held = holding(small, some_ids(small, 40))
    arrays = {"ids": np.array(held.ids)}
    for i, state in enumerate(held.states()):
        arrays |= {f"{i}.{part}": array for part, array in zip(("positions", "keys", "values"), state, strict=True)}
    talk = {"opening": OPENING, "messages": [vars(message) for message in MESSAGES], "turns": 1}
    metadata = {
        "format": FORMAT,
        "model": fingerprint(small),
        "name": "n",
        "made_with": json.dumps(made_with(small)),
        "talk": json.dumps(talk),
    }
    return arrays, metadata


def put(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with path.open("wb") as file:
        write(file, arrays, metadata)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__delitem__(name)


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def replace(found: dict[str, Any]) -> None:
        found[name] = change(found[name])

    return replace


def test_a_good_file_is_read(tmp_path: Path, small: Model, parts: Parts) -> None:
    put(tmp_path / "s", *parts)
    assert SessionFile(tmp_path / "s", small, talks=True).session


ARRAYS = {
    "no ids": without("ids"),
    "no keys": without("1.keys"),
    "a tensor too many": replaced("ids", lambda a: a),
    "an id too large": replaced("ids", lambda a: np.where(a == a[7], 280, a)),
    "an id too small": replaced("ids", lambda a: a - 300),
    "ids of another dtype": replaced("ids", lambda a: a.astype(np.int32)),
    "ids of two axes": replaced("ids", lambda a: a[None]),
    "too few ids": replaced("ids", lambda a: a[:-1]),
    "two ids unread": replaced("ids", lambda a: np.concatenate((a, a[:2]))),
    "more ids than positions there can be": replaced("ids", lambda a: np.zeros(4098, np.int64)),
    "positions out of order": replaced("1.positions", lambda a: a[::-1].copy()),
    "a position twice": replaced("1.positions", lambda a: np.maximum(a, 1)),
    "positions with a gap": replaced("1.positions", lambda a: np.where(a > 20, a + 1, a)),
    "positions below 0": replaced("0.positions", lambda a: a - 30),
    "positions beyond all": replaced("1.positions", lambda a: a + 2**62),
    "positions that end elsewhere": replaced("0.positions", lambda a: a - 1),
    "positions of another dtype": replaced("0.positions", lambda a: a.astype(np.float64)),
    "a window with a hole": replaced("0.positions", lambda a: a[1:]),
    "keys of another dtype": replaced("1.keys", lambda a: a.view(np.int32)),
    "keys of more heads": replaced("1.keys", lambda a: np.concatenate((a, a), 1)),
    "keys of another width": replaced("1.keys", lambda a: a[..., :8].copy()),
    "keys of fewer axes": replaced("1.keys", lambda a: a[0]),
    "fewer values than positions": replaced("0.values", lambda a: a[:, :, 1:].copy()),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_tensors_that_do_not_fit_are_refused_and_the_file_stays(tmp_path: Path, small: Model, parts: Parts, name: str) -> None:
    arrays, metadata = dict(parts[0]), parts[1]
    ARRAYS[name](arrays)
    if name == "a tensor too many":
        arrays["2.keys"] = arrays["1.keys"]
    refused(tmp_path / "s", small, arrays, metadata)


def refused(path: Path, model: Model, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    put(path, arrays, metadata)
    before = path.read_bytes()
    with pytest.raises(ToyllmError, match=r"\A[^\n]*s: [^\n]*; give another --session\Z") as caught:
        SessionFile(path, model, talks=True)
    assert path.read_bytes() == before
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def talking(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def edit(metadata: dict[str, Any]) -> None:
        talk = json.loads(metadata["talk"])
        change(talk)
        metadata["talk"] = json.dumps(talk)

    return edit


def message(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return talking(lambda talk: talk["messages"][0].update(fields))


METADATA: dict[str, Callable[[dict[str, Any]], None]] = {
    "no format": without("format"),
    "another format": replaced("format", lambda _: "toyllm.session/2"),
    "no model": without("model"),
    "another model": replaced("model", lambda text: hashlib.sha256(text.encode()).hexdigest()),
    "made with nothing": without("made_with"),
    "made with what is no object": replaced("made_with", lambda _: "[1]"),
    "made with options unknown here": replaced("made_with", lambda _: '{"speed": "high"}'),
    "a talk that is no JSON": replaced("talk", lambda text: text[:-1]),
    "a talk that is deep": replaced("talk", lambda _: "[" * 100_000),
    "a talk with a name twice": replaced("talk", lambda text: text[:-1] + ', "turns": 2}'),
    "a talk with a number of many digits": replaced("talk", lambda text: text.replace('"turns": 1', '"turns": 1' + "0" * 5000)),
    "a talk with a lone surrogate": replaced("talk", lambda text: text.replace("Easy", "\\ud800")),
    "a talk without messages": talking(without("messages")),
    "a talk with more": talking(lambda talk: talk.update(more=1)),
    "messages that are no list": talking(lambda talk: talk.update(messages={})),
    "a message that is none": talking(lambda talk: talk.update(messages=[1])),
    "a message of the system": message(role="system"),
    "a message of a tool": message(role="tool", name="functions.x"),
    "a message of nobody": message(role=None),
    "a message without content": message(content=None),
    "a message with a number for content": message(content=1),
    "a message with a list for a role": message(role=["user"]),
    "a message with a channel of two words": message(channel="final <|message|>"),
    "a message with a field unknown": message(more="x"),
    "turns below 0": talking(lambda talk: talk.update(turns=-1)),
    "turns without end": talking(lambda talk: talk.update(turns=2**63)),
    "turns that are true": talking(lambda talk: talk.update(turns=True)),
    "turns with a fraction": talking(lambda talk: talk.update(turns=1.0)),
    "an opening unknown": talking(lambda talk: talk.update(opening={})),
    "an opening with more": talking(lambda talk: talk["opening"].update(more="x")),
    "reasoning unknown": talking(lambda talk: talk["opening"].update(reasoning="max")),
    "a date that is a number": talking(lambda talk: talk["opening"].update(date=1)),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_do_not_fit_are_refused_and_the_file_stays(tmp_path: Path, small: Model, parts: Parts, name: str) -> None:
    arrays, metadata = parts[0], dict(parts[1])
    METADATA[name](metadata)
    refused(tmp_path / "s", small, arrays, metadata)


def test_text_from_a_file_is_escaped_and_cut_in_an_error(tmp_path: Path, small: Model, parts: Parts) -> None:
    error = refused(tmp_path / "s", small, parts[0], parts[1] | {"model": "x", "name": "\x1b]0;evil\x07\n" + "y" * 5000})
    assert r"\x1b]0;evil" in error


@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_bit_that_has_turned_is_seen(tmp_path: Path, small: Model, parts: Parts, at: float) -> None:
    put(tmp_path / "s", *parts)
    data = bytearray((tmp_path / "s").read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + int(at * (len(data) - begin - 1))] ^= 4
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(ToyllmError, match="damaged"):
        SessionFile(tmp_path / "s", small, talks=True)


def test_a_text_that_has_changed_is_seen(tmp_path: Path, small: Model, parts: Parts) -> None:
    put(tmp_path / "s", *parts)
    path = tmp_path / "s"
    path.write_bytes(path.read_bytes().replace(b"Rhyme.", b"Obey!!"))
    with pytest.raises(ToyllmError, match="damaged: its checksum is not that of what it holds"):
        SessionFile(path, small, talks=True)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 2000, -1])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path, small: Model, parts: Parts, size: int) -> None:
    path = tmp_path / "s"
    put(path, *parts)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ToyllmError, match=r"\A[^\n]*s: no session that can be read: [^\n]*; give another --session\Z") as caught:
        SessionFile(path, small, talks=True)
    assert "download" not in str(caught.value)


@pytest.mark.parametrize("data", [b"not safetensors at all", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04" + b"\0" * 100, b"\0" * 64])
def test_another_kind_of_file_is_refused_and_stays(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(data)
    with pytest.raises(ToyllmError, match=r"s: no session that can be read: .*; give another --session$"):
        SessionFile(path, tales("tales-gpt2"))
    assert path.read_bytes() == data


def test_safetensors_of_something_else_are_no_session(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for metadata in (None, {"format": "pt"}):
        save_file({"x": np.zeros(3, np.float32)}, path, metadata)
        with pytest.raises(ToyllmError, match=r"s: no session of toyllm .*; give another --session$"):
            SessionFile(path, tales("tales-gpt2"))


def test_the_checksum_covers_names_shapes_and_metadata() -> None:
    a = np.arange(6, dtype=np.float32)
    sums = {
        checksum({}, {"a": a}),
        checksum({}, {"b": a}),
        checksum({}, {"a": a.reshape(2, 3)}),
        checksum({}, {"a": a.view(np.int32)}),
        checksum({"a": "1"}, {"a": a}),
        checksum({}, {"a": a + 1}),
    }
    assert len(sums) == 6
