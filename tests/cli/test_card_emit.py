"""`toyllm card --emit`: a script on stdout or in a file, and what is refused."""

import pytest

CARD = ("card", "--emit", "numpy")


def test_the_script_goes_to_stdout(toyllm):
    done = toyllm(*CARD)
    assert done.code == 0
    compile(done.out, "script.py", "exec")
    assert "def softmax" in done.out


def test_a_file_is_written_once_and_over_with_force(toyllm, tmp_path):
    path = tmp_path / "model.py"
    assert toyllm(*CARD, "-o", str(path)).code == 0
    text = path.read_text(encoding="utf-8")
    compile(text, "model.py", "exec")
    again = toyllm(*CARD, "-o", str(path))
    assert again.code == 1
    assert "--force" in again.err
    assert toyllm(*CARD, "-o", str(path), "--force", "-m", "tales-gpt-oss").code == 0
    assert path.read_text(encoding="utf-8") != text
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--emit", "c"), "expected numpy"),
        (("--output", "x.py"), "give --emit numpy too"),
        (("--emit", "numpy", "--full"), "--full, not both"),
        (("gpt2.block", "--emit", "numpy"), "NAME, not both"),
    ],
)
def test_wrong_usage_is_told(toyllm, arguments, expected):
    done = toyllm("card", *arguments)
    assert done.code == 2
    assert expected in done.err
    assert not done.out


def test_another_ending_is_refused(toyllm, tmp_path):
    done = toyllm(*CARD, "-o", str(tmp_path / "model.txt"))
    assert done.code == 1
    assert "ends in .py" in done.err
