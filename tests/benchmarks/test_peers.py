"""Peers side by side: figures from what was measured, the page, and what is asked for. Nothing is timed here."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16, to_bf16, widen
from toyllm.models.location import find_model
from toyllm.models.params import anatomy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as when it is run as a script
        yield {name: importlib.import_module(name) for name in ("peers", "report", "setups", "streaming")}


def document_of(report: ModuleType, **others: Any) -> dict[str, Any]:
    """One model, one work, three rounds, of which the second was disturbed."""
    measured = {"toyllm": [100.0, 50.0, 120.0], "llama.cpp": [80.0, 25.0, 100.0]}
    reads = [{"C": 30.0, "Numba": 20.0}, {"C": 10.0, "Numba": 20.0}, {"C": 30.0, "Numba": 31.0}]
    takes = {"toyllm": {"bytes": 0.2e9}, "llama.cpp": {"bytes": 0.1e9}}
    work = report.summarise("decode at 128", measured, reads, takes)
    agreement = {"name": "llama.cpp", "error": 0.005, "largest": 0.01, "tolerance": 0.02, "same": 24, "positions": 25}
    model = {"name": "gpt2", "title": "GPT-2", "works": [work], "agreement": [agreement]}
    machine = {"processor": "Toy 1", "cores": 2, "features": "avx2", "system": "Linux"}
    document = {"machine": machine, "date": "2026-01-02", "threads": 2, "rounds": 3, "others": 0.01, "streaming_bytes": 2e9}
    document |= {"engines": {"toyllm": {"toyllm": "0.1.0"}}, "models": [model], "start": None, "kernels": [], "goals": [], "left_out": []}
    return document | others


def test_ratios_and_shares_are_formed_within_a_round(modules: dict[str, ModuleType]) -> None:
    toyllm, peer = document_of(modules["report"])["models"][0]["works"][0]["runners"]
    assert (toyllm["tokens_per_second"], toyllm["least"], toyllm["most"]) == (100, 50, 120)
    assert toyllm["gigabytes_per_second"] == 20
    assert toyllm["share_of_streaming"] == pytest.approx(np.median([20 / 30, 10 / 20, 24 / 31]))
    assert "ratio" not in toyllm
    assert peer["ratio"] == pytest.approx(1.25)  # the median of 1.25, 2 and 1.2
    assert peer["share_of_streaming"] == pytest.approx(np.median([8 / 30, 2.5 / 20, 10 / 31]))


def test_goals_tell_by_how_much_they_were_missed_and_only_of_what_was_measured(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    goal = {"model": "gpt2", "work": "decode at 128", "runner": "toyllm", "stretch": None}
    kernel = {"name": "attention", "microseconds": 1.0, "GB/s": 6.0, "of a plain read": 0.9}
    document = document_of(report, start={"command": "toyllm", "seconds": 1.0, "least": 0.9, "most": 1.1}, kernels=[kernel])
    goals = [
        goal | {"against": "llama.cpp", "goal": 1.2, "stretch": 1.25},
        goal | {"against": "llama.cpp", "goal": 2.5},
        goal | {"against": "streaming", "goal": 0.6, "stretch": 0.9},
        goal | {"against": "transformers", "goal": 2},
        goal | {"work": "start", "against": "the clock", "goal": 0.8},
        goal | {"model": "kernels", "work": "attention", "against": "a plain read", "goal": 0.6, "stretch": 0.85},
    ]
    document["goals"] = report.judge(goals, document)
    rows = [line.split(" | ")[-2:] for line in report.markdown(document).split("## Goals")[1].splitlines()[4:]]
    assert rows == [
        ["1.25 ×", "met, and the stretch |"],
        ["1.25 ×", "missed by 50 % |"],
        ["67 %", "met |"],
        ["1.00 s", "missed by 25 % |"],
        ["90 %", "met, and the stretch |"],
    ]


def test_the_page_names_machine_versions_and_disturbance(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    quiet, busy = (report.markdown(document_of(report, others=share)) for share in (0.01, 1.2))
    assert "Toy 1, 2 cores; avx2" in quiet
    assert "| toyllm | toyllm 0.1.0 |" in quiet
    assert "other processes took 120 % of one processor" in busy
    assert "Not a quiet machine" not in quiet
    assert "Not a quiet machine" in busy
    assert "| decode at 128 | llama.cpp | 80.0 | 25.0–100 | 8.00 GB/s | 27 % | 1.25 × |" in quiet
    assert "| llama.cpp | 5.0e-03 | 2e-02 | 1.0e-02 | 24 of 25 |" in quiet


def test_notes_of_a_page_are_kept(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    text = report.markdown(document_of(report))
    notes = "\n## Notes\n\nWhat was tried.\n"
    other = text.replace("Toy 1", "Toy 2")
    assert report.with_notes(other, "") == report.with_notes(other, text) == other
    assert report.with_notes(other, text + notes) == other + notes


def test_only_what_an_earlier_run_wrote_is_replaced(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report = modules["report"]
    document = {"schema": report.SCHEMA} | document_of(report)
    page, figures, mine = tmp_path / "page.md", tmp_path / "figures.json", tmp_path / "mine"
    report.replace(page, report.markdown(document))
    report.replace(figures, json.dumps(document, indent=1))
    mine.write_text("mine")
    report.check_replaceable(page, report.TITLE)
    report.check_replaceable(figures, report.JSON)
    report.check_replaceable(tmp_path / "new", report.JSON)
    for path, begins in ((figures, report.TITLE), (page, report.JSON), (mine, report.TITLE)):
        with pytest.raises(ValueError, match="not written by this command"):
            report.check_replaceable(path, begins)
    with pytest.raises(ValueError, match="there is no folder"):
        report.check_replaceable(tmp_path / "nowhere" / "page.md", report.TITLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "mine", "page.md"]


def test_every_goal_is_of_something_that_is_measured(modules: dict[str, ModuleType]) -> None:
    setups = modules["setups"]
    works = {
        (m.name, w.name): {r.name for r in m.runners if not r.works or w.name.startswith(r.works)} for m in setups.MODELS for w in m.works
    }
    for goal in setups.GOALS:
        if goal.model in ("kernels", "tales-gpt2"):
            continue
        assert goal.runner in works[goal.model, goal.work], goal
        assert goal.against in works[goal.model, goal.work] | {"streaming"}, goal


def test_a_prompts_operations_are_those_of_its_tokens(modules: dict[str, ModuleType]) -> None:
    a = anatomy(find_model("tales-gpt2"))
    c, T = a.config, 10
    matrices = c.n_layer * 12 * c.n_embd**2
    expected = 2 * (matrices * T + c.vocab_size * c.n_embd) + 4 * c.n_layer * c.n_embd * T * (T + 1) / 2
    assert modules["peers"].prompt_flops(a, T) * T == pytest.approx(expected)


def test_bytes_of_a_step_are_weights_and_cache_as_the_engine_keeps_them(modules: dict[str, ModuleType]) -> None:
    peers, setups = modules["peers"], modules["setups"]
    a, work = anatomy(find_model("tales-gpt2")), setups.Work("decode at 100", 100, 20)
    cache = 2 * a.config.n_layer * a.config.n_embd * 110
    full, half = (peers.decode_bytes(a, work, setups.Runner("", "", cache_bytes=n)) for n in (4, 2))
    assert full - half == 2 * cache
    assert peers.decode_bytes(a, work, setups.Runner("", "", weight_factor=2, cache_bytes=4)) - full == full - 4 * cache


def test_a_read_in_c_sees_every_byte_once(modules: dict[str, ModuleType]) -> None:
    array = np.random.default_rng(0).integers(0, 2**64, 1003, np.uint64)
    for threads in (1, 2, 3):
        assert modules["streaming"].c_read(array, threads) in (None, int(array.sum()))


def test_without_a_c_compiler_streaming_is_what_numba_reads(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = modules["streaming"]
    monkeypatch.setenv("CC", "no-such-compiler")
    streaming.compiled_sum.cache_clear()
    rates = streaming.measure(streaming.prepare(2**21), 1)
    streaming.compiled_sum.cache_clear()
    assert rates["C"] == 0 < rates["Numba"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "gpt3"], "nothing has gpt3 in its name; there are: gpt2, decode at 128"), (["--rounds", "-1"], "expected at least 1")],
)
def test_what_cannot_be_is_refused(
    modules: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        modules["peers"].parse()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_someone_elses_is_left_alone(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    mine = tmp_path / "gpt2" / "model.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(modules["peers"].ToyllmError, match="not made by this command"):
        modules["peers"].make(modules["setups"].MODELS[0], tmp_path)
    assert mine.read_bytes() == b"mine"


def test_an_engine_answers_with_seconds_and_logits(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    peers, setups = modules["peers"], modules["setups"]
    worker = peers.Worker(sys.executable, setups.TOYLLM, Path("tales-gpt2"), 1, tmp_path / "log")
    try:
        assert worker.about["backend"]
        taken = worker.ask({"prompt": 5, "tokens": 2, "save": str(tmp_path / "logits.npy")})
        again = worker.ask({"prompt": 5, "tokens": 0, "save": str(tmp_path / "again.npy")})
    finally:
        worker.stop()
    assert taken["prompt"] > 0 < taken["tokens"]
    assert again["prompt"] > 0
    logits, first = np.load(tmp_path / "logits.npy"), np.load(tmp_path / "again.npy")
    assert logits.shape == (3, 4096)
    assert np.array_equal(logits[:1], first)  # the cache was emptied


def test_an_engine_that_does_not_start_says_why(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    runner = modules["setups"].Runner("nobody", "toyllm", {"backend": "abacus"})
    with pytest.raises(modules["peers"].ToyllmError, match=r"nobody: ended with status 1: .*--backend abacus: expected auto or one of"):
        modules["peers"].Worker(sys.executable, runner, Path("tales-gpt2"), 1, tmp_path / "log")


def test_engines_that_compute_another_model_are_found_out(modules: dict[str, ModuleType]) -> None:
    differs = modules["peers"].differs
    assert not differs({"error": 0.01, "tolerance": 0.02})
    assert differs({"error": 0.03, "tolerance": 0.02})
    assert differs({"error": float("nan"), "tolerance": 0.02})
    assert not differs({"error": 0.5, "tolerance": None})  # shown, and another comparison decides


def test_whatever_is_timed_is_held_against_toyllm(modules: dict[str, ModuleType]) -> None:
    for model in modules["setups"].MODELS:
        for runner in model.runners[1:]:
            assert (runner.tolerance is None) != (runner.check is None), runner.name


def test_one_position_with_other_experts_does_not_decide(modules: dict[str, ModuleType]) -> None:
    ours = np.eye(4, 5, dtype=np.float32)
    theirs = ours * np.float32(0.99)
    theirs[2] = ours[3]
    found = modules["peers"].compare("llama.cpp", ours, theirs, 0.02)
    assert found == {"name": "llama.cpp", "error": pytest.approx(0.01), "largest": 1, "tolerance": 0.02, "same": 3, "positions": 4}


def test_rounding_as_llama_cpp_is_bf16_before_matrices_and_eight_bits_before_mxfp4(modules: dict[str, ModuleType]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Kernels:
        matmul: Any
        matmul_mxfp4: Any
        single: Any = None

    seen: list[np.ndarray] = []
    keep = lambda x, *_: seen.append(x)  # noqa: E731
    kernels = importlib.import_module("engines").rounding_as_llama_cpp(Kernels(keep, keep))
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    x[1] = 0
    head, router = np.zeros((64, 200), BF16), np.zeros((64, 32), BF16)
    for w in (head, router, head.astype(BF16).view(np.uint16).astype(np.float32)):
        kernels.matmul(x, w)
    kernels.matmul_mxfp4(x)
    bf16, router_sees, f32, q8 = seen
    assert not kernels.single
    assert np.array_equal(bf16, widen(to_bf16(x)))
    assert router_sees is x
    assert f32 is x
    blocks, rounded = x.reshape(3, 2, 32), q8.reshape(3, 2, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    assert (np.abs(rounded - blocks) <= 0.5 * scale + 127 * scale * 2.0**-11 + 1e-12).all()  # half a code, and its scale in f16
    assert not q8[1].any()
    assert len(np.unique(rounded[0, 0])) <= 255
    assert np.abs(rounded - blocks).max() > 0


def test_help_needs_no_peer() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "peers.py", "--help"], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--peers PYTHON" in done.stdout
    assert not done.stderr
