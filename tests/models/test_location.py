"""Where a model is looked for, in which order, and what is said when it is nowhere."""

import inspect
import logging
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models import location
from toyllm.models.available import available
from toyllm.models.location import cache_folder, cached, find_model, is_repo

COMMIT, OTHER = "a" * 40, "b" * 40
CONFIG = '{"model_type": "gpt2"}'

Fill = Callable[..., Path]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, an empty Hugging Face cache, and one embedded model, `small`."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(location, "EMBEDDED", tmp_path / "embedded")
    fill(tmp_path / "embedded" / "small", "config.json", "model.safetensors", "tokenizer.json")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def fill(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(CONFIG if name == "config.json" else name)
    return folder


def cache(repo: str, *names: str, refs: tuple[str, ...] = ("main",), commit: str = COMMIT) -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs."""
    root = cache_folder() / ("models--" + repo.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    fill(root / "blobs")
    for name in names:
        blob = root / "blobs" / f"{commit}-{name}"
        blob.write_text(CONFIG if name == "config.json" else name)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


def test_a_folder_gives_the_files_it_has(world: Path) -> None:
    names = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt")
    folder = fill(world / "m", *names)
    files = find_model(str(folder))
    assert (files.name, files.folder, files.index) == (str(folder), folder, None)
    found = (files.config, files.weights, files.generation_config, files.tokenizer, files.vocab, files.merges)
    assert found == tuple(folder / name for name in names)


def test_subfolders_are_never_searched(world: Path) -> None:
    fill(world / "m" / "original", "model.safetensors", "tokenizer.json")
    files = find_model(str(fill(world / "m", "config.json", "model.safetensors.index.json")))
    assert (files.weights, files.tokenizer) == (None, None)
    assert files.index == world / "m" / "model.safetensors.index.json"


def test_a_folder_without_any_of_the_files_says_which_are_missing(world: Path) -> None:
    fill(world / "m" / "original", "model.safetensors")
    with pytest.raises(ToyllmError, match=r"m: no config\.json, model\.safetensors .* subfolders are not searched"):
        find_model(str(world / "m"))


def test_of_one_file_and_an_index_the_file_is_read_and_that_is_said(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toyllm")
    files = find_model(str(fill(world / "m", "model.safetensors", "model.safetensors.index.json")))
    assert files.weights
    assert files.index is None
    assert "the first is read" in caplog.text


def test_a_weights_file_brings_the_small_files_beside_it(world: Path) -> None:
    folder = fill(world / "m", "config.json", "model.safetensors", "other.safetensors", "model.safetensors.index.json")
    files = find_model(str(folder / "other.safetensors"))
    assert (files.weights, files.index, files.config) == (folder / "other.safetensors", None, folder / "config.json")


def test_a_weights_file_in_the_cache_keeps_the_folder_of_its_link() -> None:
    snapshot = cache("me/x", "config.json", "model.safetensors")
    files = find_model(str(snapshot / "model.safetensors"))
    assert (files.folder, files.config) == (snapshot, snapshot / "config.json")


@pytest.mark.parametrize(
    ("name", "said"), [("pytorch_model.bin", "is a pickle"), ("model.pt", "is a pickle"), ("x.gguf", "not a .safetensors file")]
)
def test_other_files_are_refused_without_being_opened(world: Path, name: str, said: str) -> None:
    with pytest.raises(ToyllmError, match=said):
        find_model(str(fill(world / "m", name) / name))


def test_an_embedded_model_is_found_by_its_name(world: Path) -> None:
    assert find_model("small").weights == world / "embedded" / "small" / "model.safetensors"


def test_a_path_wins_over_an_installed_model_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toyllm")
    cache("me/x", "config.json")
    for name in ("small", "me/x"):
        assert find_model(str(fill(Path(name), "config.json"))).folder == Path(name)
        assert f"{name}: the path of this name here is read" in caplog.text


def test_the_note_is_not_given_for_the_installed_model_itself(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "toyllm")
    monkeypatch.chdir(world / "embedded")
    assert find_model("small").folder == Path("small")
    assert not caplog.records


def test_a_cached_repo_is_found_at_main_or_at_the_revision_named() -> None:
    snapshot = cache("me/x", "config.json", "model.safetensors")
    other = cache("me/x", "config.json", refs=("v1", "refs/pr/2"), commit=OTHER)
    assert find_model("me/x").folder == snapshot
    assert find_model("me/x").weights == snapshot / "model.safetensors"
    for name in ("me/x@v1", "me/x@refs/pr/2", f"me/x@{OTHER}"):
        assert find_model(name).folder == other


def test_a_snapshot_and_every_file_in_it_are_those_that_huggingface_hub_finds() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    cache("me/x", *names)
    cache("gpt2", *names, refs=("main", "v1"), commit=OTHER)
    for repo, revision, name in (("me/x", "main", "me/x"), ("gpt2", "v1", "gpt2@v1"), ("gpt2", OTHER, f"gpt2@{OTHER}")):
        files = find_model(name)
        theirs = huggingface_hub.snapshot_download(repo, revision=revision, cache_dir=cache_folder(), local_files_only=True)
        assert files.folder == Path(theirs)
        for path in (files.config, files.weights, files.vocab, files.merges):
            assert path
            assert str(path) == huggingface_hub.try_to_load_from_cache(repo, path.name, revision=revision, cache_dir=cache_folder())


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$PLACE/hf"},
        {"HF_HOME": "relative"},
        {"HF_HOME": ""},
        {"HF_HUB_CACHE": "~/$PLACE/hub", "HF_HOME": "/nowhere"},
        {"HF_HUB_CACHE": ""},
        {"HUGGINGFACE_HUB_CACHE": "/older"},
        {"HUGGINGFACE_HUB_CACHE": "~/older", "HF_HUB_CACHE": "/newer"},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "~/xdg"},
        {"XDG_CACHE_HOME": "", "HOME": "/elsewhere"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"},
        {"HOME": "/elsewhere"},
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("PLACE", "/place")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    theirs = runpy.run_path(inspect.getfile(constants))["HF_HUB_CACHE"]  # read anew: it is fixed when the module is imported
    assert cache_folder() == Path(theirs)


@pytest.mark.parametrize(
    "text",
    [
        *("gpt2", "openai-community/gpt2", "_a_/b", "A.b-c_9/x", "a" * 96, "o" * 96 + "/" + "a" * 96),
        *("", "/", "a/", "/b", "./a", "../a", "a/b/c", "a..b", "a--b/c", "-a", "a-", ".a/b", "a/b."),
        *("a.git", "a/b.git", "a b", "ä/b", "a@v1", "a" * 97, "o" * 97 + "/a", "a\n"),
    ],
    ids=repr,
)
def test_what_can_be_a_repo_id_is_what_huggingface_hub_accepts(text: str) -> None:
    hub = pytest.importorskip("huggingface_hub.utils")
    try:
        hub.validate_repo_id(text)
        accepted = True
    except hub.HFValidationError:
        accepted = False
    assert is_repo(text) is accepted


@pytest.mark.parametrize("name", ["me/x@../../../../embedded/small", "me/../small@main", "..@main", "me/x@.", "me/x@.."])
def test_no_name_leads_out_of_the_cache(name: str) -> None:
    cache("me/x", "config.json")
    with pytest.raises(ToyllmError):
        find_model(name)


def test_a_link_to_a_deleted_blob_counts_as_absent() -> None:
    snapshot = cache("me/x", "config.json", "model.safetensors")
    (snapshot / "model.safetensors").resolve().unlink()
    assert find_model("me/x").weights is None


@pytest.mark.parametrize("ref", ["", "no commit", "../..", COMMIT + "\nmore"])
def test_a_damaged_ref_is_no_revision(ref: str) -> None:
    snapshot = cache("me/x", "config.json")
    (snapshot.parents[1] / "refs" / "main").write_text(ref)
    with pytest.raises(ToyllmError, match="revision main is not in the Hugging Face cache"):
        find_model("me/x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "me/nothing",
            r"no folder or file here, .* no repo in the Hugging Face cache \(.*hf/hub\); `toyllm pull me/nothing` downloads it$",
        ),
        ("me/nothing@v2", r"`toyllm pull me/nothing --revision v2` downloads it$"),
        ("other/nothing@v2/x", r"`toyllm pull other/nothing --revision v2/x` downloads it$"),
        ("smal", r"did you mean small\?$"),
        ("tale-teller", r"did you mean me/tale-teller\?$"),
        ("me/tale-telle", r"did you mean me/tale-teller\? `toyllm pull me/tale-telle` downloads it$"),
        ("me/tale-teller@v2", r"revision v2 is not in the Hugging Face cache, which has me/tale-teller; `toyllm pull me/tale-teller --rev"),
        ("/no/such/folder", r"^/no/such/folder: no such folder or file; `toyllm models` lists what is here$"),
        ("", r"^no name: no such folder or file; `toyllm models` lists what is here$"),
    ],
)
def test_a_name_that_is_nowhere_is_told_what_was_tried_and_what_to_do(name: str, said: str) -> None:
    cache("me/tale-teller", "config.json")
    with pytest.raises(ToyllmError, match=said):
        find_model(name)


def test_a_cached_repo_without_a_file_that_toyllm_reads_says_how_to_get_them() -> None:
    cache("me/x", "README.md")
    with pytest.raises(ToyllmError, match="`toyllm pull me/x` downloads them"):
        find_model("me/x")


def test_cached_names_every_snapshot_and_find_model_finds_each() -> None:
    cache("me/x", "config.json", refs=("main", "v1"))
    cache("me/x", "config.json", refs=(), commit=OTHER)
    cache("gpt2", "config.json")
    fill(cache_folder() / "datasets--me--y" / "snapshots" / COMMIT)
    fill(cache_folder() / ".locks")
    fill(cache_folder() / "models--me--empty")
    models = cached()
    assert list(models) == ["gpt2", "me/x", f"me/x@{OTHER}", "me/x@v1"]
    assert all(find_model(name).folder == folder for name, folder in models.items())


def test_nothing_is_cached_where_there_is_no_cache() -> None:
    assert cached() == {}


# available


def test_available_says_type_size_and_whether_toyllm_can_run_it(world: Path) -> None:
    cache("me/x", "config.json", "model.safetensors")
    models = {model.name: model for model in available()}
    assert list(models) == ["small", "me/x"]
    assert [(m.kind, m.model_type, m.nbytes, m.problem) for m in models.values()] == [
        ("embedded", "gpt2", len("model.safetensors"), None),
        ("cached", "gpt2", len("model.safetensors"), None),
    ]
    assert models["small"].folder == world / "embedded" / "small"


@pytest.mark.parametrize(
    ("config", "names", "said"),
    [
        ('{"model_type": "llama"}', ("config.json", "model.safetensors"), 'model_type "llama" is not supported'),
        ("{}", ("config.json", "model.safetensors"), "model_type null is not supported"),
        ('{"model_type": [1]}', ("config.json", "model.safetensors"), "model_type null is not supported"),
        ("not json", ("config.json", "model.safetensors"), "not valid JSON"),
        (CONFIG, ("model.safetensors",), "no config.json"),
        (CONFIG, ("config.json",), "neither model.safetensors nor"),
        (CONFIG, ("config.json", "pytorch_model.bin"), "pytorch_model.bin"),
        (CONFIG, ("config.json", "model.safetensors.index.json", "model-00000-of-00001.safetensors"), "model-00001-of-00001.safetensors"),
    ],
)
def test_a_model_that_cannot_run_is_listed_with_the_reason(config: str, names: tuple[str, ...], said: str) -> None:
    snapshot = cache("me/x", *names)
    index = '{"weight_map": {"a": "model-00000-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}'
    for name, text in (("config.json", config), ("model.safetensors.index.json", index)):
        if name in names:
            (snapshot / name).resolve().write_text(text)
    model = available()[-1]
    assert model.name == "me/x"
    assert model.problem
    assert said in model.problem


def test_shards_count_as_their_sum(world: Path) -> None:
    snapshot = cache("me/x", "config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors")
    (snapshot / "model.safetensors.index.json").resolve().write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert (available()[-1].nbytes, available()[-1].problem) == (len("a.safetensors") + len("b.safetensors"), None)
