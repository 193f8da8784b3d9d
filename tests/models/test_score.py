"""Scoring: windows, log-probabilities, ranks, entropies, KL divergence, what they come to, and transformers' own figures."""

import functools
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import score as module
from toyllm.models.location import EMBEDDED
from toyllm.models.score import comparison, encode_text, figures, measure, score, tokens, window_sizes, windows

GOLDENS = Path(__file__).parent / "goldens"
TEXT = (GOLDENS / "score" / "text.txt").read_bytes().decode()
MODELS = ("tales-gpt2", "tales-gpt-oss")


@functools.cache
def model(name: str = "tales-gpt2", **settings: Any) -> Any:
    return toyllm.load(name, **settings)


@functools.cache
def golden(name: str) -> Any:
    return json.loads((GOLDENS / "score" / f"{name}.json").read_text())


def columns(found: list[Any]) -> dict[str, np.ndarray]:
    """All scores of a run, joined."""
    names = ("logprobs", "ranks", "entropies", "top", "top_logprobs")
    return {name: np.concatenate([getattr(part, name) for part in found]) for name in names}


# windows


@pytest.mark.parametrize(("T", "context", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (6, 4, 2), (100, 10, 3), (100, 10, 1), (37, 8, 8)])
def test_each_token_is_scored_once_with_context_less_stride_tokens_before_it(T: int, context: int, stride: int) -> None:
    scored = [(i, i - w.begin) for w in windows(T, context, stride) for i in range(w.first, w.end)]
    unscored = {0} if stride < context else set(range(0, T, stride))
    assert [i for i, _ in scored] == [i for i in range(T) if i not in unscored]
    assert all(before >= min(i, max(1, context - stride)) for i, before in scored)
    assert all(w.end - w.begin <= context for w in windows(T, context, stride))


def test_sizes_have_defaults_and_bounds() -> None:
    gpt2, gpt_oss = model(), model("tales-gpt-oss")
    assert window_sizes([gpt2], None, None) == (512, 256)
    assert window_sizes([gpt_oss, gpt2], None, None) == (512, 256), "what both models know"
    assert window_sizes([gpt2], 7, None) == (7, 3)
    assert window_sizes([gpt2], 2, 2) == (2, 2)
    for context, stride, message in [
        (1, None, "--context 1: expected 2 to 512"),
        (513, None, "--context 513: expected 2 to 512"),
        (None, 0, "--stride 0: expected 1 to 512"),
        (10, 11, "--stride 11: expected 1 to 10, the context"),
    ]:
        with pytest.raises(ToyllmError, match=message):
            window_sizes([gpt2], context, stride)


# numbers


def reference(logits: np.ndarray) -> np.ndarray:
    """ln p in NumPy's longest float."""
    wide = logits.astype(np.longdouble)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def test_scores_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 97 * 4)  # several pieces, the last one short
    rng = np.random.default_rng(1)
    logits, others = (rng.normal(0, size, (9, 97)).astype(np.float32) for size in (6, 2))
    ids = rng.integers(0, 97, 9)
    found = measure(5, ids, [logits, others], 3)
    assert found.first == 5
    for n, row in enumerate(logits):
        log_p, log_q = reference(row), reference(others[n])
        p = np.exp(log_p)
        assert found.logprobs[n] == pytest.approx(float(log_p[ids[n]]), abs=1e-12)
        assert found.ranks[n] == np.argsort(np.argsort(-row))[ids[n]] + 1
        assert found.entropies[n] == pytest.approx(float(-(p * log_p).sum()), abs=1e-12)
        assert found.top[n].tolist() == np.argsort(-row)[:3].tolist()
        assert found.top_logprobs[n] == pytest.approx(log_p[found.top[n]].astype(float), abs=1e-12)
        assert found.departure.logprobs[n] == pytest.approx(float(log_q[ids[n]]), abs=1e-12)
        assert found.departure.kl[n] == pytest.approx(float((p * (log_p - log_q)).sum()), abs=1e-12)
        assert found.departure.agrees[n] == (row.argmax() == others[n].argmax())


def test_of_equally_likely_tokens_the_lower_id_comes_first() -> None:
    logits = np.array([[1, 3, 3, 0, 3]] * 5, np.float32)
    assert measure(1, np.arange(5), [logits], 0).ranks.tolist() == [4, 1, 2, 5, 3]


def test_logits_far_apart_neither_overflow_nor_lose_the_small_ones() -> None:
    logits = np.array([[3e38, -3e38, 0], [1000, 0, -1000]], np.float32)
    found = measure(1, np.array([1, 2]), [logits, logits[::-1].copy()], 0)
    assert found.logprobs.tolist() == [float(logits[0, 1]) - float(logits[0, 0]), -2000]
    assert found.entropies.tolist() == [0, 0]
    assert np.isfinite(found.departure.kl).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused_with_the_token(bad: float) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[2, 4] = bad
    for given in ([logits], [np.zeros((3, 5), np.float32), logits]):
        with pytest.raises(ToyllmError, match="before token 12 hold NaN or infinity"):
            measure(10, np.array([0, 1, 2]), given, 0)


@pytest.mark.parametrize("name", MODELS)
def test_one_window_is_one_pass_over_the_text(name: str) -> None:
    ids = encode_text(model(name), TEXT).ids
    logits = model(name).logits(ids)
    found = columns(list(score(model(name), ids, top=2)))
    expected = columns([measure(1, np.array(ids[1:]), [logits[:-1]], 2)])
    for column, values in expected.items():
        np.testing.assert_array_equal(found[column], values)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode_text(model(name), TEXT).ids
    expected = columns(list(score(model(name), ids, 90, 40, top=1)))
    found = columns(list(score(model(name, prefill_chunk=7), ids, 90, 40, top=1)))
    monkeypatch.setattr(module, "LOGITS", 4 * 4096 * 5)
    parts = list(score(model(name), ids, 90, 40, top=1))
    assert max(len(part.logprobs) for part in parts) == 5
    for column, values in expected.items():
        np.testing.assert_array_equal(found[column], values)
        np.testing.assert_array_equal(columns(parts)[column], values)


def test_memory_does_not_grow_with_the_text_times_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 2**20)
    ids = encode_text(model(), TEXT).ids

    def peak(repeats: int) -> int:
        tracemalloc.start()
        for _ in score(model(), ids * repeats, 128, 64):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # buffers
    assert peak(8) - peak(2) < 6 * len(ids) * 64 < 6 * len(ids) * 4096 * 4 / 100


# texts


def test_a_text_is_encoded_as_transformers_does() -> None:
    for name in MODELS:
        text = encode_text(model(name), TEXT)
        assert text.ids == golden(name)["ids"]
        assert text.nbytes.sum() == len(TEXT.encode())
        assert text.characters.sum() == len(TEXT)
        np.testing.assert_array_equal(text.nbytes, [len(model(name).tokenizer.token_bytes(i)) for i in text.ids])


def test_special_tokens_are_one_token_or_plain_text() -> None:
    assert encode_text(model(), "a<|endoftext|>").ids[1:] == [0]
    plain = encode_text(model(), "a<|endoftext|>", special=False)
    assert 0 not in plain.ids
    assert plain.nbytes.sum() == len("a<|endoftext|>")


def test_the_beginning_of_text_stands_once_and_spells_nothing() -> None:
    plain, begun = encode_text(model(), "A fox"), encode_text(model(), "A fox", bos=True)
    assert begun.ids == [0, *plain.ids]
    assert (begun.nbytes.tolist(), begun.characters.tolist()) == ([0, *plain.nbytes], [0, *plain.characters])
    assert encode_text(model(), [0, 5], bos=True).ids == [0, 5]
    found = list(score(model(), begun.ids))
    assert found[0].first == 1
    assert figures(begun, found).bytes == len("A fox")


def test_what_the_tokenizer_puts_around_a_text_spells_nothing(tmp_path: Path) -> None:
    for file in (EMBEDDED / "tales-gpt2").iterdir():
        (tmp_path / file.name).symlink_to(file)
    document = json.loads((EMBEDDED / "tales-gpt2" / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    document["post_processor"] = {"type": "TemplateProcessing", "single": [piece, sequence], "pair": [], "special_tokens": special}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    text = encode_text(toyllm.load(str(tmp_path)), "A<|endoftext|>")
    assert (text.ids, text.nbytes.tolist()) == ([0, 33, 0], [0, 1, len("<|endoftext|>")])
    with pytest.raises(ToyllmError, match="the text is empty"):
        encode_text(toyllm.load(str(tmp_path)), "")


def test_what_cannot_be_scored_is_refused() -> None:
    ids_only = toyllm.load(str(GOLDENS / "gpt2" / "baseline"))
    for given, options, message in [
        ("", {}, "the text is empty"),
        ([], {}, "the text is empty"),
        ([5, 4096], {}, r"token id 4096 \(number 2 of 2\): expected 0 to 4095"),
    ]:
        with pytest.raises(ToyllmError, match=message):
            encode_text(model(), given, **options)
    with pytest.raises(ToyllmError, match="no tokenizer beside the weights; give ids with --prompt-ids"):
        encode_text(ids_only, "a")
    with pytest.raises(ToyllmError, match=r"--bos: .* names no bos_token_id"):
        encode_text(ids_only, [1], bos=True)
    assert encode_text(ids_only, [1, 2]).nbytes is None


# figures


def test_figures_are_means_over_the_scored_tokens() -> None:
    text = encode_text(model(), TEXT)
    found = list(score(model(), text.ids, 64, 64))
    joined, came = columns(found), figures(text, found)
    scored = [i for i in range(len(text.ids)) if i % 64]
    assert len(joined["logprobs"]) == len(scored)
    bits = -joined["logprobs"].sum() / math.log(2)
    assert came.perplexity == pytest.approx(math.exp(-joined["logprobs"].mean()))
    assert came.nats_per_token == pytest.approx(-joined["logprobs"].mean())
    assert came.bytes == text.nbytes[scored].sum() < len(TEXT.encode())
    assert came.characters == text.characters[scored].sum()
    assert came.bits_per_byte == pytest.approx(bits / came.bytes)
    assert came.bits_per_character == pytest.approx(bits / came.characters)
    assert came.entropy == pytest.approx(joined["entropies"].mean())
    assert came.top_1 == np.mean(joined["ranks"] == 1)


def test_one_token_alone_has_no_score() -> None:
    text = encode_text(model(), "A")
    found = list(score(model(), text.ids))
    assert found == []
    came = figures(text, found)
    assert (came.perplexity, came.nats_per_token, came.bits_per_byte, came.bytes) == (None, None, None, 0)
    assert comparison(found) is None


def test_a_perplexity_beyond_f64_is_infinite() -> None:
    logits = np.array([[0, 2000]], np.float32)
    found = [measure(1, np.array([0]), [logits, logits], 0)]
    assert figures(module.Text([1, 0], None, None), found).perplexity == math.inf
    assert comparison(found).perplexity_difference == 0


def test_tokens_come_in_order_the_unscored_ones_among_them() -> None:
    ids = encode_text(model(), TEXT).ids[:10]
    found = list(score(model(), ids, 4, 4, top=2))
    listed, reached = [], 0
    for part in found:
        listed += tokens(ids, reached, part)
        reached = part.first + len(part.logprobs)
    listed += tokens(ids, reached)
    assert [(token.number, token.id) for token in listed] == list(enumerate(ids))
    assert [token.number for token in listed if token.logprob is None] == [0, 4, 8]
    assert [token.logprob for token in listed if token.logprob is not None] == columns(found)["logprobs"].tolist()
    assert listed[1].top == tuple(zip(found[0].top[0].tolist(), found[0].top_logprobs[0].tolist(), strict=True))
    assert (listed[1].against_logprob, listed[1].kl, listed[4].rank, listed[4].entropy, listed[4].top) == (None, None, None, None, ())


# another run


@pytest.mark.parametrize("name", MODELS)
def test_a_run_does_not_depart_from_itself(name: str) -> None:
    ids = encode_text(model(name), TEXT).ids
    found = comparison(list(score(model(name), ids, 90, 40, against=model(name, prefill_chunk=33))))
    kl = (found.kl_mean, found.kl_p50, found.kl_p90, found.kl_p99, found.kl_max)
    assert (kl, found.perplexity_difference, found.top_1_agreement) == ((0,) * 5, 0, 1)


def test_a_departure_is_that_of_two_runs_apart() -> None:
    gpt2, gpt_oss = model(), model("tales-gpt-oss")
    ids = encode_text(gpt2, TEXT).ids
    both = list(score(gpt2, ids, 90, 40, against=gpt_oss))
    found = comparison(both)
    np.testing.assert_array_equal(columns(both)["logprobs"], columns(list(score(gpt2, ids, 90, 40)))["logprobs"])
    alone = columns(list(score(gpt_oss, ids, 90, 40)))
    np.testing.assert_array_equal(np.concatenate([part.departure.logprobs for part in both]), alone["logprobs"])
    assert found.perplexity == pytest.approx(math.exp(-alone["logprobs"].mean()))
    assert found.perplexity_difference == found.perplexity - figures(encode_text(gpt2, TEXT), both).perplexity
    kl = np.concatenate([part.departure.kl for part in both])
    assert found.kl_mean == pytest.approx(kl.mean())
    assert (found.kl_p50, found.kl_p90, found.kl_p99) == tuple(np.percentile(kl, (50, 90, 99)))
    assert (found.kl_max, found.kl_max_at) == (kl.max(), kl.argmax() + 1)
    assert 0.3 < found.top_1_agreement < 0.9


def test_what_a_coarser_cache_costs_is_a_small_number() -> None:
    ids = encode_text(model(), TEXT).ids
    found = comparison(list(score(model(), ids, against=model(cache_dtype="bf16"))))
    assert 0 < found.kl_mean < found.kl_max < 1e-2
    assert found.top_1_agreement > 0.95


def test_two_models_run_on_their_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = toyllm.load("tales-gpt2"), toyllm.load("tales-gpt2")
    one.threads, other.threads = 1, 2
    used: list[Any] = []
    monkeypatch.setattr(module, "set_threads", used.append)
    list(score(one, [1, 2, 3], against=other))
    assert used == [1, 2]


def test_models_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    small = toyllm.load(str(GOLDENS / "gpt2" / "baseline"))
    with pytest.raises(
        ToyllmError, match=r"the vocabularies differ \(4096 tokens in tales-gpt2, 97 in .*baseline\): .* compare bits a byte"
    ):
        score(model(), [1, 2], against=small)
    for file in (EMBEDDED / "tales-gpt2").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    ids_only = toyllm.load(str(tmp_path))
    assert len(list(score(model(), [1, 2], against=ids_only))) == 1, "nothing says that its ids mean something else"
    document = json.loads((EMBEDDED / "tales-gpt2" / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {"A": document["model"]["vocab"]["B"], "B": document["model"]["vocab"]["A"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ToyllmError, match=r"token 33 is 'A' in tales-gpt2, 'B' in "):
        score(model(), [1, 2], against=toyllm.load(str(tmp_path)))


# transformers


def guide(logprobs: np.ndarray, T: int, context: int, stride: int) -> float:
    """The perplexity of transformers' guide from log-probabilities f64 [T], NaN where there is none: a mean a window, and its weights."""
    means = [
        (-np.nanmean(logprobs[w.first : w.end]), w.end - max(w.first, w.begin + 1) - (w.begin > 0)) for w in windows(T, context, stride)
    ]
    return math.exp(sum(mean * weight for mean, weight in means) / sum(weight for _, weight in means))


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_transformers(name: str) -> None:
    expected = golden(name)
    exact = model(name, exact=True)
    text = encode_text(exact, TEXT)
    T, context, stride = len(text.ids), expected["context"], expected["stride"]
    found = list(score(exact, text.ids, context, stride))
    logprobs, ranks, entropies = np.full((3, T), np.nan)
    for part in found:
        place = slice(part.first, part.first + len(part.logprobs))
        logprobs[place], ranks[place], entropies[place] = part.logprobs, part.ranks, part.entropies
    theirs = {column: np.array(expected[column], float) for column in ("logprobs", "ranks", "entropies")}
    np.testing.assert_allclose(logprobs, theirs["logprobs"], atol=1e-4)
    np.testing.assert_allclose(entropies, theirs["entropies"], atol=1e-4)
    assert (ranks[1:] == theirs["ranks"][1:]).mean() > 0.98, "but where two logits are nearly one"
    assert figures(text, found).perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert guide(logprobs, T, context, stride) == pytest.approx(expected["guide"], rel=1e-5)
