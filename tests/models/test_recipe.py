"""The recipe of the embedded models: cleaning, the corpus, and export."""

import hashlib
import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import EMBEDDED
from toyllm.models.recipe import corpus, mxfp4
from toyllm.models.recipe.export import export
from toyllm.models.recipe.script import published

BOOK = """The Project Gutenberg EBook of Two Tales

*** START OF THIS PROJECT GUTENBERG EBOOK
TWO TALES ***

Produced by A. Volunteer

TWO TALES

[Illustration: A fox
and a hen]

# The _Fox_

“Who’s there?” asked the hen—and
  waited… “A  *friend*,” said the fox.[12] {3}

See http://example.org for more.

12

<b>The end</b> of the first. ![a picture](fox.png)

Transcriber's note: spelling kept.

*** END OF THIS PROJECT GUTENBERG EBOOK TWO TALES ***

The licence, at length.
"""


# Cleaning


def test_a_book_loses_all_but_its_story():
    assert corpus.clean(corpus.body(BOOK)) == (
        'The Fox\n"Who\'s there?" asked the hen--and waited... "A friend," said the fox.\nThe end of the first. '
    )


def test_only_what_is_between_the_markers_is_kept():
    assert corpus.body("a *** START OF THIS ***b*** END OF THIS ***c") == "b"
    assert corpus.body("a ***START OF THIS ***b***END OF THIS ***c") == "b"
    assert corpus.body("no markers") == "no markers"


def test_a_book_without_markers_starts_where_the_list_says():
    assert corpus.body("header. By Nobody: once upon", begins="By Nobody") == "By Nobody: once upon"
    assert corpus.body("once upon", begins="By Nobody") == "once upon"
    assert corpus.body("By X *** START *** *** START OF IT *** once", begins="By X") == " once"


@pytest.mark.parametrize("paragraph", ["[Illustration: a hen]", "IN CAPITALS", "12", "a", "An eBook.", "Copyright 1900", "* * *"])
def test_a_paragraph_that_is_no_prose_goes(paragraph):
    assert corpus.clean(f"before\n\n{paragraph}\n\nafter") == "before\nafter"


def test_composed_and_decomposed_letters_become_one():
    assert corpus.clean("cafe\N{COMBINING ACUTE ACCENT}") == "café"


# The corpus


def put_books(folder: Path, **texts: str) -> list[corpus.Book]:
    """Write books, and list them; those named `held…` are held out."""
    folder.mkdir()
    books = []
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        books.append(
            corpus.Book(
                file=f"{name}.txt",
                title=name,
                author="",
                gutenberg="",
                use="held-out" if name.startswith("held") else "train",
                begins="",
                repository="someone/books",
                commit="0" * 40,
                path="a book.txt",
                bytes=str(len(text)),
                sha256=hashlib.sha256(text.encode()).hexdigest(),
            )
        )
    return books


def test_corpus_keeps_held_out_books_from_the_tokenizer(tmp_path, capsys):
    books = put_books(tmp_path / "books", one="the hen the hen the hen", two="a fox a fox", held="quizzical quizzical")
    corpus.make_corpus(tmp_path / "books", tmp_path / "data", books)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    text = (tmp_path / "data" / "train.txt").read_text()
    assert text == "the hen the hen the hen<|endoftext|>a fox a fox"
    ids = np.load(tmp_path / "data" / "train.npy")
    assert ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode(text).ids
    assert ids.tolist().count(0) == 1
    assert len(np.load(tmp_path / "data" / "held_out.npy")) == len("quizzical quizzical")  # bytes alone: no merges were learned from it
    assert "not the edition" not in capsys.readouterr().err


def test_another_edition_of_a_book_is_used_and_said(tmp_path, capsys):
    books = put_books(tmp_path / "books", one="the hen", held="the fox")
    (tmp_path / "books" / "one.txt").write_text("the other hen")
    corpus.make_corpus(tmp_path / "books", tmp_path / "data", books)
    assert "note: one.txt is not the edition in the list" in capsys.readouterr().err
    assert (tmp_path / "data" / "train.txt").read_text() == "the other hen"


def test_a_missing_book_is_named_with_its_address(tmp_path):
    books = put_books(tmp_path / "books", one="the hen", held="the fox")
    (tmp_path / "books" / "one.txt").unlink()
    address = f"https://raw.githubusercontent.com/someone/books/{'0' * 40}/a%20book.txt"
    with pytest.raises(ToyllmError, match=rf"1 of 2 books are not in .*, the first one\.txt\. Get it from {address}"):
        corpus.make_corpus(tmp_path / "books", tmp_path / "data", books)
    assert not (tmp_path / "data").exists()


def test_a_book_that_is_not_utf8_is_an_error(tmp_path):
    books = put_books(tmp_path / "books", one="the hen", held="the fox")
    (tmp_path / "books" / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ToyllmError, match=r"one\.txt: expected UTF-8 text, found byte 0xe9 at 3"):
        corpus.make_corpus(tmp_path / "books", tmp_path / "data", books)


def test_the_list_names_49_books_in_the_order_of_the_corpus():
    books = corpus.read_list(corpus.BOOKS_CSV)
    assert [book.title for book in books if book.use == "held-out"] == ["Aesop's Fables", "The Lilac Fairy Book"]
    assert len({book.file for book in books}) == len({book.sha256 for book in books}) == len(books) == 49
    assert [book.file for book in books] == sorted(book.file for book in books)


def test_a_list_in_other_columns_is_an_error(tmp_path):
    (tmp_path / "list.csv").write_text("title\nTwo Tales\n")
    with pytest.raises(ToyllmError, match=r"expected the columns file,title,.* found title"):
        corpus.read_list(tmp_path / "list.csv")


def test_files_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("before")

    def stop_halfway() -> None:
        with published(tmp_path) as partial:
            (partial / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a.txt", "before")]


# Export


def as_trained(folder: Path, out: Path) -> None:
    """Write a published folder back as training leaves it: f32, experts [E, in, out], configuration in transformers' keys."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    trained = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            trained[name.removesuffix("_blocks")] = mxfp4.decode(tensor, scales).swapaxes(1, 2).copy()
        elif not name.endswith("_scales"):
            trained[name] = tensor.astype(np.float32)
    save_file(trained, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gpt_oss":
        config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (out / "config.json").write_text(json.dumps(config))
    (out / "training.json").write_bytes((folder / "training.json").read_bytes())


@pytest.mark.parametrize(("architecture", "folder"), [("gpt2", EMBEDDED / "tales-gpt2"), ("gpt_oss", EMBEDDED / "tales-gpt-oss")])
def test_export_of_the_shipped_weights_gives_the_shipped_files(tmp_path, architecture, folder):
    as_trained(folder, tmp_path / "trained")
    export(architecture, tmp_path / "trained", folder, tmp_path / "out")
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_export_without_a_trained_model_says_how_to_make_one(tmp_path):
    with pytest.raises(ToyllmError, match=r"config\.json does not exist\. Make it first: .*recipe\.train"):
        export("gpt2", tmp_path, EMBEDDED / "tales-gpt2", tmp_path / "out")


def test_export_under_the_wrong_architecture_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ToyllmError, match="expected model_type 'gpt_oss', found 'gpt2'"):
        export("gpt_oss", tmp_path, EMBEDDED / "tales-gpt2", tmp_path / "out")
