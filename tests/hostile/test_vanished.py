"""Weights that vanish from under a run: between two passes an error, within one the end of the process in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import map_file

from .making import WEIGHTS, gpt2

CUT_SHORT = """
import os, sys
from toyllm.cli.main import main
from toyllm.models import gpt2
block = gpt2.block
def cut_short(x, w, i, *rest):
    if i == 1:
        os.truncate(sys.argv[sys.argv.index("-m") + 1] + "/model.safetensors", 4096)
    block(x, w, i, *rest)
gpt2.block = cut_short
main()
"""


@pytest.mark.parametrize(
    "arguments", [("generate", "--prompt-ids", "1 2", "--seed", "1"), ("score", "--prompt-ids", "1 2", "--no-preload")]
)
def test_a_file_that_shrinks_within_a_pass_ends_the_process_in_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    folder = gpt2(tmp_path / "\x1b[2Jmodel")
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, *arguments, "-m", str(folder)], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("note: ", "seed "))]
    cause = "a page of the weights could not be read: a file became shorter, or its disk failed, while it was in use"
    assert lines == [f"error: {tmp_path}/\\x1b[2Jmodel: {cause}; download the model again"]
    assert (done.returncode, done.stdout) == (1, "")


def test_a_file_that_shrinks_between_two_passes_is_an_error_before_it_is_touched(tmp_path: Path) -> None:
    model = toyllm.load(str(gpt2(tmp_path)))
    assert model.logits([1]).shape == (1, 97)
    os.truncate(tmp_path / WEIGHTS, 5000)
    with pytest.raises(ToyllmError, match=r"model\.safetensors: changed while open: it had 10\d,\d+ bytes, and has 5,000 now"):
        model.logits([1])


def test_a_file_that_grows_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    model = toyllm.load(str(gpt2(tmp_path)))
    before = model.logits([1])
    with (tmp_path / WEIGHTS).open("ab") as file:
        file.write(bytes(10_000))
    assert (model.logits([1]) == before).all()
    with pytest.raises(ToyllmError, match="too long"):
        map_file(tmp_path / WEIGHTS)
