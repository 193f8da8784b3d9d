"""Many prompts together, of any lengths, settings and common beginnings: each says what it says alone, to the last token."""

from dataclasses import replace
from pathlib import Path
from random import Random

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.batch import Request, answers
from toyllm.models.generation import Settings, generate
from toyllm.models.model import Model

from . import weights
from .leg import Find, Leg, Trial, refused


def some_settings(rng: Random) -> Settings:
    """How to continue, within bounds and at times beyond."""
    made = Settings(max_tokens=rng.choice((0, 1, 2, 5, 9)), temperature=rng.choice((0, 0.7, 1.5)), seed=rng.randrange(100))
    made = replace(made, top_k=rng.choice((0, 1, 3)), top_p=rng.choice((0, 0.5, 1)), repetition_penalty=rng.choice((1, 1.3)))
    made = replace(
        made, eos=rng.choice(((), (0,), (1, 2))), logprobs=rng.choice((None, None, 0, 2)), frequency_penalty=rng.choice((0, 0.5))
    )
    return made if rng.randrange(20) else replace(made, temperature=-1)


def prompts(rng: Random, vocabulary: int, context: int) -> list[list[int]]:
    """Prompts, some of which begin as others do; one may be empty or too long."""
    found: list[list[int]] = []
    for _ in range(rng.randint(1, 6)):
        before = rng.choice(found) if found and rng.randrange(2) else []
        length = rng.choice((1, 2, 5, 17, context, context + 1, 0)) if rng.randrange(8) == 0 else rng.randint(1, max(1, context // 2))
        found.append([*before[: rng.randint(0, len(before))], *(rng.randrange(vocabulary) for _ in range(length))][: context + 1])
    return found


def alone(model: Model, prompt: list[int], settings: Settings) -> tuple[list[int], str] | str:
    """The tokens and why they ended, or the error."""
    try:
        events = [*generate(model, prompt, settings)] if prompt else []
    except ToyllmError as error:
        return refused(error)
    if not events or events[-1].result is None:
        return "nothing"
    return [event.token.id for event in events if event.token], events[-1].result.finish_reason


def check_batch(rng: Random, folder: Path) -> str:
    """A batch against each of its requests alone. Raises Find."""
    weights.write(rng, folder, rng.choice(("gpt2", "gpt_oss")), 0)
    given = {"prefill_chunk": rng.choice((1, 3, 8, 512)), "cache_dtype": rng.choice(("f32", "bf16")), "poison_cache": True, "threads": 1}
    model = toyllm.load(str(folder), **given, moe=rng.choice(("auto", "grouped", "budget")))
    context = min(model.config.context, 60)
    requests = [Request(p, some_settings(rng), i) for i, p in enumerate(prompts(rng, model.vocab_size, context))]
    together = {answer.request.key: answer for answer in answers(model, requests, rng.randint(1, 5))}
    if together.keys() != set(range(len(requests))):
        raise Find(f"answers to {sorted(together)} of {len(requests)} requests")
    for request in requests:
        answer, expected = together[request.key], alone(model, list(request.prompt), request.settings)
        if answer.error is not None:
            refused(answer.error)
            if not isinstance(expected, str):
                raise Find(f"request {request.key}: {answer.error}; alone it gives {expected}")
        elif ([token.id for token in answer.tokens], answer.result and answer.result.finish_reason) != expected:
            raise Find(f"request {request.key}: {[token.id for token in answer.tokens]}, alone {expected}")
    return f"{len(requests)} together as alone"


def prepare(folder: Path) -> Trial:
    return lambda rng: check_batch(rng, folder)


LEG = Leg("batches of prompts, against each of them alone", prepare)
