"""The one place that prints: JSON without NaN, escapes, tables, colours only where they belong, notes as lines."""

import io
import json
import logging
import sys
import unicodedata
from typing import Any

import pytest

from toyllm.cli import output


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_json_is_one_line_with_its_schema_first(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json("test", {"text": "☃\n", "none": None})
    assert capsys.readouterr().out == '{"schema": "toyllm.test/1", "text": "☃\\n", "none": null}\n'


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_bare_nan(capsys: pytest.CaptureFixture[str], number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        output.write_json("test", {"deep": [{"er": number}]})
    assert capsys.readouterr().out == "", "and no half of a document either"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ☃ 👋 é\tand\nbroken", "plain, ☃ 👋 é\tand\nbroken"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\r\x08\x7f\x9b", r"\r\x08\x7f\x9b"),
        ("\u202eright\u200bto\ufeff", r"\u202eright\u200bto\ufeff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udc80\U000e0041", r"\udc80\U000e0041"),
    ],
)
def test_what_could_command_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert output.printable(text) == shown
    assert output.one_line(text) == shown.replace("\t", r"\t").replace("\n", r"\n")


def test_nothing_printable_holds_a_control_character() -> None:
    everything = "".join(map(chr, range(0x3000))) + "".join(map(chr, range(0xD7F0, 0xF900)))
    assert {unicodedata.category(c) for c in output.printable(everything) if c not in "\n\t"} & {
        "Cc",
        "Cf",
        "Cs",
        "Co",
        "Zl",
        "Zp",
    } == set()
    assert output.one_line(everything).count("\n") == 0


@pytest.mark.parametrize(
    ("terminal", "variables", "colours"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: set and not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_belong_on_a_terminal_that_wants_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, variables: dict[str, str], colours: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = Stream(terminal)
    assert output.colours(stream) is colours
    monkeypatch.setattr(sys, "stderr", stream)
    output.say_dimmed("Once")
    assert stream.getvalue() == ("\x1b[2mOnce\x1b[0m" if colours else "Once")


@pytest.mark.parametrize("bar", [output.byte_bar, output.token_bar])
def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, bar: Any) -> None:
    for terminal in (False, True):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with bar("reading \x1b[31m[b]x[/b]") as progress:
            assert stream.getvalue() == ""
            progress(500, 1000)
            progress(1000, 1000)
        assert bool(stream.getvalue()) is terminal
        assert (r"reading \x1b[31m[b]x[/b]" in stream.getvalue()) is terminal
        assert ("1000/1000" in stream.getvalue() and "tokens" in stream.getvalue()) is (terminal and bar is output.token_bar)


def test_a_bar_that_is_never_filled_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    with output.byte_bar("reading"):
        pass
    assert stream.getvalue() == ""


def test_a_status_line_replaces_itself_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    for terminal in (False, True):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with output.status_line() as show:
            show("one\x1b[31m, which is long")
            show("two")
        assert stream.getvalue() == ("\r\x1b[2Kone\\x1b[31m\r\x1b[2Ktwo\r\x1b[2K" if terminal else "")


def test_a_table_lines_up_by_width_and_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("name", "n"), [("日本", "1"), ("e\u0301", "22"), ("x" * 300, "3"), ("a\nb\x1b", "4")], right=(1,))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name" + " " * 296 + "   n"
    assert lines[1] == "日本" + " " * 296 + "   1"
    assert lines[2] == "e\u0301" + " " * 299 + "  22"
    assert lines[3] == "x" * 300 + "   3"
    assert lines[4].startswith(r"a\nb\x1b ")
    assert len(lines) == 5


def test_a_table_leaves_no_blanks_behind(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("a", "b"), [("long", ""), ("", "x")])
    assert capsys.readouterr().out == "a     b\nlong\n      x\n"


@pytest.fixture
def logger() -> Any:
    logger = logging.getLogger("toyllm")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


def test_notes_and_warnings_are_lines_on_stderr_said_once(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    output.show_notes()
    output.show_notes()
    logger.info("reduced to %d\n\x1b[31m", 5)
    logging.getLogger("toyllm.models").warning("careful")
    logger.debug("details")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: reduced to 5\\n\\x1b[31m\nwarning: careful\n")


def test_bytes_follow_text_in_order(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.write("a☃")
    output.write_bytes(b"\xff\x00")
    output.write("b")
    assert capfdbinary.readouterr().out == "a☃".encode() + b"\xff\x00b"


def test_the_document_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"a": [1, 2.5, None, True], "b": {"c": "\x1b\u2028"}}
    output.write_json("x", document)
    assert json.loads(capsys.readouterr().out) == {"schema": "toyllm.x/1", **document}
