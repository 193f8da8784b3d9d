"""Measuring: which tests there are, what each has to read and compute, what is counted, and the arithmetic of the figures."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.threads import set_threads
from toyllm.models import bench, memory
from toyllm.models.bench import DECODE, PREFILL, READS, Bench, Measured, Work, combine, work_of
from toyllm.models.bench import Test as Case  # pytest would take a Test for its own
from toyllm.models.location import ModelFiles
from toyllm.models.params import Anatomy, anatomy
from toyllm.models.parts import whole

hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
GPT_OSS_20B = hollow["GPT_OSS"] | {"vocab_size": 201_088, "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4}


def of_config(tmp_path: Path, document: dict[str, Any]) -> Anatomy:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    return anatomy(ModelFiles("it", tmp_path, None, None, path, None, None, None, None))


@pytest.fixture(
    params=[{"model_type": "gpt2"}, {"model_type": "gpt2", "tie_word_embeddings": False}, GPT_OSS_20B], ids=["gpt2", "untied", "oss"]
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Anatomy:
    return of_config(tmp_path, request.param)


def token(a: Anatomy, position: int, dtype: str = "f32") -> memory.PerToken:
    """What `toyllm params` says of the token at a position."""
    return memory.per_token(a, whole(a), memory.Running(position + 1, dtype))


# Which tests


def test_tests_are_all_combinations_depth_by_depth_then_threads() -> None:
    tests = combine([512, 64], [128], [0, 4096], [1, 2])
    assert [(t.name, t.threads) for t in tests] == [
        (name + depth, threads) for depth in ("", " @ d4096") for threads in (1, 2) for name in ("pp512", "pp64", "tg128")
    ]
    assert tests[-1] == Case(DECODE, 128, 4096, 2)
    assert tests[-1].end == 4224


def test_a_size_of_0_is_no_test() -> None:
    assert [t.name for t in combine([0, 8], [0], [3], [1])] == ["pp8 @ d3"]


@pytest.mark.parametrize(
    ("test", "context", "message"),
    [
        (Case(PREFILL, 101, 0, 1), None, "pp101 takes 101 positions, the context has 100: lower --prompt-sizes"),
        (Case(DECODE, 1, 100, 1), None, "tg1 @ d100 takes 101 positions, the context has 100: lower --depth or --generation-lengths"),
        (Case(DECODE, 60, 0, 1), 50, "tg60 takes 60 positions, the context has 50: lower --generation-lengths, or raise --context"),
        (Case(DECODE, 160, 0, 1), 50, "tg160 takes 160 positions, the context has 50: lower --generation-lengths"),
    ],
)
def test_what_passes_the_context_is_refused_with_both_numbers(test: Case, context: int | None, message: str) -> None:
    with pytest.raises(ToyllmError) as error:
        bench.check_room([Case(PREFILL, 50, 0, 1), test], 100, context)
    assert str(error.value) == message


def test_what_fills_the_context_is_not() -> None:
    bench.check_room([Case(PREFILL, 60, 40, 1)], 100)
    bench.check_room([Case(PREFILL, 60, 20, 1)], 100, 80)


# What a test has to do


@pytest.mark.parametrize("window", [None, 1, 5, 6, 7, 8, 100])
@pytest.mark.parametrize("depth", [0, 5, 20])
@pytest.mark.parametrize("tokens", [1, 7])
def test_positions_seen_are_those_of_each_token(window: int | None, depth: int, tokens: int) -> None:
    expected = sum(min(n, window or n) for n in range(depth + 1, depth + tokens + 1))
    assert bench.positions_seen(window, Case(PREFILL, tokens, depth, 1)) == expected


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("depth", [0, 100, 1000])
def test_decoding_reads_and_computes_what_params_says_of_its_tokens(model: Anatomy, depth: int, dtype: str) -> None:
    tokens = [token(model, depth + i, dtype) for i in range(9)]
    work = work_of(model, Case(DECODE, 9, depth, 1), dtype)
    assert work.weight_bytes == tokens[0].weight_bytes
    assert work.cache_bytes == pytest.approx(np.mean([t.cache_bytes for t in tokens]), rel=1e-12)
    assert work.token_bytes == work.weight_bytes + work.cache_bytes
    assert work.flops == sum(t.flops for t in tokens)


@pytest.mark.parametrize("depth", [0, 200])
def test_a_prompt_computes_its_tokens_but_the_head_once(model: Anatomy, depth: int) -> None:
    heads = {"embed": "gpt2", "head": "other"}
    head = sum(2 * e.weights for e in whole(model).entries if e.key in heads and e.multiplied)
    assert head in (2 * 50257 * 768, 2 * 201_088 * 2880)
    work = work_of(model, Case(PREFILL, 9, depth, 1), "f32")
    assert work.flops == sum(token(model, depth + i).flops for i in range(9)) - 8 * head
    assert work.token_bytes == 0


def test_every_expert_is_as_many_times_the_experts_bytes(tmp_path: Path) -> None:
    a = of_config(tmp_path, GPT_OSS_20B)
    experts = sum(e.nbytes for e in a.entries if e.component == "experts")
    few, all_of_them = (work_of(a, Case(DECODE, 1, 0, 1), "f32", every).weight_bytes for every in (False, True))
    assert all_of_them - few == experts - experts * 4 // 32


@pytest.mark.parametrize(("moe", "every"), [("auto", False), ("single", False), ("grouped", False), ("all", True), ("budget", True)])
def test_the_experts_that_count_are_those_that_run(moe: str, every: bool) -> None:
    model = toyllm.load("tales-gpt-oss", moe=moe, tokens_per_expert_ratio=0.01)
    ran: set[tuple[int, int]] = set()
    layer = -1

    def tap(name: str, array: np.ndarray) -> None:
        nonlocal layer
        if name.endswith("router.experts"):
            layer += 1
            ran.update((layer, e) for e in array[0])

    model.forward([1], [0], [0], model.new_cache(1), taps=tap)
    made = Bench(model, anatomy(model.files), 1, [1], None, np.empty(0), None, None)  # type: ignore[arg-type]
    c, matrix = model.config, sum(e.nbytes for e in anatomy(model.files).entries if e.component == "experts") // 8
    count = c.num_local_experts if every else len(ran) // c.num_hidden_layers
    others = sum(e.read for e in whole(made.anatomy).entries if e.component != "experts")
    assert bench.work(made, Case(DECODE, 1, 0, 1)).weight_bytes == others + matrix * count
    assert ("all" in model.kernels.mixing.ran) is every


# What came of it


def test_the_figures_follow_from_seconds_and_work() -> None:
    m = Measured(Case(DECODE, 10, 5, 2), Work(7_000_000, 4000, 1000), (1.0, 2.0, 5.0), 90_000, (3.0, 1.0, 2.0))
    assert m.rates == (10, 5, 2)
    assert m.byte_rate == 10 * 5000 / 2
    assert m.stream_rate == 90_000 / 2
    assert m.share == 25_000 / 45_000
    assert m.flop_rate == 3_500_000


def test_a_prompt_has_no_share_of_memory() -> None:
    m = Measured(Case(PREFILL, 10, 0, 2), Work(8_000_000), (2.0,), 0, ())
    assert (m.byte_rate, m.stream_rate, m.share) == (None, None, None)
    assert m.flop_rate == 4_000_000


def test_a_summary_is_of_a_sample() -> None:
    numbers = [3.0, 1.0, 2.0, 10.0]
    found = bench.summary(numbers)
    assert found.sd == pytest.approx(np.std(numbers, ddof=1))
    assert (found.mean, found.median, found.min, found.max) == (4.0, 2.5, 1.0, 10.0)
    assert bench.summary([3.0]) == bench.Summary(3.0, None, 3.0, 3.0, 3.0)


# Repetitions


class Machine:
    """A clock that only its own work moves, and the order of what was done."""

    def __init__(self) -> None:
        self.time, self.log = 100.0, []

    def doing(self, what: str, *seconds: float) -> Any:
        times = iter(seconds)

        def do() -> None:
            self.log.append(what)
            self.time += next(times)

        return do

    def tell(self, what: str, done: int, total: int) -> None:
        self.log.append(f"{what} {done}/{total}")


def test_the_first_run_is_not_counted_nor_what_happens_between_the_runs() -> None:
    machine = Machine()
    prepare, step = machine.doing("prepare", 50, 60, 70), machine.doing("step", 9, 1, 2)
    seconds, reads = bench.repeat(prepare, step, None, 2, machine.tell, lambda: machine.time)
    assert (seconds, reads) == ((1, 2), ())
    assert machine.log == ["warm-up 1/1", "prepare", "step", "repetition 1/2", "prepare", "step", "repetition 2/2", "prepare", "step"]


def test_streaming_is_read_before_between_and_after_the_repetitions() -> None:
    machine = Machine()
    times = [float(n) for n in range(1, 3 * READS + 1)]
    read = machine.doing("read", *times)
    seconds, reads = bench.repeat(lambda: None, machine.doing("step", 9, 0.5, 0.25), read, 2, machine.tell, lambda: machine.time)
    assert (seconds, reads) == ((0.5, 0.25), tuple(times))
    round_of_reads = ["read"] * READS
    expected = [
        "warm-up 1/1",
        "step",
        *round_of_reads,
        "repetition 1/2",
        "step",
        *round_of_reads,
        "repetition 2/2",
        "step",
        *round_of_reads,
    ]
    assert machine.log == expected


# A real model


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to stream, so that tests are quick."""
    monkeypatch.setattr(bench, "STREAM", 2**22)
    monkeypatch.setattr(bench, "SMALLEST_STREAM", 2**20)


def quiet(what: str, done: int, total: int) -> None:
    """Say nothing."""


@pytest.fixture
def oss(short: None) -> Bench:
    model = toyllm.load("tales-gpt-oss", prefill_chunk=16)
    return bench.set_up(model, combine([64], [16], [0, 200], [1]), 264)


def filled(made: Bench, depth: int) -> list[int]:
    """How many tokens each pass ran to fill the cache to a depth."""
    passes: list[int] = []
    bench.fill(made, depth, lambda what, done, total: passes.append(done))
    assert made.cache.length() == depth
    return passes


def test_a_depth_is_filled_once_and_built_upon(oss: Bench) -> None:
    assert filled(oss, 40) == [0, 16, 32]
    assert filled(oss, 40) == []
    assert filled(oss, 64) == [40, 56]
    bench.decode(oss, 64, 74)
    assert filled(oss, 64) == []


def test_a_test_steps_back_to_its_depth_and_what_windows_have_forgotten_is_filled_anew(oss: Bench) -> None:
    filled(oss, 200)
    bench.prefill(oss, 200, 264)
    assert filled(oss, 200) == []
    assert filled(oss, 100) == list(range(0, 100, 16))


def test_what_is_measured_is_the_models_own_forward(oss: Bench) -> None:
    """Chunks, steps back and single tokens end in the logits of the whole sequence."""
    for depth in (100, 96):
        filled(oss, depth)
        bench.decode(oss, depth, 110)
        np.testing.assert_array_equal(oss.logits[0], oss.model.logits(oss.ids[:110])[-1])


def test_tokens_are_drawn_from_the_whole_vocabulary_and_always_the_same(oss: Bench) -> None:
    again = bench.set_up(oss.model, [Case(PREFILL, 4, 0, 1)], 264)
    assert again.ids == oss.ids
    assert again.stream is None
    assert len(set(oss.ids)) > 200
    assert 0 <= min(oss.ids) < 200
    assert oss.model.vocab_size - 200 < max(oss.ids) < oss.model.vocab_size


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
def test_a_real_run_counts_every_repetition(short: None, kind: str) -> None:
    model = toyllm.load("tales-gpt2", threads=1)
    test = Case(kind, 8, 24, 1)
    made = bench.set_up(model, [test], 32)
    told: list[str] = []
    m = bench.measure(made, test, 3, lambda what, done, total: told.append(what))
    assert told == [bench.WARM_UP, bench.FILLING, *[bench.REPETITION] * 3]
    assert len(m.seconds) == 3
    assert min(m.seconds) > 0
    assert len(m.stream_seconds) == (4 * READS if kind == DECODE else 0)
    assert m.stream_bytes == (2**22 if kind == DECODE else 0)
    assert m.work == work_of(anatomy(model.files), test, "f32")
    assert made.cache.length() == 32


def test_compiling_takes_no_time(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock that is used by default is generation's."""
    import inspect

    from toyllm.models.generation import clock

    assert inspect.signature(bench.measure).parameters["now"].default is clock


def test_each_test_runs_on_its_own_threads_and_is_filled_on_the_models(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(bench, "set_threads", counts.append)
    model = toyllm.load("tales-gpt2", threads=1)
    tests = [Case(PREFILL, 4, 4, 1), Case(PREFILL, 4, 4, 7)]
    made = bench.set_up(model, tests, 8)
    assert counts == [1, 7], "all are checked before anything runs"
    counts.clear()
    bench.measure(made, tests[1], 1, quiet)
    assert counts == [1, 7] * 2


def test_threads_that_there_are_not_are_refused(short: None) -> None:
    with pytest.raises(ToyllmError, match=r"^--threads 4096: expected 1 to \d+"):
        bench.set_up(toyllm.load("tales-gpt2"), [Case(PREFILL, 4, 0, 4096)], 4)
    set_threads()


# The machine


@pytest.mark.parametrize(
    ("free", "weights", "nbytes"),
    [
        (None, 10**9, bench.STREAM),
        (40 * 10**9, 10**10, bench.STREAM),
        (3 * 10**9, 10**9, 2 * 10**9 - 10**8 - bench.RESERVE),
        (10**9, 9 * 10**8, bench.SMALLEST_STREAM),
        (2 * 10**9, 9 * 10**9, 2 * 10**9 - 10**8 - bench.RESERVE),  # the weights do not fit in any case
    ],
)
def test_the_stream_leaves_weights_and_cache_their_memory(free: int | None, weights: int, nbytes: int) -> None:
    assert bench.stream_bytes(free, weights, 10**8) == nbytes


def test_a_stream_that_the_system_does_not_give_is_a_smaller_one_and_said(
    short: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give, model = bench.stream_array, toyllm.load("tales-gpt2")

    def most(nbytes: int, limit: int) -> np.ndarray:
        if nbytes > limit:
            raise MemoryError
        return give(nbytes)

    monkeypatch.setattr(bench, "stream_array", lambda nbytes: most(nbytes, 2**21))
    with caplog.at_level("INFO", logger="toyllm"):
        monkeypatch.setattr(bench.log, "propagate", True)
        assert bench.make_stream(model, 0).nbytes == 2**21
    assert "streaming is measured over 0.00 GB" in caplog.text
    monkeypatch.setattr(bench, "stream_array", lambda nbytes: most(nbytes, 0))
    with pytest.raises(ToyllmError, match="gives no 1 MB to measure streaming"):
        bench.make_stream(model, 0)


def test_caches_that_processors_share_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (5, "4-5")):
        for level, size, processors in ((1, "32K", str(cpu)), (3, "4096K", shared)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", processors)):
                (folder / name).write_text(text + "\n")
    assert bench.last_cache_bytes(tmp_path) == 2 * 4096 * 1024
    assert bench.last_cache_bytes(tmp_path / "nothing") is None
