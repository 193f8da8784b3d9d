"""`toyllm pull` against a hub on loopback: what it prints where, how it ends, and that what it downloads is found."""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toyllm.cli.main import run
from toyllm.models import hub as models_hub
from toyllm.models.location import find_model

hub_server = runpy.run_path(str(Path(__file__).parents[1] / "hub_server.py"))

FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"w" * 3_000_000, "original/model.safetensors": b"o"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that serves `me/x`, and is the one that this process and its children ask."""
    with hub_server["serve"]() as hub:
        hub_server["point_at"](hub, tmp_path, monkeypatch)
        hub.add("me/x", FILES)
        yield hub


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much room on the disk that the messages can be compared."""
    monkeypatch.setattr(models_hub, "free_space", lambda: 84_200_000_000)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Run `toyllm` in a process of its own, off any terminal."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_")} | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    program = [sys.executable, "-c", "from toyllm.cli.main import main; main()", *arguments]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_folder_is_the_only_output_and_find_model_finds_it_offline(hub: Any, tmp_path: Path) -> None:
    process = start("pull", "me/x")
    out, err = process.communicate(timeout=60)
    folder = tmp_path / "hub" / "models--me--x" / "snapshots" / hub.commit("me/x", "main")
    assert (process.returncode, out) == (0, f"{folder}\n")
    summary, following = err.splitlines()  # and no bars off a terminal
    assert summary.startswith("me/x: 2 files, 3 MB; 3 MB to download, ")
    assert summary.endswith(f" free in {tmp_path / 'hub'}")
    assert following == 'next: toyllm generate -m me/x "Once upon a time"'
    assert all(path.startswith(("/api/models/me/x", "/me/x/resolve/")) for path in (request.split()[1] for request in hub.requests))
    asked = len(hub.requests)
    files = find_model("me/x")
    assert (files.folder, files.weights, files.config) == (folder, folder / "model.safetensors", folder / "config.json")
    assert len(hub.requests) == asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_130_at_once_and_goes_on_the_next_time(
    hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture, number: signal.Signals
) -> None:
    hub.stalled["model.safetensors"] = begun = threading.Event()
    process = start("pull", "me/x")
    assert begun.wait(60)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (130, "")
    assert err.split("\n", 1)[1].strip() == "interrupted: finished files are kept, and the same command goes on from there"
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".incomplete")]
    hub.stalled.clear()
    hub.requests.clear()
    assert run(["pull", "me/x"]) == 0
    assert "; 3 MB to download" in capsys.readouterr().err
    assert [request.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request and request.startswith("GET")] == [
        "model.safetensors"
    ]


def test_a_dry_run_lists_the_files_and_downloads_nothing(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["pull", "me/x", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines()] == [
        ["file", "bytes", "downloaded"],
        ["config.json", "22", "no"],
        ["model.safetensors", "3,000,000", "no"],
    ]
    assert shown.err == f"me/x: 2 files, 3 MB; 3 MB to download, 84.2 GB free in {tmp_path / 'hub'}\n"
    assert not (tmp_path / "hub").exists()


def test_a_revision_is_named_in_the_next_command(hub: Any, capsys: pytest.CaptureFixture) -> None:
    hub.add("me/x", FILES | {"config.json": b"{}"}, revision="v1")
    assert run(["pull", "me/x", "--revision", "v1"]) == 0
    shown = capsys.readouterr()
    assert shown.err.endswith('next: toyllm generate -m me/x@v1 "Once upon a time"\n')
    assert find_model("me/x@v1").folder == Path(shown.out.strip())


def test_an_architecture_that_toyllm_does_not_run_is_said_before_the_download(hub: Any, capsys: pytest.CaptureFixture) -> None:
    hub.add("me/y", FILES | {"config.json": b'{"model_type": "llama\\u001b[31m"}'})
    assert run(["pull", "me/y", "--dry-run"]) == 0
    assert "note: its model_type is llama\\x1b[31m; toyllm runs gpt2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["me/nothing"], 1, "error: me/nothing: no such repository at "),
        (["me/x", "--revision", "v7"], 1, "error: me/x has no revision v7: "),
        (["a/b/c"], 2, "error: Invalid value for REPO: a/b/c is not a repo id; expected OWNER/NAME. See: toyllm pull --help"),
        ([], 2, "See: toyllm pull --help"),
        (["tales-gpt2"], 1, "error: tales-gpt2 comes with toyllm: there is nothing to download"),
    ],
)
def test_a_failure_is_one_line(hub: Any, capsys: pytest.CaptureFixture, arguments: list[str], code: int, said: str) -> None:
    assert run(["pull", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1
