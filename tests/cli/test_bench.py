"""`toyllm bench`: the document and the table of a real run, figures that follow from one another, and how it ends when it must."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toyllm as package
from toyllm.kernels.threads import max_threads
from toyllm.models import bench as measuring
from toyllm.models.bench import DECODE, Measured, Work
from toyllm.models.bench import Test as Case  # pytest would take a Test for its own

TOP = {"schema", "machine", "versions", "model", "settings", "repetitions", "seed", "stream_bytes", "complete", "tests"}
SHORT = ("-p", "24", "-n", "6", "-r", "3")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to stream, so that tests are quick; notes of that are left out."""
    monkeypatch.setattr(measuring, "STREAM", 2**21)
    monkeypatch.setattr(measuring, "SMALLEST_STREAM", 2**20)


@pytest.fixture
def document(toyllm: Any) -> Callable[..., dict[str, Any]]:
    def document(*arguments: str) -> dict[str, Any]:
        code, out, err = toyllm("bench", "--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)

    return document


def table(outcome: Any) -> list[dict[str, str]]:
    """The rows, by title."""
    _, _, below = outcome.out.partition("\n\n")
    titles, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines()]
    assert rule == [re.fullmatch("-+:?", cell)[0] for cell in rule]  # type: ignore[index]
    return [dict(zip(titles, row, strict=True)) for row in rows]


# The document


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
def test_the_document_holds_every_figure_and_they_follow_from_one_another(document: Any, model: str) -> None:
    found = document(*SHORT, "-d", "0,40", "-m", model, "--threads", "1")
    assert found.keys() == TOP
    assert (found["schema"], found["complete"], found["repetitions"], found["seed"]) == ("toyllm.bench/1", True, 3, 0)
    assert found["stream_bytes"] == 2**21
    assert [test["test"] for test in found["tests"]] == ["pp24", "tg6", "pp24 @ d40", "tg6 @ d40"]
    for test in found["tests"]:
        rates = [test["tokens"] / s for s in test["seconds"]]
        middle = statistics.median(test["seconds"])
        assert len(rates) == 3
        assert test["threads"] == 1
        assert test["tok_s"] == pytest.approx(
            {
                "mean": statistics.mean(rates),
                "sd": statistics.stdev(rates),
                "median": statistics.median(rates),
                "min": min(rates),
                "max": max(rates),
            }
        )
        assert test["tflop_s"] == pytest.approx(test["flops"] / middle / 1e12)
        if test["kind"] == "tg":
            assert len(test["stream_seconds"]) == 4 * measuring.READS
            assert test["gb_s"] == pytest.approx(6 * (test["weight_bytes"] + test["cache_bytes"]) / middle / 1e9)
            assert test["stream_gb_s"] == pytest.approx(2**21 / statistics.median(test["stream_seconds"]) / 1e9)
            assert test["share"] == pytest.approx(test["gb_s"] / test["stream_gb_s"])
        else:
            assert {test[key] for key in ("weight_bytes", "cache_bytes", "gb_s", "stream_gb_s", "share")} == {None}
            assert test["stream_seconds"] == []


def test_depth_adds_keys_and_values_and_no_weights(document: Any) -> None:
    near, far = document("-p", "0", "-n", "4", "-d", "0,100", "-r", "1")["tests"]
    assert near["weight_bytes"] == far["weight_bytes"]
    assert far["cache_bytes"] - near["cache_bytes"] == 100 * 2 * 256 * 4 * 6  # keys and values, D, f32, layers
    assert near["tok_s"]["sd"] is None


def test_a_token_reads_what_params_says(toyllm: Any, document: Any) -> None:
    for model in ("tales-gpt2", "tales-gpt-oss"):
        said = json.loads(toyllm("params", "-m", model, "--context", "41", "--cache-dtype", "bf16", "--json").out)
        (test,) = document("-m", model, "-p", "0", "-n", "1", "-d", "40", "-r", "1", "--cache-dtype", "bf16")["tests"]
        assert (test["weight_bytes"], test["cache_bytes"]) == (said["token"]["weight_bytes"], said["token"]["cache_bytes"])
        assert test["flops"] == said["token"]["flops"]


def test_the_document_says_what_ran_on_what(document: Any) -> None:
    found = document(*SHORT, "--prefill-chunk", "7", "--cache-dtype", "bf16", "--context", "50", "-m", "tales-gpt-oss", "--moe", "all")
    expected = {
        "model": "tales-gpt-oss",
        "context": 50,
        "prefill_chunk": 7,
        "cache_dtype": "bf16",
        "moe": "all",
        "tokens_per_expert_ratio": 1.0,
    }
    assert expected.items() <= found["settings"].items()
    assert found["machine"].keys() == {"processor", "cores", "cache_bytes", "threading_layer"}
    assert found["versions"].keys() == {"toyllm", "python", "numpy", "numba", "llvmlite"}
    assert found["versions"]["toyllm"] == package.__version__
    assert found["model"]["bytes_by_dtype"].keys() == {"BF16", "MXFP4"}
    assert sum(found["model"]["bytes_by_dtype"].values()) == found["model"]["bytes"]
    assert found["model"]["parameters"] == 5_927_744


# The table


def test_the_table_is_markdown_below_what_ran_on_what(toyllm: Any) -> None:
    outcome = toyllm("bench", *SHORT, "-d", "0,40")
    assert (outcome.code, outcome.err) == (0, "")
    facts, _, below = outcome.out.partition("\n\n")
    assert all(fact.startswith("- ") for fact in facts.splitlines())
    for word in (
        f"toyllm {package.__version__}",
        "Numba",
        "cores",
        "kernels: ",
        "threads: ",
        "tales-gpt2 (gpt2)",
        "BF16 11.8 MB",
        "seed 0",
    ):
        assert word in facts
    assert len({len(line) for line in below.splitlines()}) == 1, "columns line up"
    assert max(map(len, below.splitlines())) <= 80
    rows = table(outcome)
    assert [row["test"] for row in rows] == ["pp24", "tg6", "pp24 @ d40", "tg6 @ d40"]
    for row in rows:
        assert re.fullmatch(r"\d+(\.\d+)? ± \d+(\.\d+)?", row["t/s"])
        decodes = row["test"].startswith("tg")
        assert [bool(row[title]) for title in ("MB/token", "GB/s", "stream", "share", "TFLOP/s")] == [decodes] * 4 + [not decodes]


def measured(*seconds: float) -> Measured:
    return Measured(Case(DECODE, 100, 0, 1), Work(10**12, 10**9, 500_000_000.0), seconds, 2 * 10**9, (0.25, 0.05, 0.05))


@pytest.mark.parametrize(
    ("seconds", "row"),
    [
        ((5.0, 4.0, 10.0), {"t/s": "18.33 ± 7.64", "MB/token": "1,500.0", "GB/s": "30.0", "stream": "40.0", "share": "75%"}),
        ((0.5,), {"t/s": "200.0", "MB/token": "1,500.0", "GB/s": "300.0", "stream": "40.0", "share": "750%"}),
        ((0.05, 0.05), {"t/s": "2000 ± 0", "MB/token": "1,500.0", "GB/s": "3000.0", "stream": "40.0", "share": "7500%"}),
    ],
)
def test_a_row_is_rounded_and_never_capped(toyllm: Any, monkeypatch: pytest.MonkeyPatch, seconds: Any, row: dict[str, str]) -> None:
    monkeypatch.setattr(measuring, "measure", lambda *rest: measured(*seconds))
    (found,) = table(toyllm("bench", "-p", "0", "-n", "100"))
    assert found == {"test": "tg100"} | row


def test_columns_that_nothing_fills_are_left_out(toyllm: Any) -> None:
    (row,) = table(toyllm("bench", "-p", "8", "-n", "0", "-r", "1"))
    assert row.keys() == {"test", "t/s", "TFLOP/s"}
    assert "stream" not in toyllm("bench", "-p", "8", "-n", "0", "-r", "1").out
    (row,) = table(toyllm("bench", "-p", "0", "-n", "2", "-r", "1"))
    assert row.keys() == {"test", "t/s", "MB/token", "GB/s", "stream", "share"}


@pytest.mark.skipif(max_threads() < 2, reason="one processor")
def test_threads_have_a_column_where_there_are_several(toyllm: Any) -> None:
    rows = table(toyllm("bench", *SHORT, "--threads", "2,1"))
    assert [(row["test"], row["threads"]) for row in rows] == [("pp24", "2"), ("tg6", "2"), ("pp24", "1"), ("tg6", "1")]


@pytest.mark.parametrize(("cache", "cautioned"), [(10**9, True), (10**6, False), (None, False)])
def test_weights_that_the_processors_cache_holds_are_cautioned(
    toyllm: Any, monkeypatch: pytest.MonkeyPatch, cache: int | None, cautioned: bool
) -> None:
    monkeypatch.setattr(measuring, "last_cache_bytes", lambda: cache)
    assert ("the share is then not one of memory" in toyllm("bench", *SHORT).out) is cautioned
    assert "the share" not in toyllm("bench", "-p", "4", "-n", "0", "-r", "1").out


def test_experts_are_mixed_as_said(toyllm: Any) -> None:
    assert "experts mixed: grouped" in toyllm("bench", *SHORT, "-m", "tales-gpt-oss", "--moe", "grouped").out
    assert "experts" not in toyllm("bench", *SHORT).out


def test_off_a_terminal_there_is_no_escape_anywhere_and_on_one_progress(toyllm: Any, on_terminal: Any) -> None:
    outcome = toyllm("bench", *SHORT)
    assert "\x1b" not in outcome.out + outcome.err
    outcome = on_terminal("bench", *SHORT, "-d", "30")
    assert "\x1b" not in outcome.out
    for text in ("tales-gpt2: setting up", "warm-up", "filling the context 0 of 30", "tg6 @ d30, ", "repetition 2 of 3"):
        assert text in outcome.err
    assert outcome.err.endswith("\r\x1b[2K")


def test_a_model_without_a_tokenizer_is_measured_too(document: Any, tmp_path: Path) -> None:
    source = Path(package.__file__).parent / "models" / "embedded" / "tales-gpt2"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    assert len(document(*SHORT, "-m", str(tmp_path))["tests"]) == 2


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x"], "Invalid value for '--prompt-sizes' / '-p': 'x': expected numbers from 0, such as 1,2."),
        (["-n", "1,,2"], "Invalid value for '--generation-lengths' / '-n': '1,,2': expected numbers from 0, such as 1,2."),
        (["-d", "-1"], "Invalid value for '--depth' / '-d': '-1': expected numbers from 0, such as 1,2."),
        (["--threads", "0"], "Invalid value for '--threads': '0': expected numbers from 1, such as 1,2."),
        (["--threads", ""], "Invalid value for '--threads': '': expected numbers from 1, such as 1,2."),
        (["-r", "0"], "Invalid value for '--repetitions' / '-r': 0 is not in the range x>=1."),
        (
            ["-p", "0", "-n", "0,0"],
            "Invalid value for '--prompt-sizes' / '--generation-lengths': nothing to measure; expected a size above 0.",
        ),
    ],
)
def test_a_wrong_list_is_wrong_usage(toyllm: Any, arguments: list[str], message: str) -> None:
    outcome = toyllm("bench", *arguments)
    assert (outcome.code, outcome.error) == (2, f"{message} See: toyllm bench --help")


def test_a_wrong_list_in_the_environment_names_the_variable(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_DEPTH", "deep")
    assert "(from TOYLLM_DEPTH)" in toyllm("bench").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-d", "500", "-p", "0", "-n", "13"],
            "tg13 @ d500 takes 513 positions, the context has 512: lower --depth or --generation-lengths",
        ),
        (["--context", "511"], "pp512 takes 512 positions, the context has 511: lower --prompt-sizes, or raise --context"),
        (["--context", "513"], "--context 513: expected 1 to 512, the positions this model knows"),
        (["--threads", "1,4096"], f"--threads 4096: expected 1 to {max_threads()}, the processors this process may use"),
        (["--moe", "none"], "--moe none: expected one of auto, single, grouped, all, budget"),
    ],
)
def test_what_the_model_or_the_machine_cannot_do_is_one_line(toyllm: Any, arguments: list[str], message: str) -> None:
    outcome = toyllm("bench", *arguments)
    assert (outcome.code, outcome.error) == (1, message)


def test_a_context_that_does_not_fit_is_refused_with_the_plan(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toyllm.models import model

    monkeypatch.setattr(model, "available_memory", lambda: model.RESERVE + 15 * 10**6)
    code, out, err = toyllm("bench", "--context", "512")
    assert (code, out) == (1, "")
    assert "cache failed" in err
    assert re.search(r"^error: --context 512: the KV cache takes .*$", err, re.MULTILINE)


# Interrupts


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the second test."""
    measure, calls = measuring.measure, iter(range(9))

    def stop(*arguments: Any) -> Measured:
        if next(calls):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(measuring, "measure", stop)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_leaves_the_rows_that_were_complete(toyllm: Any) -> None:
    outcome = toyllm("bench", *SHORT)
    assert (outcome.code, outcome.err) == (130, "")
    assert [row["test"] for row in table(outcome)] == ["pp24"]
    assert outcome.out.endswith("|\n")


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_document_is_one_and_says_so(toyllm: Any) -> None:
    code, out, err = toyllm("bench", "--json", *SHORT)
    assert (code, err) == (130, "")
    found = json.loads(out)
    assert found.keys() == TOP
    assert found["complete"] is False
    assert [test["test"] for test in found["tests"]] == ["pp24"]
