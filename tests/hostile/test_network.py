"""Nothing but `pull` opens a connection, nothing pickled is opened, and no code or template of a checkpoint is run."""

import ast
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from toyllm.cli import main
from toyllm.models.location import embedded

from .processes import GREEDY, environment, run
from .sealed import can_seal

HERE = Path(__file__).parent
hub_server = runpy.run_path(str(HERE.parent / "hub_server.py"))
COMMANDS: Any = get_command(main.app)
REPO = "someone/tales"
TEXT = ["--prompt", "Once upon a time"]
FEW = ["--max-tokens", "2", *GREEDY]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache that holds a model."""
    home = tmp_path_factory.mktemp("huggingface")
    root, commit = home / "hub" / "models--someone--tales", "c0ffee" + "0" * 34
    shutil.copytree(embedded()["tales-gpt2"], root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return home


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to chat with."""
    folder = tmp_path_factory.mktemp("harmony")
    runpy.run_path(str(HERE.parent / "harmony_model.py"))["maker"]().write_checkpoint(folder)
    return folder


SETTINGS = [
    {},
    {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"},
    dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
]


def every_run(folder: Path, harmony: Path) -> dict[str, list[list[str]]]:
    """Runs of every command but `pull`, on a model in the cache."""
    model = ["-m", REPO]
    (folder / "prompts").write_text('{"prompt": "Once"}\n{"prompt": "Twice"}\n')
    return {
        "generate": [
            ["generate", "Once", *model, *FEW],
            ["generate", "--chat", "Hello", "-m", str(harmony), *FEW],
            ["generate", "--input", str(folder / "prompts"), "--output", str(folder / "answers"), *model, *FEW],
            ["generate", "Once", "--session", str(folder / "session"), "--context-shift", *model, *FEW],
        ],
        "chat": [["chat", "-m", str(harmony), *FEW]],
        "tokenize": [["tokenize", "Once", *model]],
        "detokenize": [["detokenize", "72 73", *model]],
        "models": [["models"], ["models", REPO]],
        "params": [["params", *model]],
        "dump-tensor": [["dump-tensor", *model], ["dump-tensor", "logits", *TEXT, *model, "--save", str(folder / "x.npy")]],
        "trace": [["trace", "Once upon", *model, "--html", str(folder / "x.html")]],
        "card": [["card", *model], ["card", "--check", *model]],
        "score": [["score", *TEXT, *model]],
        "compare": [["compare", REPO, "tales-gpt2"]],
        "check": [["check", *model]],
        "cut": [["cut", str(folder / "out"), *model]],
        "bench": [["bench", "-p", "2", "-n", "1", "--repetitions", "1", *model]],
    }


@pytest.mark.skipif(not can_seal(), reason="no filter of system calls here")
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "hub", "proxies"])
def test_no_command_but_pull_makes_a_socket_for_a_network(tmp_path: Path, cache: Path, harmony: Path, settings: dict[str, str]) -> None:
    runs = every_run(tmp_path, harmony)
    assert {name for name in COMMANDS.commands if name != "pull"} <= set(runs), "a new command is to be run here too"
    if settings:  # that are read where a model is looked for, and by the libraries as they are imported
        runs = {name: runs[name][:1] for name in ("generate", "tokenize", "models", "params")}
    given = json.dumps([arguments for several in runs.values() for arguments in several])
    surroundings = environment(HF_HOME=str(cache), **settings)
    done = run(given, stdin=b"Hello\n", command=[sys.executable, str(HERE / "sealed.py")], env=surroundings, timeout=250)
    assert done.code == 0, done.err.decode()
    assert b"hf_secret" not in done.out + done.err


@pytest.mark.skipif(not can_seal(), reason="no filter of system calls here")
def test_pull_does_and_dies_of_it(tmp_path: Path) -> None:
    """The lock holds: without this the test above would show nothing."""
    surroundings = environment(HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    done = run(json.dumps([["pull", REPO]]), command=[sys.executable, str(HERE / "sealed.py")], env=surroundings)
    assert done.code == -signal.SIGSYS, done.err.decode()


def test_a_model_that_is_not_here_is_not_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server["serve"]() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in embedded()["tales-gpt2"].iterdir() if path.is_file()})
        surroundings = environment(HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url)
        assert "`toyllm pull someone/tales` downloads it" in run("generate", "Once", "-m", REPO, env=surroundings).error
        assert hub.requests == []
    assert list(tmp_path.iterdir()) == []


# Code that comes with a model


class Bomb:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickles(folder: Path, mark: Path) -> Iterator[Path]:
    """Pickles under all names under which one could lie about."""
    data = pickle.dumps(Bomb(mark))
    names = ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl", "model.safetensors", "x.npy", "x.npz"]
    names += ["config.json", "tokenizer.json", "model.safetensors.index.json", "x.card"]
    for name in names:
        (folder / name).write_bytes(data)
        yield folder / name
    np.save(folder / "objects.npy", np.array([Bomb(mark)], object), allow_pickle=True)
    yield folder / "objects.npy"
    np.savez(folder / "objects.npz", logits=np.array([Bomb(mark)], object))
    yield folder / "objects.npz"


def test_a_pickle_is_never_opened_whatever_it_is_called(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    assert pickle.loads(pickle.dumps(Bomb(mark))) is None
    mark.rmdir()  # it works
    for number, path in enumerate(pickles(tmp_path, mark)):
        alone = tmp_path / f"alone{number}"
        alone.mkdir()
        shutil.copy(path, alone)
        for arguments in (
            ["generate", "Once", "-m", str(path), *FEW],
            ["generate", "Once", "-m", str(alone), *FEW],
            ["check", "-m", str(alone)],
            ["params", "-m", str(alone)],
            ["models", str(alone)],
            ["tokenize", "Once", "-m", str(alone)],
            ["cut", str(tmp_path / "out"), "-m", str(alone)],
            ["generate", "Once", "--patch", f"logits={path}", *FEW],
            ["compare", "tales-gpt2", "--reference", str(path), *TEXT],
            ["card", str(path)],
            ["card", "RMSNorm", "--input", f"x={path}"],
            ["generate", "Once", "--session", str(path), *FEW],
            ["score", str(path)],
        ):
            assert main.run(arguments) in (1, 2, 3), arguments
            assert "Traceback" not in capfd.readouterr().err
            assert not mark.exists(), arguments
        path.unlink()
        shutil.rmtree(alone)


def test_no_module_or_template_of_a_checkpoint_is_run(tmp_path: Path, harmony: Path) -> None:
    """What transformers would run with trust_remote_code, a chat template, and modules that would be imported from the current folder."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(harmony, folder)
    bomb = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("modeling_gpt_oss.py", "configuration_gpt_oss.py", "tokenization.py", "numpy.py", "toyllm.py", "sitecustomize.py"):
        (folder / name).write_text(bomb)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_gpt_oss.Config", "AutoModelForCausalLM": "modeling_gpt_oss.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    template = "{{ ''.__class__.__base__.__subclasses__() }}{% for x in range(10**9) %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    settings = {"chat_template": template, "auto_map": {"AutoTokenizer": ["tokenization.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    installed = [str(Path(sys.executable).with_name("toyllm"))]
    command = installed if Path(installed[0]).exists() else [sys.executable, "-P", "-m", "toyllm"]
    plain = run("generate", "--chat", "Hello", "-m", str(harmony), *FEW, command=command, cwd=tmp_path)
    assert plain.code == 0
    for cwd, model in ((tmp_path, "./model"), (folder, ".")):
        assert run("generate", "--chat", "Hello", "-m", model, *FEW, command=command, cwd=cwd)[:2] == plain[:2]
        assert run("chat", "-m", model, *FEW, stdin=b"Hello\n", command=command, cwd=cwd).code == 0
        assert run("params", "-m", model, command=command, cwd=cwd).code == 0
    assert not mark.exists()


def test_a_models_name_is_no_code_in_the_script_that_emit_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = '"""; mark = 1 #\n\\"""\nmark = 2\n"""'
    scripts = []
    for folder in (tmp_path / name, tmp_path / "plain"):
        shutil.copytree(embedded()["tales-gpt2"], folder)
        assert main.run(["card", "-m", str(folder), "--emit", "numpy"]) == 0
        tree = ast.parse(capfd.readouterr().out)
        assert "in plain NumPy" in (ast.get_docstring(tree) or "")
        scripts.append(ast.dump(ast.Module(tree.body[1:], [])))
    assert scripts[0] == scripts[1]


def test_only_the_compilers_door_reads_pickles_and_nothing_evaluates_text() -> None:
    source = Path(main.__file__).parents[1]
    modules = {
        path.relative_to(source).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("cli", "cards", "models", "kernels")
        for path in (source / folder).rglob("*.py")
    }
    assert len(modules) > 100

    def holding(pattern: str) -> list[str]:
        return [name for name, text in modules.items() if re.search(pattern, text, re.MULTILINE)]

    assert holding(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b") == ["kernels/jit.py"]
    assert holding(r"(?<![.\w])(eval|exec|compile)\(|(import|from) jinja|trust_remote_code") == []
    assert holding("allow_pickle=True") == []
    assert [text.count("torch.load(") for text in modules.values() if "torch.load(" in text] == [1], "a training run's own"
    assert "torch.load(path, weights_only=True)" in modules["models/recipe/train.py"]
