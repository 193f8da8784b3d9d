"""Fuzzing by hand: as many trials of a leg as wanted, each from its own number, so that a find can be had again alone.

python -m tests.fuzz headers --count 1000000 --seed 1
python -m tests.fuzz headers --seed 1 --only 1234       the traceback of one trial
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from random import Random

from . import batches, cards, configs, headers, indexes, kernels, sessions, slices, streams, tokenizers, weights
from .leg import Leg, Result, ready, run

LEGS: dict[str, Leg] = {
    "headers": headers.LEG,
    "indexes": indexes.LEG,
    "configs": configs.LEG,
    "slices": slices.LEG,
    "streams": streams.LEG,
    "tokenizers": tokenizers.LEG,
    "cards": cards.LEG,
    "sessions": sessions.LEG,
    "batches": batches.LEG,
    "weights": weights.LEG,
    "kernels": kernels.LEG,
}
SHOWN = 20  # finds in the report; the others are counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run legs. Returns 1 where there is a find."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("leg", choices=[*LEGS, "all"], help="; ".join(f"{name}: {leg.about}" for name, leg in LEGS.items()))
    parser.add_argument("--count", type=int, default=1000, help="trials of each leg (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="other trials for another seed (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial (default: 0)")
    parser.add_argument("--seconds", type=float, help="stop a leg after so long")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one trial alone, with the traceback of what it raises")
    given = parser.parse_args(arguments)
    legs = LEGS if given.leg == "all" else {given.leg: LEGS[given.leg]}
    if given.only is not None:
        return max([alone(leg, given.seed, given.only) for leg in legs.values()])
    failed = False
    for name, leg in legs.items():

        def progress(done: int, name: str = name) -> None:
            if done % 100_000 == 0:
                print(f"{name}: {done:,} trials", file=sys.stderr)

        result = run(leg, given.seed, range(given.first, given.first + given.count), given.seconds, progress)
        report(name, given.seed, result)
        failed |= bool(result.finds)
    return int(failed)


def alone(leg: Leg, seed: int, number: int) -> int:
    """One trial, whatever it raises shown. Returns 1 for a find."""
    with ready(leg) as trial:
        try:
            print(trial(Random(f"{seed} {number}")))
        except BaseException:  # noqa: BLE001 - a panic of a Rust library is a BaseException
            traceback.print_exc()
            return 1
    return 0


def report(name: str, seed: int, result: Result) -> None:
    """How the trials of a leg ended, most often first, and its finds."""
    total = sum(result.ended.values())
    print(f"{name}, seed {seed}: {total:,} trials in {result.seconds:.1f} s, {len(result.finds):,} finds")
    for ended, count in result.ended.most_common():
        print(f"{count:>10,}  {ended}")
    for number, error in [*result.finds.items()][:SHOWN]:
        print(f"  --only {number}: {type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    logging.getLogger("toyllm").setLevel(logging.CRITICAL)  # notes on damaged files, thousands of them
    sys.exit(main())
