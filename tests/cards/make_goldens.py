"""Writes the goldens of test_goldens.py: every card at the shapes of published models, as `toyllm card --full --config FILE` shows it.

python tests/cards/make_goldens.py
"""

import contextlib
import io
from pathlib import Path

from toyllm.cli.main import run

HERE = Path(__file__).parent
MODELS = ("distilgpt2", "gpt2", "gpt-oss-20b", "gpt-oss-120b")


def full_text(name: str) -> str:
    """What the command writes for a model's config.json."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        code = run(["card", "--full", "--config", str(HERE / "configs" / f"{name}.json")])
    if code:
        raise SystemExit(code)
    return written.getvalue()


if __name__ == "__main__":
    for name in MODELS:
        (HERE / "goldens" / f"{name}.txt").write_text(full_text(name), encoding="utf-8")
