"""Long runs, by hand: 20,000 tokens over shifts of the context, and 500 turns of a chat. Memory stays flat, and what comes is sane.

    python tests/hostile/soak.py [--tokens N] [--turns N]

prints a table, and ends with 1 where something did not hold. Some minutes.
"""

import argparse
import gc
import itertools
import resource
import runpy
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import toyllm
from toyllm.models.chat import Conversation
from toyllm.models.generation import Settings, generate
from toyllm.models.held import Held
from toyllm.models.model import Model

GROWTH = 2 * 2**20  # bytes by which the last quarter's memory may exceed the second's: the first one's work is to warm up
LONGEST_RUN = 50  # of one token; sampled text of a sound model has none


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Record:
    """What a run brought, step by step."""

    def __init__(self, name: str, vocab_size: int, room: int) -> None:
        self.name, self.vocab_size, self.room = name, vocab_size, room
        self.ids, self.logprobs, self.memory = array("q"), array("d"), array("q")  # a few bytes a token: this record is measured too
        self.longest = self.shifts = 0
        self.began = time.perf_counter()

    def take(self, token: int, logprob: float, held: int) -> None:
        """One token, its log-probability, and how many positions the cache then holds."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.longest = max(self.longest, held)
        if len(self.ids) % 20 == 0:
            self.memory.append(resident())

    def report(self) -> list[str]:
        """Print the figures; what did not hold."""
        quarters = [fmean(self.memory[len(self.memory) * i // 4 : len(self.memory) * (i + 1) // 4]) for i in range(4)]
        quarter = len(self.logprobs) // 4
        likely = fmean(self.logprobs[:quarter]), fmean(self.logprobs[-quarter:])
        run = max(len(list(same)) for _, same in itertools.groupby(self.ids))
        print(f"\n{self.name}: {len(self.ids):,} tokens in {time.perf_counter() - self.began:.0f} s, {self.shifts} shifts of {self.room}")
        print(
            "  memory, mean of each quarter: "
            + ", ".join(f"{q / 2**20:.2f}" for q in quarters)
            + f" MiB; most {max(self.memory) / 2**20:.2f}"
        )
        print(f"  positions held: at most {self.longest}; distinct tokens {len(set(self.ids))}, longest run of one {run}")
        print(f"  mean log-probability, first and last quarter: {likely[0]:.3f}, {likely[1]:.3f}")
        wrong = {
            "memory grew": quarters[3] - quarters[1] > GROWTH,
            "ids outside the vocabulary": not all(0 <= i < self.vocab_size for i in self.ids),
            "more positions held than there is room": self.longest > self.room,
            "one token over and over": run > LONGEST_RUN,
            "log-probabilities that drift": not abs(likely[0] - likely[1]) < 0.5,
        }
        return [f"{self.name}: {what}" for what, holds in wrong.items() if holds]


def long_text(name: str, tokens: int) -> list[str]:
    """Sampled text, many times as long as the context."""
    model: Model = toyllm.load(name)
    room = model.config.context
    held, record = Held(model, room), Record(name, model.vocab_size, room)
    settings = Settings(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=1, logprobs=0)
    for event in generate(model, model.tokenizer.encode("Once upon a time"), settings, held=held, keep=1):
        record.shifts += event.shift is not None
        if event.token:
            record.take(event.token.id, event.token.logprob or 0.0, len(held.ids))
    return [*record.report(), *([] if len(record.ids) == tokens else [f"{name}: {len(record.ids)} tokens came"])]


def long_chat(turns: int, room: int = 512) -> list[str]:
    """Short turns, forgotten by and by."""
    maker = runpy.run_path(str(Path(__file__).parents[1] / "harmony_model.py"))["maker"]
    with tempfile.TemporaryDirectory() as folder:
        maker().write_checkpoint(Path(folder))
        model: Model = toyllm.load(folder)
        talk = Conversation(model, Settings(max_tokens=24, temperature=1.0, seed=1, logprobs=0), context=room, shifting=True)
        record, longest = Record(f"chat of {turns} turns", model.vocab_size, room), 0
        for number in range(turns):
            for event in questions(talk, number):
                record.take(event.token.id, event.token.logprob or 0.0, len(talk.held.ids))
            record.shifts += bool(talk.forgotten)
            longest = max(longest, len(talk.messages))
        wrong = record.report()
        print(f"  messages kept: at most {longest}; questions asked {talk.turns}")
        return [*wrong, *([] if talk.turns == turns else ["turns are missing"])]


def questions(talk: Conversation, number: int) -> Iterator:
    """The tokens of an answer."""
    return (event for event in talk.ask(f"Question {number}: {'why? ' * (number % 7)}") if event.token)


def main() -> int:
    """Run all of it; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=500)
    given = parser.parse_args()
    wrong = []
    for name in ("tales-gpt2", "tales-gpt-oss"):
        wrong += long_text(name, given.tokens)
        gc.collect()
    wrong += long_chat(given.turns)
    print("\n" + ("\n".join(f"did not hold: {what}" for what in wrong) or "all held"))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
