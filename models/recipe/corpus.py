"""Books → one clean training text, one held-out text, a byte-level BPE of 4096 tokens, and both texts as token ids.

    python -m toyllm.models.recipe.corpus BOOKS OUT

BOOKS is a folder with the files that books.csv lists. OUT receives train.txt, held_out.txt, tokenizer.json, and the ids of both texts,
train.npy and held_out.npy (u16), with `<|endoftext|>` (id 0) between books. The same books give the same bytes.
"""

import argparse
import csv
import hashlib
import re
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ...kernels.errors import ToyllmError
from .script import published, run, say

BOOKS_CSV = Path(__file__).with_name("books.csv")
END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
VOCABULARY = 4096
USES = {"train": "train", "held-out": "held_out"}  # of a book, and the name of the files its text goes to

START_MARKER = re.compile(r"\*\*\* ?START OF.*?\*\*\*", re.DOTALL)
END_MARKER = re.compile(r"\*\*\* ?END OF")
PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\N{NO-BREAK SPACE}": " ", "\t": " ", "_": "", "*": ""}
)
ILLUSTRATION = re.compile(r"\[Illustration[^\]]*\]")
FOOTNOTE = re.compile(r"\[\d+\]|\{\d+\}")
MARKUP = re.compile(r"^#+ *|<[^>]+>|!\[.*?\]\(.*?\)")
ABOUT_THE_FILE = re.compile(r"gutenberg|produced by|transcriber|copyright|ebook|http|illustrat", re.IGNORECASE)


@dataclass(frozen=True)
class Book:
    """One line of books.csv."""

    file: str  # below the folder BOOKS
    title: str
    author: str
    gutenberg: str  # its number at Project Gutenberg; empty where the text is from elsewhere
    use: str  # "train" or "held-out"
    begins: str  # where the text begins, for a file without Project Gutenberg's markers; mostly empty
    repository: str  # on GitHub
    commit: str
    path: str  # in the repository
    bytes: str
    sha256: str

    @property
    def url(self) -> str:
        """Where this very file can be had."""
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}".replace(" ", "%20")


def main(arguments: list[str]) -> None:
    """Read the command line and make the corpus."""
    parser = argparse.ArgumentParser(prog="toyllm.models.recipe.corpus", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, metavar="BOOKS", help="a folder with the files that the list names")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--list", type=Path, default=BOOKS_CSV, metavar="CSV", help="the list of books (default: the recipe's books.csv)")
    options = parser.parse_args(arguments)
    make_corpus(options.books, options.out, read_list(options.list))


def read_list(path: Path) -> list[Book]:
    """The books of a list such as books.csv, in its order, which is the order of the corpus."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        columns = [field.name for field in fields(Book)]
        if rows.fieldnames != columns:
            raise ToyllmError(f"{path}: expected the columns {','.join(columns)}; found {','.join(rows.fieldnames or [])}")
        books = [Book(**row) for row in rows]
    for book in books:
        if book.use not in USES:
            raise ToyllmError(f"{path}: {book.file}: expected use to be {' or '.join(USES)}, found {book.use!r}")
    return books


def make_corpus(folder: Path, out: Path, books: list[Book]) -> None:
    """Clean the books, train the tokenizer on the training text alone, encode both texts, and write all of it to `out`."""
    missing = [book for book in books if not (folder / book.file).is_file()]
    if missing:
        first = missing[0]
        raise ToyllmError(f"{len(missing)} of {len(books)} books are not in {folder}, the first {first.file}. Get it from {first.url}")
    texts: dict[str, list[str]] = {use: [] for use in USES}
    for book in books:
        text = clean(body(read(folder, book), book.begins))
        texts[book.use].append(text)
        say(f"{len(text):>9} characters  {book.use:8}  {book.title}")
    tokenizer = train_tokenizer(texts["train"])
    with published(out) as partial:
        tokenizer.save(str(partial / "tokenizer.json"))
        for use, name in USES.items():
            (partial / f"{name}.txt").write_text(END_OF_TEXT.join(texts[use]), encoding="utf-8")
            ids = token_ids(tokenizer, texts[use])
            np.save(partial / f"{name}.npy", ids)
            say(f"{name}: {len(ids)} tokens")


def read(folder: Path, book: Book) -> str:
    """The text of a book. A file that is not the one listed is used all the same, and said."""
    data = (folder / book.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != book.sha256:
        say(f"note: {book.file} is not the edition in the list: the corpus will differ")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ToyllmError(f"{book.file}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}") from error


def body(text: str, begins: str = "") -> str:
    """The book without what Project Gutenberg put before and after it, as far as the markers (or the words in `begins`) tell."""
    if start := START_MARKER.search(text):
        text = text[start.end() :]
    elif begins:
        text = text[max(text.find(begins), 0) :]
    ends = [end.start() for end in END_MARKER.finditer(text)]
    return text[: ends[-1]] if ends else text


def clean(text: str) -> str:
    """One paragraph a line, in plain quotes and dashes, without markup, footnote marks, illustrations, and words about the file."""
    text = unicodedata.normalize("NFC", text.translate(PLAIN))
    text = FOOTNOTE.sub("", ILLUSTRATION.sub("", text))
    paragraphs = (one_line(paragraph) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(p for p in paragraphs if is_prose(p))


def one_line(paragraph: str) -> str:
    """A paragraph's lines joined by spaces, without Markdown and HTML."""
    joined = re.sub(r"\s*\n\s*", " ", paragraph.strip())
    return re.sub(r" {2,}", " ", MARKUP.sub("", joined))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph belongs to the story: it has a small letter, three characters, and does not speak of the file it came in."""
    return len(paragraph) >= 3 and re.search(r"[a-z]", paragraph) is not None and not ABOUT_THE_FILE.search(paragraph)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE in GPT-2's manner, `<|endoftext|>` first, trained paragraph by paragraph."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    # The library sets these by property, and its type stubs do not know the setters.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((paragraph for text in texts for paragraph in text.split("\n")), trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The ids of all texts, u16, with `<|endoftext|>` between them."""
    ids: list[int] = []
    for i, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids += ([END_OF_TEXT_ID] if i else []) + encoding.ids
    return np.array(ids, np.uint16)


if __name__ == "__main__":
    run(main)
