"""How likely a model finds a text: log-probability, rank and entropy of every token, perplexity, and how far another run departs.

    ln p[t] = logits[t − 1, id[t]] − ln Σ_v exp(logits[t − 1, v])        perplexity = exp(−mean ln p)
    entropy[t] = −Σ_v p[v] ln p[v]                                       KL(P‖Q)[t] = Σ_v p[v] (ln p[v] − ln q[v])

in nats, summed in f64 over the model's f32 logits. What does not fit in one window is scored as transformers' guide does it
(docs/source/en/perplexity.md): windows of `context` tokens begin every `stride` tokens, and each scores the tokens that none before it
has reached. A token with nothing before it in its window has no probability: the text's first, and at a stride as long as the context
the first of every window. The mean is over all scored tokens alike; the guide's own loop counts every window but the first as one token
less than it scores.

Logits are made and measured in pieces: memory grows with the text by some numbers a token, never by a vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import ToyllmError
from ..kernels.sampling import largest
from ..kernels.threads import set_threads
from .model import check_ids

if TYPE_CHECKING:
    from .model import Model
    from .tokenizer import Tokenizer

LOGITS = 2**28  # bytes of logits held at a time, of both models together
PIECE = 2**18  # logits measured at a time, in f64: a few of these arrays fit in a processor's cache


# ---- the text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """The ids of a text [T], and how many bytes and characters each spells, int64 [T]; None where there is no tokenizer."""

    ids: list[int]
    nbytes: np.ndarray | None
    characters: np.ndarray | None


def encode_text(model: "Model", text: str | Sequence[int], special: bool = True, bos: bool = False) -> Text:
    """The ids of a text, or the ids given, checked; with `bos` the beginning-of-text token before them, if it is not there.

    What the tokenizer or `bos` adds spells nothing; a character that several tokens spell counts with its first. Raises ToyllmError for
    text without a tokenizer, for no tokens, and for ids out of range.
    """
    if not isinstance(text, str):
        ids, silent = [int(i) for i in text], [False] * len(text)
    elif model.tokenizer is None:
        raise ToyllmError(f"{model.files.name}: no tokenizer beside the weights; give ids with --prompt-ids")
    else:
        encoding = model.tokenizer.encoding(text, special)
        ids, silent = list(encoding.ids), [bool(inserted) for inserted in encoding.special_tokens_mask]
    if all(silent):
        raise ToyllmError("the text is empty: there is nothing to score")
    if bos:
        beginning = list((model.defaults.bos_token_id or model.config.bos_token_id)[:1])
        if not beginning:
            raise ToyllmError(f"--bos: {model.files.name} has no beginning-of-text token: its configuration names no bos_token_id")
        if ids[:1] != beginning:
            ids, silent = beginning + ids, [True, *silent]
    check_ids(ids, model.vocab_size)
    if model.tokenizer is None:
        return Text(ids, None, None)
    nbytes, characters = spelling(model.tokenizer, ids)
    spells = ~np.array(silent)
    return Text(ids, nbytes * spells, characters * spells)


def spelling(tokenizer: "Tokenizer", ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes, and how many characters' first bytes, each of the ids [T] spells; int64 [T] both."""
    different, place = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    pieces = [tokenizer.token_bytes(int(i)) for i in different]
    nbytes = np.array([len(piece) for piece in pieces], np.int64)
    characters = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], np.int64)
    return nbytes[place], characters[place]


# ---- windows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end`, of which those from `first` on are scored."""

    begin: int
    end: int
    first: int


def window_sizes(models: Sequence["Model"], context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride, checked; None is the most that all models know, and half a context. Raises ToyllmError."""
    most = min(model.config.context for model in models)
    if context is not None and not 2 <= context <= most:
        raise ToyllmError(f"--context {context}: expected 2 to {most}, the positions {'both models know' if models[1:] else 'it knows'}")
    length = most if context is None else context
    step = max(1, length // 2) if stride is None else stride
    if not 1 <= step <= length:
        raise ToyllmError(f"--stride {step}: expected 1 to {length}, the context")
    return length, step


def windows(T: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text of T tokens, in order."""
    reached = 0
    for begin in range(0, T, stride):
        end = min(begin + context, T)
        yield Window(begin, end, max(reached, begin + 1))
        reached = end
        if end == T:
            return


# ---- scores -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Departure:
    """What another run Q makes of the same n tokens."""

    logprobs: np.ndarray  # f64 [n], ln q of each token
    kl: np.ndarray  # f64 [n], KL(P‖Q) of the distributions it was drawn from
    agrees: np.ndarray  # bool [n], whether both find the same token likeliest


@dataclass(frozen=True)
class Scores:
    """Of n tokens from number `first` of the text on."""

    first: int
    logprobs: np.ndarray  # f64 [n], ln p of each token
    ranks: np.ndarray  # int64 [n], 1: the likeliest; of equally likely ones the lower id comes first
    entropies: np.ndarray  # f64 [n], of the distribution it was drawn from
    top: np.ndarray  # int64 [n, N], the N likeliest, likeliest first
    top_logprobs: np.ndarray  # f64 [n, N]
    departure: Departure | None = None


def score(
    model: "Model", ids: Sequence[int], context: int | None = None, stride: int | None = None, top: int = 0, against: "Model | None" = None
) -> Iterator[Scores]:
    """Score ids [T] in windows, in their order, some at a time, with the `top` likeliest; `against` is a run to compare with.

    Raises ToyllmError for sizes and ids that do not fit, for models of different vocabularies, and for logits that are not finite.
    """
    runs = [model] if against is None else [model, against]
    context, stride = window_sizes(runs, context, stride)
    check_ids(ids, model.vocab_size)
    if against is not None:
        check_same_vocabulary(model, against)
    rows = max(1, min(context, len(ids), *(run.prefill_chunk for run in runs), LOGITS // (4 * model.vocab_size * len(runs))))
    return pieces(runs, ids, list(windows(len(ids), context, stride)), rows, top)


def pieces(runs: Sequence["Model"], ids: Sequence[int], wanted: Sequence[Window], rows: int, top: int) -> Iterator[Scores]:
    """The scores of `score`, whose checks have passed, of at most `rows` tokens at a time."""
    buffers = [np.empty((rows, run.vocab_size), np.float32) for run in runs]
    for window in wanted:
        logits = [window_logits(run, ids, window, buffer) for run, buffer in zip(runs, buffers, strict=True)]
        for first, parts in zip(range(window.first, window.end, rows), zip(*logits, strict=True), strict=True):
            yield measure(first, np.asarray(ids[first : first + len(parts[0])]), parts, top)


def window_logits(model: "Model", ids: Sequence[int], window: Window, buffer: np.ndarray) -> Iterator[np.ndarray]:
    """Logits f32 [n, V] before each scored token of a window, in order, as many as the buffer holds at a time."""
    if window.first >= window.end:
        return
    cache = model.new_cache(window.end - window.begin)

    def run(begin: int, end: int, out: np.ndarray | None = None) -> None:
        set_threads(model.threads)  # they are the process's, and two models may want different numbers
        positions = np.arange(begin, end) - window.begin
        model.forward(ids[begin:end], positions, np.zeros_like(positions), cache, all_logits=out is not None, out=out)

    begin, end = window.first - 1, window.end - 1
    if begin > window.begin:
        run(window.begin, begin)
    for at in range(begin, end, len(buffer)):
        part = buffer[: min(len(buffer), end - at)]
        run(at, at + len(part), part)
        yield part


def measure(first: int, ids: np.ndarray, logits: Sequence[np.ndarray], top: int) -> Scores:
    """The scores of ids [n], number `first` of the text and those after it, from the logits f32 [n, V] of one run or two."""
    n, V = logits[0].shape
    step = max(1, PIECE // V)
    parts = [measure_piece(first + i, ids[i : i + step], [each[i : i + step] for each in logits], top) for i in range(0, n, step)]
    logprobs, ranks, entropies, likeliest, top_logprobs, *other = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Scores(first, logprobs, ranks, entropies, likeliest, top_logprobs, Departure(*other) if other else None)


def measure_piece(first: int, ids: np.ndarray, logits: Sequence[np.ndarray], top: int) -> list[np.ndarray]:
    """The arrays of `Scores`, and of its `Departure` where there are two runs, in the order of their fields."""
    for each in logits:
        broken = np.flatnonzero(~np.isfinite(each).all(-1))
        if len(broken):
            raise ToyllmError(
                f"the logits before token {first + broken[0]} hold NaN or infinity; are the weights damaged? See toyllm check"
            )
    p, log_p = probabilities(logits[0])
    rows = np.arange(len(ids))
    own = logits[0][rows, ids][:, None]
    ranks = 1 + (logits[0] > own).sum(-1) + ((logits[0] == own) & (np.arange(p.shape[1]) < ids[:, None])).sum(-1)
    likeliest = np.array([largest(row, top) for row in logits[0]])
    found = [log_p[rows, ids], ranks, 0 - np.einsum("nv,nv->n", p, log_p), likeliest, np.take_along_axis(log_p, likeliest, -1)]
    if len(logits) > 1:
        log_q = probabilities(logits[1])[1]
        own_q, agrees = log_q[rows, ids], logits[0].argmax(-1) == logits[1].argmax(-1)
        kl = np.maximum(np.einsum("nv,nv->n", p, log_p - log_q), 0)  # where it is 0, rounding may go below
        found += [own_q, kl, agrees]
    return found


def probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The softmax of logits f32 [n, V] and its logarithm, f64 [n, V] both."""
    log_p = logits.astype(np.float64)
    log_p -= log_p.max(-1, keepdims=True)
    p = np.exp(log_p)
    total = p.sum(-1, keepdims=True)
    p /= total
    log_p -= np.log(total)
    return p, log_p


def check_same_vocabulary(model: "Model", other: "Model") -> None:
    """Raise ToyllmError where an id does not mean the same to both: their probabilities are then of different things."""
    a, b = model.files.name, other.files.name
    if model.vocab_size != other.vocab_size:
        difference = f"{model.vocab_size} tokens in {a}, {other.vocab_size} in {b}"
    elif model.tokenizer and other.tokenizer and (odd := first_difference(model.tokenizer, other.tokenizer)) is not None:
        difference = f"token {odd} is {model.tokenizer.decode([odd])!r} in {a}, {other.tokenizer.decode([odd])!r} in {b}"
    else:
        return
    raise ToyllmError(f"--against: the vocabularies differ ({difference}): score each alone, and compare bits a byte")


def first_difference(a: "Tokenizer", b: "Tokenizer") -> int | None:
    """The lowest id that spells other bytes in one tokenizer than in the other; None where there is none."""
    entries = a.library.get_vocab().items() ^ b.library.get_vocab().items()
    return min((i for _, i in entries if a.token_bytes(i) != b.token_bytes(i)), default=None)


# ---- a token, and all of them -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One token of a text with its scores; None where it has none."""

    number: int  # from 0
    id: int
    logprob: float | None = None
    rank: int | None = None
    entropy: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (id, logprob), likeliest first
    against_logprob: float | None = None  # of the other run
    kl: float | None = None


def tokens(ids: Sequence[int], reached: int, part: Scores | None = None) -> Iterator[Token]:
    """The tokens from number `reached` on to the last of `part`, those that were not scored included; without a part, all the rest."""
    for i in range(reached, part.first if part else len(ids)):
        yield Token(i, ids[i])
    if part is None:
        return
    likeliest = [tuple(zip(*each, strict=True)) for each in zip(part.top.tolist(), part.top_logprobs.tolist(), strict=True)]
    columns = [column.tolist() for column in (part.logprobs, part.ranks, part.entropies)]
    other = [column.tolist() for column in (part.departure.logprobs, part.departure.kl)] if part.departure else []
    for i, row in enumerate(zip(*columns, likeliest, *other, strict=True), part.first):
        yield Token(i, ids[i], *row)


@dataclass(frozen=True)
class Figures:
    """What the scores of a text come to: means over all scored tokens; None where there is nothing to divide by."""

    perplexity: float | None  # infinite where f64 holds no such number
    nats_per_token: float | None
    entropy: float | None  # nats
    top_1: float | None  # share of tokens of rank 1
    bytes: int | None  # that the scored tokens spell; None without a tokenizer
    characters: int | None
    bits_per_byte: float | None
    bits_per_character: float | None


@dataclass(frozen=True)
class Comparison:
    """How far another run Q departs from this one P over the scored tokens."""

    perplexity: float  # of Q
    nats_per_token: float  # of Q
    perplexity_difference: float  # Q − P
    kl_mean: float  # KL(P‖Q) in nats
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    kl_max_at: int  # the token's number
    top_1_agreement: float  # share of tokens at which both find the same one likeliest


def figures(text: Text, scores: Sequence[Scores]) -> Figures:
    """What the scores of a text come to."""
    scored = np.concatenate([np.arange(s.first, s.first + len(s.logprobs)) for s in scores] or [np.empty(0, np.int64)])
    nbytes, characters = (None if column is None else int(column[scored].sum()) for column in (text.nbytes, text.characters))
    if not len(scored):
        return Figures(None, None, None, None, nbytes, characters, None, None)
    logprobs, ranks, entropies = (np.concatenate(c) for c in zip(*((s.logprobs, s.ranks, s.entropies) for s in scores), strict=True))
    nats, bits = mean_nats(logprobs), -float(logprobs.sum()) / math.log(2)
    per_byte, per_character = (bits / count if count else None for count in (nbytes, characters))
    means = float(entropies.mean()), float((ranks == 1).mean())
    return Figures(exponential(nats), nats, *means, nbytes, characters, per_byte, per_character)


def comparison(scores: Sequence[Scores]) -> Comparison | None:
    """What the departures of the scores come to; None where there are none."""
    rows = [(s.logprobs, d.logprobs, d.kl, d.agrees, np.arange(s.first, s.first + len(d.kl))) for s in scores if (d := s.departure)]
    if not rows:
        return None
    p, q, kl, agrees, numbers = (np.concatenate(column) for column in zip(*rows, strict=True))
    ours, theirs, most = exponential(mean_nats(p)), exponential(mean_nats(q)), int(kl.argmax())
    p50, p90, p99 = (float(x) for x in np.percentile(kl, (50, 90, 99)))
    return Comparison(
        perplexity=theirs,
        nats_per_token=mean_nats(q),
        perplexity_difference=0.0 if theirs == ours else theirs - ours,  # of two infinite ones, too
        kl_mean=float(kl.mean()),
        kl_p50=p50,
        kl_p90=p90,
        kl_p99=p99,
        kl_max=float(kl[most]),
        kl_max_at=int(numbers[most]),
        top_1_agreement=float(agrees.mean()),
    )


def mean_nats(logprobs: np.ndarray) -> float:
    """−mean ln p of f64 [n], n ≥ 1."""
    return -float(logprobs.mean())


def exponential(nats: float) -> float:
    """e^nats, infinity beyond what f64 holds."""
    return math.exp(nats) if nats < math.log(np.finfo(np.float64).max) else math.inf
