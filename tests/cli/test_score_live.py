"""`toyllm score` held against transformers as it is installed, on ten thousand tokens of the stories that no model was trained on."""

import contextlib
import importlib
import json
import math
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import toyllm as package
from toyllm.models.location import EMBEDDED
from toyllm.models.recipe import corpus
from toyllm.models.tokenizer import parse

with warnings.catch_warnings():  # their imports deprecate this and that
    warnings.simplefilter("ignore")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "models")
        maker = importlib.import_module("make_score_goldens")

pytestmark = pytest.mark.live
STORIES = Path(package.__file__).parent.parent / "shared" / "assets" / "stories-text.tar.xz"
LEAST = 10_000


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their warnings are not ours to fail on; nor are their bars to be seen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def held_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first paragraphs of the held-back books, cleaned as for training, that come to so many tokens."""
    if not STORIES.is_file():
        pytest.skip(f"no {STORIES}")
    folder = tmp_path_factory.mktemp("stories")
    books = [book for book in corpus.read_list(corpus.BOOKS_CSV) if book.use == "held-out"]
    with tarfile.open(STORIES) as archive:
        archive.extractall(folder, [f"stories-text/{book.file}" for book in books], filter="data")
    texts = [corpus.clean(corpus.body(corpus.read(folder / "stories-text", book), book.begins)) for book in books]
    tokenizer = parse("tales-gpt2", (EMBEDDED / "tales-gpt2" / "tokenizer.json").read_bytes())
    text, count = "", 0
    for line in corpus.END_OF_TEXT.join(texts).splitlines(keepends=True):
        text, count = text + line, count + len(tokenizer.encode(line).ids)
        if count >= LEAST:
            break
    path = folder / "held_back.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "context", "stride"),
    [("tales-gpt2", 512, 256), ("tales-gpt2", 256, 256), pytest.param("tales-gpt-oss", 1024, 512, marks=pytest.mark.slow)],
)
def test_perplexity_is_transformers(toyllm: Any, held_back: Path, name: str, context: int, stride: int) -> None:
    code, out, _ = toyllm("score", str(held_back), "-m", name, "--context", str(context), "--stride", str(stride), "--exact", "--json")
    assert code == 0
    found = json.loads(out)
    with quiet():
        model, ids = maker.load(name), maker.encode(name, held_back.read_text(encoding="utf-8"))
        theirs = maker.scores(model, ids, context, stride)
        guide = maker.by_the_guide(model, ids, context, stride)
    assert [token["id"] for token in found["tokens"]] == ids
    assert len(ids) >= LEAST
    assert [token["logprob"] is None for token in found["tokens"]] == [scores is None for scores in theirs]
    pairs = [(token["logprob"], scores[0]) for token, scores in zip(found["tokens"], theirs, strict=True) if scores]
    assert max(abs(ours - p) for ours, p in pairs) < 1e-3
    assert found["perplexity"] == pytest.approx(math.exp(-sum(p for _, p in pairs) / len(pairs)), rel=1e-6)
    assert found["perplexity"] == pytest.approx(guide, rel=1e-6 if context == stride else 1e-4), "which weighs its windows otherwise"
