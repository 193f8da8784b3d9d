"""Where a model's files are: a folder, a .safetensors file, an embedded model, or a repo in the local Hugging Face cache.

Nothing here opens a connection or a weight, and nothing imports huggingface_hub, whose client takes longer to load than
this takes to run. The cache is read by its layout, the same for every library that shares it:

    models--{owner}--{name}/refs/{revision}          holds a commit
    models--{owner}--{name}/snapshots/{commit}/...   symbolic links into ../../blobs
"""

import logging
import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..kernels.errors import ToyllmError

EMBEDDED = Path(__file__).parent / "embedded"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
MAIN = "main"

log = logging.getLogger("toyllm")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, None where there is none. At least one of them is there."""

    name: str  # as the user gave it
    folder: Path
    weights: Path | None  # the one .safetensors file
    index: Path | None  # or the index of its shards; never both
    config: Path | None
    generation_config: Path | None
    tokenizer: Path | None  # tokenizer.json
    vocab: Path | None  # vocab.json
    merges: Path | None  # merges.txt


def find_model(name: str) -> ModelFiles:
    """The files of the model `name`: an existing path, else an embedded model, else a cached repo (`REPO` or `REPO@REVISION`).

    Raises ToyllmError where there is none, saying what was looked for and what to do next.
    """
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    installed = embedded().get(name) or cached_snapshot(name)
    if name and path.exists():
        if installed and not path.samefile(installed):
            log.info("%s: the path of this name here is read, not the model in %s", name, installed)
        return files_at(name, path)
    if installed:
        return files_in(name, installed, f"`{pull_command(name)}` downloads them")
    raise ToyllmError(not_found(name))


def files_at(name: str, path: Path) -> ModelFiles:
    """The model at an existing path: a folder, or a .safetensors file with the small files beside it."""
    if path.is_dir():
        return files_in(name, path, "give the folder that holds them: subfolders are not searched")
    if path.suffix in PICKLES:
        raise ToyllmError(f"{name}: a {path.suffix} file is a pickle, which can run code when opened; convert it to .safetensors first")
    if path.suffix != ".safetensors":
        raise ToyllmError(f"{name}: not a .safetensors file; give one, or the folder that holds the model")
    # The folder is the link's own: that of the file behind a cached snapshot's link holds blobs without names.
    return replace(list_files(name, path.parent), weights=path, index=None)


def files_in(name: str, folder: Path, advice: str) -> ModelFiles:
    """The model in a folder: its own files only, never those of its subfolders. Raises ToyllmError where there is nothing to read."""
    files = list_files(name, folder)
    if not any((files.weights, files.index, files.config, files.tokenizer, files.vocab)):
        raise ToyllmError(f"{folder}: no config.json, {WEIGHTS} (or {INDEX}) or tokenizer.json here; {advice}")
    if files.weights and files.index:
        log.info("%s: both %s and %s are here; the first is read", folder, WEIGHTS, INDEX)
        return replace(files, index=None)
    return files


def list_files(name: str, folder: Path) -> ModelFiles:
    """The files that toyllm knows by name in a folder. A link whose target is gone counts as absent."""

    def there(filename: str) -> Path | None:
        return path if (path := folder / filename).is_file() else None

    return ModelFiles(
        name=name,
        folder=folder,
        weights=there(WEIGHTS),
        index=there(INDEX),
        config=there("config.json"),
        generation_config=there("generation_config.json"),
        tokenizer=there("tokenizer.json"),
        vocab=there("vocab.json"),
        merges=there("merges.txt"),
    )


def embedded() -> dict[str, Path]:
    """The models that come with toyllm: name -> folder."""
    return {folder.name: folder for folder in subfolders(EMBEDDED) if (folder / "config.json").is_file()}


def cached() -> dict[str, Path]:
    """The snapshots in the Hugging Face cache: name -> folder.

    `REPO` is its revision main, `REPO@REVISION` any other branch or tag, `REPO@COMMIT` a snapshot that no revision names.
    """
    models: dict[str, Path] = {}
    for root in subfolders(cache_folder()):
        kind, *parts = root.name.split("--")
        repo = "/".join(parts)
        if kind != "models" or not is_repo(repo):
            continue
        snapshots = {folder.name: folder for folder in subfolders(root / "snapshots") if is_commit(folder.name)}
        refs = {revision: commit for revision in revisions(root) if (commit := read_ref(root, revision)) in snapshots}
        unnamed = {commit: commit for commit in snapshots if commit not in refs.values()}
        models |= {join_name(repo, revision): snapshots[commit] for revision, commit in (refs | unnamed).items()}
    return dict(sorted(models.items()))


def cached_snapshot(name: str) -> Path | None:
    """The snapshot of a cached `REPO` (revision main) or `REPO@REVISION` (a branch, a tag or a whole commit)."""
    repo, revision = split_name(name)
    if not is_repo(repo):
        return None
    root = repo_folder(repo)
    commit = revision if is_commit(revision) else read_ref(root, revision)
    folder = root / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def cache_folder() -> Path:
    """The Hugging Face cache, from HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME, as huggingface_hub finds it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(expanded(os.environ.get("HF_HOME", str(cache / "huggingface"))))
    hub = os.environ.get("HUGGINGFACE_HUB_CACHE", str(home / "hub"))  # the older name of the next variable
    return Path(expanded(os.environ.get("HF_HUB_CACHE", hub)))


def expanded(path: str) -> str:
    """`path` with ~ and $VARIABLES replaced."""
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where this leaves the path alone)


def repo_folder(repo: str) -> Path:
    """The folder of a repo in the cache, which may not exist."""
    return cache_folder() / "--".join(["models", *repo.split("/")])


def revisions(root: Path) -> list[str]:
    """The branches and tags that a repo folder of the cache knows; a revision may have slashes, as refs/pr/1 has."""
    refs = root / "refs"
    return sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())


def read_ref(root: Path, revision: str) -> str:
    """The commit that a branch or tag stands for in a repo folder of the cache; empty where it is unknown."""
    ref = root / "refs" / revision
    commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    return commit if is_commit(commit) else ""


def split_name(name: str) -> tuple[str, str]:
    """`REPO` or `REPO@REVISION` as (repo, revision)."""
    repo, _, revision = name.partition("@")
    return repo, revision or MAIN


def join_name(repo: str, revision: str | None) -> str:
    """The name under which a cached repo is found again: the inverse of `split_name`."""
    return repo if revision in (None, MAIN) else f"{repo}@{revision}"


def is_repo(text: str) -> bool:
    """Whether this can be a repo id, `owner/name` or `name`, by the hub's rules."""
    word = r"\b[\w.-]{1,96}\b"
    return bool(re.fullmatch(f"({word}/)?{word}", text, re.ASCII)) and not re.search(r"--|\.\.|\.git$", text)


def is_commit(text: str) -> bool:
    """Whether this is a whole commit hash."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", text))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; none where it does not exist."""
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def not_found(name: str) -> str:
    """What was looked for under a name that is nowhere, and what to do next."""
    repo, revision = split_name(name)
    download = f"`{pull_command(name)}` downloads it"
    if is_repo(repo) and (known := revisions(repo_folder(repo))):
        there = ", ".join(join_name(repo, other) for other in known)
        return f"{name}: revision {revision} is not in the Hugging Face cache, which has {there}; {download}"
    tried = "no such folder or file"
    if is_repo(repo):
        tried = f"no folder or file here, no embedded model, no repo in the Hugging Face cache ({cache_folder()})"
    close = close_names(name, [*embedded(), *cached()])
    steps = [f"did you mean {' or '.join(close)}?"] if close else []
    if is_repo(repo) and ("/" in repo or not close):
        steps.append(download)
    return f"{name or 'no name'}: {tried}; {' '.join(steps) or '`toyllm models` lists what is here'}"


def close_names(name: str, names: list[str]) -> list[str]:
    """At most two of `names` that look like `name`, with or without their owner."""
    by_spelling = {spelling: full for full in names for spelling in (full.rsplit("/", 1)[-1], full)}
    return list(dict.fromkeys(by_spelling[spelling] for spelling in get_close_matches(name, by_spelling, 2)))


def pull_command(name: str) -> str:
    """The command that downloads a repo by its name."""
    repo, revision = split_name(name)
    return f"toyllm pull {repo}" + ("" if revision == MAIN else f" --revision {revision}")
