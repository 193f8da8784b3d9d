"""What tests of several modules share: the tokenizer of gpt-oss, built once a session."""

import runpy
from pathlib import Path

import pytest

import toyllm
from toyllm.models.location import find_model
from toyllm.models.tokenizer import Tokenizer, load_tokenizer

RANKS = Path(toyllm.__file__).parent.parent / "shared" / "assets" / "o200k" / "o200k_base.tiktoken"


@pytest.fixture(scope="session")
def o200k_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of gpt-oss, made from its ranks; three seconds."""
    if not RANKS.is_file():
        pytest.skip(f"no {RANKS}")
    path = tmp_path_factory.mktemp("o200k") / "tokenizer.json"
    runpy.run_path(str(Path(__file__).parent / "make_o200k.py"))["write_tokenizer"](RANKS, path)
    return path


@pytest.fixture(scope="session")
def o200k(o200k_path: Path) -> Tokenizer:
    """The tokenizer of gpt-oss."""
    tokenizer = load_tokenizer(find_model(str(o200k_path.parent)))
    assert tokenizer is not None
    return tokenizer
