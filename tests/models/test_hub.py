"""Downloads, against a hub on loopback: what is asked for, what is kept, and what is said when something is wrong."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from toyllm.kernels.errors import ToyllmError
from toyllm.models import hub as models_hub
from toyllm.models.hub import download, endpoint, list_files, wanted_files
from toyllm.models.location import cache_folder, cached, find_model

hub_server = runpy.run_path(str(Path(__file__).parents[1] / "hub_server.py"))

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"w" * 1000,
    "tokenizer.json": b"{}",
    "original/model.safetensors": b"o",
    "onnx/config.json": b"o",
    "pytorch_model.bin": b"p",
    "flax_model.msgpack": b"f",
    ".gitattributes": b"a",
}
READ = ["tokenizer.json", "config.json", "model.safetensors"]  # of these, by size


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that serves `me/x`, and is the one that this process asks."""
    with hub_server["serve"]() as hub:
        hub_server["point_at"](hub, tmp_path, monkeypatch)
        hub.add("me/x", FILES)
        yield hub


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One HTTP client for all tests: making one takes longer than a test."""
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def asked_files(hub: Any, method: str = "GET") -> list[str]:
    """The names of the files that were asked for, in order."""
    return [request.rsplit("/", 1)[1] for request in hub.requests if request.startswith(f"{method} /me/x/resolve/")]


def test_only_what_toyllm_reads_is_listed_by_size_and_nothing_is_downloaded(hub: Any, tmp_path: Path) -> None:
    listing = list_files("me/x")
    assert [(f.name, f.nbytes, f.cached) for f in listing.files] == [(name, len(FILES[name]), False) for name in READ]
    assert (listing.commit, listing.model_type, listing.missing) == (hub.commit("me/x", "main"), "gpt2", 2 + 22 + 1000)
    assert hub.requests == ["GET /api/models/me/x"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_downloaded_is_what_find_model_finds(hub: Any) -> None:
    folder = download(list_files("me/x"))
    files = find_model("me/x")
    assert files.folder == folder == cache_folder() / "models--me--x" / "snapshots" / hub.commit("me/x", "main")
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")} == {name: FILES[name] for name in READ}
    assert files.weights
    assert files.weights.is_symlink()
    assert asked_files(hub) == READ


def test_what_is_there_is_not_downloaded_again(hub: Any) -> None:
    folder = download(list_files("me/x"))
    hub.requests.clear()
    listing = list_files("me/x")
    assert (listing.missing, all(file.cached for file in listing.files)) == (0, True)
    assert download(listing) == folder
    assert asked_files(hub) == asked_files(hub, "HEAD") == []


def test_a_new_commit_brings_only_the_files_that_changed(hub: Any) -> None:
    old = download(list_files("me/x"))
    hub.add("me/x", FILES | {"tokenizer.json": b'{"new": 1}'})
    hub.requests.clear()
    listing = list_files("me/x")
    assert {file.name for file in listing.files if not file.cached} == {"tokenizer.json"}
    new = download(listing)
    assert new != old
    assert asked_files(hub) == ["tokenizer.json"]
    assert find_model("me/x").folder == new
    assert sorted(cached()) == ["me/x", f"me/x@{old.name}"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "COMMIT"])
def test_another_revision_is_found_under_its_name_and_leaves_main_alone(hub: Any, revision: str) -> None:
    commit = hub.add("me/x", FILES | {"config.json": b"{}"}, revision="v1" if revision == "COMMIT" else revision)
    name = commit if revision == "COMMIT" else revision
    folder = download(list_files("me/x", name))
    assert folder.name == commit
    assert find_model(f"me/x@{name}").folder == folder
    with pytest.raises(ToyllmError, match="me/x"):
        find_model("me/x")


def test_until_every_file_is_there_main_is_what_it_was(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = download(list_files("me/x"))
    hub.add("me/x", FILES | {"config.json": b"{}", "model.safetensors": b"v" * 1000})
    theirs = huggingface_hub.hf_hub_download

    def interrupted(repo: str, name: str, **settings: Any) -> str:
        if name == "model.safetensors":
            raise KeyboardInterrupt
        return theirs(repo, name, **settings)

    listing = list_files("me/x")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(listing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", theirs)
    assert find_model("me/x").folder == old
    hub.requests.clear()
    new = download(list_files("me/x"))
    assert asked_files(hub) == ["model.safetensors"]
    assert find_model("me/x").folder == new


def test_a_gated_repository_and_a_missing_one_are_told_apart_and_name_the_token(hub: Any) -> None:
    hub.gated.add("me/x")
    with pytest.raises(ToyllmError, match=f"me/x is gated: accept its terms at {hub.url}/me/x, and set HF_TOKEN"):
        download(list_files("me/x"))
    with pytest.raises(ToyllmError, match=f"me/nothing: no such repository at {hub.url}, or a private one: .* set HF_TOKEN"):
        list_files("me/nothing")


def test_a_token_opens_a_gated_repository(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    folder = download(list_files("me/x"))
    assert find_model("me/x").folder == folder


def test_an_unknown_revision_says_where_they_are_listed(hub: Any) -> None:
    with pytest.raises(ToyllmError, match=f"me/x has no revision v7: {hub.url}/me/x lists"):
        list_files("me/x", "v7")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin; pickles can run code and are never opened; look for another"),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "tf.h5"], "only pytorch_model-1.bin and 1 more; pickles can run"),
        (["original/model.safetensors"], "only original/model.safetensors; weights in subfolders are another program's"),
        (["README.md"], "me/y: no safetensors at the repository's root; look for another at"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_anything_is_downloaded(hub: Any, names: list[str], said: str) -> None:
    hub.add("me/y", dict.fromkeys(names, b"{}"))
    with pytest.raises(ToyllmError) as error:
        list_files("me/y")
    assert said in str(error.value)
    assert hub.requests == ["GET /api/models/me/y"]


def test_a_hub_that_refuses_is_quoted_with_its_status(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/elsewhere")
    with pytest.raises(ToyllmError, match=r"me/x: .*/elsewhere answered 404 .*; check HF_ENDPOINT"):
        list_files("me/x")


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"id": "me/x"}', b"\xff"])
def test_an_answer_that_is_not_a_hubs_points_at_the_endpoint(hub: Any, answer: bytes) -> None:
    hub.answers["/api/models/me/x"] = answer
    with pytest.raises(ToyllmError, match=r"check HF_ENDPOINT"):
        list_files("me/x")


def test_no_connection_points_at_what_to_check(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        ToyllmError, match=r"http://127\.0\.0\.1:1 cannot be reached \(.*refused\): check the connection, the proxy and HF_E"
    ):
        list_files("me/x")


def test_a_connection_lost_after_the_listing_is_said_the_same_way(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_files("me/x")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ToyllmError, match=f"{hub.url} cannot be reached \\(gone\\)"):
        download(listing)


def unreachable(*_: Any, **__: Any) -> None:
    """Fail as hf_hub_download does where it cannot ask about a file."""
    raise errors.LocalEntryNotFoundError("pass local_files_only=False") from ConnectionError("gone")


def test_offline_mode_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ToyllmError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        list_files("me/x")


def test_a_disk_that_is_too_small_is_said_before_anything_is_downloaded(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_files("me/x")
    monkeypatch.setattr(models_hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=1023))
    with pytest.raises(ToyllmError, match=r"me/x: 1,024 bytes to download, 1,023 free at .*; make room, or set HF_HOME"):
        download(listing)
    assert asked_files(hub) == []


@pytest.mark.parametrize(
    "url", ["localhost", "huggingface.co", "ftp://x", "https://", "http://a b", "http://a..b", "http://a:99999", "http://[::1"]
)
def test_an_endpoint_that_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(ToyllmError, match=r"HF_ENDPOINT is .*: expected a URL"):
        endpoint()


@pytest.mark.parametrize("url", ["https://huggingface.co/", "http://127.0.0.1:8080", "http://[::1]:80", "https://mirror.example/hf", ""])
def test_an_endpoint_is_taken_as_it_is_without_its_last_slash(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert endpoint() == (url.rstrip("/") or "https://huggingface.co")


def test_a_name_that_a_terminal_would_obey_is_left() -> None:
    assert wanted_files(["config.json", "LICENSE\x1b]52;c;AA\x07", "LICENSE\u202e", "LICENSE.md"]) == ["config.json", "LICENSE.md"]


def test_with_one_weights_file_the_others_are_left() -> None:
    shards = ["model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert wanted_files([*shards, "config.json", "x/model.safetensors"]) == [*shards, "config.json"]
    assert wanted_files([*shards, "model.safetensors", "model.fp16.safetensors", "config.json"]) == ["model.safetensors", "config.json"]
