"""`toyllm tokenize` and `toyllm detokenize`: what they print, what they refuse, and that they are each other's inverse."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from toyllm.cli.detokenize import detokenize
from toyllm.cli.prompt import parse_ids
from toyllm.cli.tokenize import tokenize
from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import EMBEDDED

UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(rich_markup_mode=None)
app.command("tokenize")(tokenize)
app.command("detokenize")(detokenize)

Run = Callable[..., bytes]


class Stream(io.TextIOWrapper):
    """A standard stream over bytes: a terminal, or a pipe."""

    def __init__(self, data: bytes = b"", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line and return its stdout. Without `stdin`, that is a terminal; with `screen`, stdout is one."""

    def run(*arguments: str, stdin: bytes | None = None, screen: bool = False) -> bytes:
        out = Stream(terminal=screen)
        monkeypatch.setattr(sys, "stdin", Stream(stdin or b"", terminal=stdin is None))
        monkeypatch.setattr(sys, "stdout", out)
        get_command(app)(list(arguments), standalone_mode=False)
        out.flush()
        return out.buffer.getvalue()

    return run


# tokenize


def test_the_table_shows_ids_pieces_and_bytes(run: Run) -> None:
    text = "Once upon a ☃<|endoftext|>\n"
    assert [line.split(maxsplit=1) for line in run("tokenize", text).decode().splitlines()] == [
        ["id", "piece            bytes"],
        ["3119", "'Once'             0:4"],
        ["650", "' upon'            4:9"],
        ["259", "' a'              9:11"],
        ["221", "' '              11:12"],
        ["159", r"b'\xe2'          12:13"],
        ["247", r"b'\x98'          13:14"],
        ["226", r"b'\x83'          14:15"],
        ["0", "'<|endoftext|>'  15:28"],
        ["199", r"'\n'             28:29"],
    ]


def test_ids_and_count_are_bare(run: Run) -> None:
    assert run("tokenize", "Once upon a", "--ids") == b"3119 650 259\n"
    assert run("tokenize", "Once upon a", "--count") == b"3\n"


def test_json_holds_text_ids_and_pieces(run: Run) -> None:
    assert json.loads(run("tokenize", "Once ☃", "--json")) == {
        "schema": "toyllm.tokenize/1",
        "text": "Once ☃",
        "ids": [3119, 221, 159, 247, 226],
        "pieces": [
            {"id": 3119, "text": "Once", "start": 0, "end": 4},
            {"id": 221, "text": " ", "start": 4, "end": 5},
            {"id": 159, "text": "\ufffd", "start": 5, "end": 6},
            {"id": 247, "text": "\ufffd", "start": 6, "end": 7},
            {"id": 226, "text": "\ufffd", "start": 7, "end": 8},
        ],
    }


def test_special_tokens_may_be_plain_text(run: Run) -> None:
    assert run("tokenize", "<|endoftext|>", "--ids") == b"0\n"
    assert run("tokenize", "<|endoftext|>", "--ids", "--no-special") != b"0\n"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_a_pipe_is_read_as_it_is(run: Run, arguments: tuple[str, ...]) -> None:
    document = json.loads(run("tokenize", *arguments, "--json", stdin="é\r\n".encode()))
    assert document["text"] == "é\r\n"
    assert document["pieces"][-1]["end"] == 4


def test_an_empty_text_has_no_tokens(run: Run) -> None:
    assert run("tokenize", "", "--count") == b"0\n"
    assert run("tokenize", stdin=b"").split() == [b"id", b"piece", b"bytes"]


def test_a_pipe_that_is_not_utf8_is_an_error_that_says_where(run: Run) -> None:
    with pytest.raises(ToyllmError, match=r"stdin: byte 4 \(0xff\): expected UTF-8"):
        run("tokenize", stdin=b"abc \xff")


def test_nothing_to_read_is_a_usage_error_with_an_example(run: Run) -> None:
    with pytest.raises(UsageError) as tokenizing:
        run("tokenize")
    assert 'toyllm tokenize "Once upon a time"' in tokenizing.value.format_message()
    with pytest.raises(UsageError) as detokenizing:
        run("detokenize")
    assert 'toyllm detokenize "464 3290"' in detokenizing.value.format_message()


@pytest.mark.parametrize("two", [("--ids", "--count"), ("--ids", "--json"), ("--count", "--json")])
def test_two_forms_of_output_are_a_usage_error(run: Run, two: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        run("tokenize", "Once", *two)


def test_a_model_without_a_tokenizer_is_an_error_that_says_what_to_do(run: Run, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED / "tales-gpt2" / "config.json", tmp_path)
    with pytest.raises(ToyllmError, match=r"no byte-level tokenizer in .*: expected tokenizer\.json, or vocab\.json and merges\.txt"):
        run("tokenize", "Once", "-m", str(tmp_path))


# detokenize


@pytest.mark.parametrize("ids", [("3119", "650", "259"), ("3119 650 259",), ("3119,650", "259"), (" 3119, 650,\n259,",)])
def test_ids_come_with_spaces_or_commas_between(run: Run, ids: tuple[str, ...]) -> None:
    assert run("detokenize", *ids) == b"Once upon a"
    assert run("detokenize", "-", stdin=" ".join(ids).encode()) == run("detokenize", stdin=" ".join(ids).encode()) == b"Once upon a"


def test_a_pipe_gets_exactly_the_bytes(run: Run) -> None:
    assert run("detokenize", "159 247") == b"\xe2\x98"
    text = "Once\r\n ☃ \x1b[31m👋🏽\0<|endoftext|>\n"
    assert run("detokenize", stdin=run("tokenize", "--ids", stdin=text.encode())) == text.encode()


def test_a_terminal_gets_a_line_with_control_characters_escaped(run: Run) -> None:
    ids = run("tokenize", "Hi\x1b[31m", "--ids").decode()
    assert run("detokenize", ids, screen=True) == b"Hi\\x1b[31m\n"


def test_detokenized_json_holds_ids_and_text(run: Run) -> None:
    assert json.loads(run("detokenize", "3119 159", "--json")) == {
        "schema": "toyllm.detokenize/1",
        "ids": [3119, 159],
        "text": "Once\ufffd",
    }


def test_ids_beyond_the_model_are_an_error(run: Run) -> None:
    with pytest.raises(ToyllmError, match="token id 4096: tales-gpt2 has ids 0 to 4095"):
        run("detokenize", "0 4096")


def test_a_row_of_the_embedding_without_a_token_shows_its_id(run: Run, tmp_path: Path) -> None:
    config = json.loads((EMBEDDED / "tales-gpt2" / "config.json").read_text()) | {"vocab_size": 4100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(EMBEDDED / "tales-gpt2" / "tokenizer.json", tmp_path)
    assert run("detokenize", "3119 4099", "-m", str(tmp_path)) == b"Once<|id 4099|>"
    with pytest.raises(ToyllmError, match=r"token id 4100: .* has ids 0 to 4099"):
        run("detokenize", "4100", "-m", str(tmp_path))


@pytest.mark.parametrize("text", ["", " , ", "12a", "1.5", "-1", "1_0", "١", "0x1", "1;2", "9" * 5000])
def test_what_is_no_list_of_ids_is_refused(run: Run, text: str) -> None:
    with pytest.raises(ValueError, match=r"no ids given|is not a token id"):
        parse_ids(text)
    with pytest.raises(UsageError, match=r"no ids given|is not a token id"):
        run("detokenize", stdin=text.encode())


# Both


def test_neither_command_imports_numba_or_a_client() -> None:
    code = f"""
import sys
from typer.main import get_command
sys.path.insert(0, {str(Path(__file__).parent)!r})
from {Path(__file__).stem} import app
get_command(app)(["tokenize", "Once", "--ids"], standalone_mode=False)
get_command(app)(["detokenize", "3119"], standalone_mode=False)
print(*sorted({{"numba", "torch", "transformers", "huggingface_hub"}} & set(sys.modules)), sep=",")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3119\nOnce\n", "")
