"""Downloads from a Hugging Face hub into its local cache: what `toyllm pull` does, and the only code that opens a connection.

huggingface_hub does the work. It is given the hub and the cache by name, so that what is downloaded here is found by
`find_model` there. Files come one after the other on the main thread, where Ctrl-C ends a transfer at once (its thread
pool would first finish every file it has begun), and the revision is named last: until every file is there, `main` stays
what it was, or unknown. A file that was interrupted starts over; those that were finished are kept.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from urllib.parse import urlsplit

from ..kernels.errors import ToyllmError
from .location import INDEX, PICKLES, WEIGHTS, cache_folder, repo_folder

# Of the repository's root only: subfolders hold the same weights again, in the formats of other programs.
READ_HERE = (
    "*.safetensors",
    INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
)
HOST = re.compile(r"[\w-]+(\.[\w-]+)*|[\da-f]*:[\da-f:.]*", re.ASCII)  # a name, or an IPv6 address


@dataclass(frozen=True)
class RemoteFile:
    """A file to download."""

    name: str
    nbytes: int  # 0 where the hub does not say
    cached: bool  # on this disk already


@dataclass(frozen=True)
class Listing:
    """What a pull downloads of one repository, smallest files first."""

    repo: str
    revision: str | None  # as asked for; None is main
    commit: str  # what the revision stands for
    model_type: str  # as the hub knows it; empty where it does not
    files: tuple[RemoteFile, ...]

    @property
    def missing(self) -> int:
        """Bytes that are not on this disk yet."""
        return sum(file.nbytes for file in self.files if not file.cached)


def endpoint() -> str:
    """The hub: HF_ENDPOINT, or huggingface.co. Raises ToyllmError where HF_ENDPOINT is no URL."""
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # the port is no number below 65536, or an IPv6 address lacks a bracket
        sound = False
    if not sound:
        raise ToyllmError(f"HF_ENDPOINT is {url}: expected a URL, such as https://huggingface.co")
    return url


def list_files(repo: str, revision: str | None = None) -> Listing:
    """Ask the hub what there is to download of `repo`. Raises ToyllmError, for a repository without safetensors too."""
    hub = endpoint()  # before the import, which fails in its own words
    from huggingface_hub import HfApi, constants

    with explained(hub, repo, revision):
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = HfApi(endpoint=hub).model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        except (KeyError, TypeError, ValueError) as error:  # no JSON, or not that of a hub
            if isinstance(error, OSError):  # a refusal, which is a ValueError too where the hub calls the request bad
                raise
            raise ToyllmError(f"{hub} does not answer as a Hugging Face hub ({error}); check HF_ENDPOINT and the proxy") from error
    if info.sha is None:
        raise ToyllmError(f"{hub} does not say which commit of {repo} it has; check HF_ENDPOINT")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    wanted = wanted_files(list(siblings))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ToyllmError(no_safetensors(hub, repo, list(siblings)))
    root = repo_folder(repo)

    def on_disk(name: str) -> bool:
        lfs = siblings[name].lfs
        blob = lfs.sha256 if lfs else siblings[name].blob_id
        return (root / "snapshots" / str(info.sha) / name).is_file() or (root / "blobs" / str(blob)).is_file()

    files = [RemoteFile(name, siblings[name].size or 0, on_disk(name)) for name in wanted]
    model_type = info.config.get("model_type") if isinstance(info.config, dict) else None
    return Listing(repo, revision, info.sha, str(model_type or ""), tuple(sorted(files, key=lambda file: (file.nbytes, file.name))))


def wanted_files(names: list[str]) -> list[str]:
    """The files of a repository that toyllm reads. With model.safetensors, no other weights: they would be read by nothing."""
    plain = [name for name in names if "/" not in name and name.isprintable()]  # progress bars show names as they are
    wanted = [name for name in plain if any(fnmatch(name, pattern) for pattern in READ_HERE)]
    if WEIGHTS in wanted:
        return [name for name in wanted if name == WEIGHTS or not (name.endswith(".safetensors") or name == INDEX)]
    return wanted


def download(listing: Listing) -> Path:
    """Download what is missing, with huggingface_hub's progress bars, and return the local folder. Raises ToyllmError."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    free = free_space()
    if listing.missing > free:
        place = f"{listing.missing:,} bytes to download, {free:,} free at {cache_folder()}"
        raise ToyllmError(f"{listing.repo}: {place}; make room, or set HF_HOME to a folder on a larger disk")
    hub, cache = endpoint(), cache_folder()
    with explained(hub, listing.repo, listing.revision):
        for file in listing.files:
            hf_hub_download(listing.repo, file.name, revision=listing.commit, endpoint=hub, cache_dir=cache)
        disable_progress_bars()  # nothing is left to show: this finds every file in place, and names the revision
        names = [escape(file.name) for file in listing.files]
        return Path(snapshot_download(listing.repo, revision=listing.revision, endpoint=hub, cache_dir=cache, allow_patterns=names))


def free_space() -> int:
    """Free bytes on the disk of the cache, which may not exist yet."""
    cache = cache_folder().absolute()
    return shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free


@contextmanager
def explained(hub: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line with the next step. Raises ToyllmError."""
    from huggingface_hub import errors

    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # that of the HTTP client, whichever huggingface_hub comes with
    token = "set HF_TOKEN to a token of an account that may read it"  # noqa: S105 (words, no secret)
    try:
        yield
    except errors.GatedRepoError as error:
        raise ToyllmError(f"{repo} is gated: accept its terms at {hub}/{repo}, and {token}") from error
    except errors.RepositoryNotFoundError as error:
        raise ToyllmError(f"{repo}: no such repository at {hub}, or a private one: check the name, or {token}") from error
    except errors.RevisionNotFoundError as error:
        raise ToyllmError(f"{repo} has no revision {revision}: {hub}/{repo} lists its branches and tags") from error
    except errors.OfflineModeIsEnabled as error:
        raise ToyllmError("pull needs the network, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, network_error) as error:
        # The second stands for any failure to ask about a file, in words about its parameters: its cause tells more.
        cause = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
        if isinstance(cause, errors.HfHubHTTPError):
            raise ToyllmError(refusal(hub, repo, cause.response.status_code, cause.server_message)) from error
        raise ToyllmError(f"{hub} cannot be reached ({cause}): check the connection, the proxy and HF_ENDPOINT") from error


def refusal(hub: str, repo: str, status: int, message: str | None) -> str:
    """The line for an answer that is neither a file nor one of the refusals that have a name."""
    advice = {401: "check HF_TOKEN", 403: "check what HF_TOKEN may read", 404: "check HF_ENDPOINT", 429: "wait, or set HF_TOKEN"}
    said = f" ({message})" if message else ""
    return f"{repo}: {hub} answered {status}{said}; {advice.get(status, 'try again later')}"


def no_safetensors(hub: str, repo: str, names: list[str]) -> str:
    """The line for a repository whose weights are in another format, in a subfolder, or nowhere."""
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    below = [name for name in names if name.endswith(".safetensors")]
    found = pickles or below
    there = f", only {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "") if found else ""
    why = "pickles can run code and are never opened" if pickles else "weights in subfolders are another program's" if below else ""
    return f"{repo}: no safetensors at the repository's root{there}; {why + '; ' if why else ''}look for another at {hub}/models"
