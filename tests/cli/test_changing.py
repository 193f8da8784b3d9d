"""Changes of a run from the command line: a run's own dump in its place, experiments, what the documents record, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.models import preload

TALE = "Once upon a time there was a poor man"
GREEDY = ("-t", "0", "--max-tokens", "8")
RUNS = [("generate", "hi"), ("dump-tensor", "embed", "--prompt", "hi"), ("score", "--prompt", "hi"), ("trace", "hi")]
GPT_OSS = ("-m", "tales-gpt-oss")


@pytest.fixture
def document(toyllm: Any) -> Any:
    """Run a command with --json, which must succeed without a word on stderr."""

    def document(*arguments: str) -> Any:
        code, out, err = toyllm(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return document


def dumped(toyllm: Any, path: Path, names: str, *arguments: str, prompt: str = TALE) -> Path:
    """The file that dump-tensor has written."""
    assert toyllm("dump-tensor", names, "--prompt", prompt, "--save", str(path), *arguments).code == 0
    return path


@pytest.mark.parametrize("model", [(), GPT_OSS], ids=["gpt2", "gpt_oss"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_runs_own_dump_in_its_place_says_the_same(toyllm: Any, tmp_path: Path, model: tuple[str, ...], suffix: str) -> None:
    own = dumped(toyllm, tmp_path / f"own{suffix}", "*", *model)
    plain = toyllm("generate", TALE, *GREEDY, *model)
    patched = toyllm("generate", TALE, *GREEDY, *model, "--patch", f"*={own}", "--prefill-chunk", "3")
    assert (patched.code, patched.out) == (0, plain.out)
    assert patched.err.startswith(f"note: --patch *={own}: changes ")


def test_another_runs_layer_decides_what_comes_next(document: Any, toyllm: Any, tmp_path: Path) -> None:
    other = dumped(toyllm, tmp_path / "other.npy", "blocks.5.out", prompt="Once upon a time there was a poor king")
    found = document("generate", TALE, *GREEDY, "--patch", f"blocks.5.out[-1]={other}")
    expected = document("generate", "Once upon a time there was a poor king", *GREEDY)
    plain = document("generate", TALE, *GREEDY)
    assert found["tokens"][0] == expected["tokens"][0] != plain["tokens"][0]
    assert found["settings"]["changes"] == [{"kind": "patch", "where": "blocks.5.out[-1]", "value": str(other)}]
    assert plain["settings"]["changes"] == []


def test_options_are_taken_in_one_order_and_recorded_in_it(document: Any) -> None:
    changes = ("--ablate", "embed[:, 3]", "--add", "embed=1", "--scale", "embed=2", "--patch", "embed[1:]=-inf", "--patch", "embed[1]=3")
    found = document("dump-tensor", "embed", "--prompt", "Once upon", *changes, "--full")
    assert [tuple(change.values()) for change in found["settings"]["changes"]] == [
        ("patch", "embed[1:]", "-inf"),
        ("patch", "embed[1]", "3"),
        ("scale", "embed", "2"),
        ("add", "embed", "1"),
        ("ablate", "embed[:, 3]", None),
    ]
    plain = np.array(document("dump-tensor", "embed", "--prompt", "Once upon", "--full")["tensors"][0]["values"], np.float32)
    expected = np.array([plain[0] * 2 + 1, np.full(256, 7)], np.float32)
    expected[:, 3] = 0
    np.testing.assert_array_equal(np.array(found["tensors"][0]["values"], np.float32), expected)


def test_a_decode_step_is_changed_too(document: Any) -> None:
    asked = ("dump-tensor", "blocks.0.out", "--prompt", "Once upon", "--step", "3", "--slice", "0, :4")
    (plain,), (found,) = (document(*asked, *more)["tensors"] for more in ((), ("--add", "blocks.0.out[4:]=10")))
    np.testing.assert_allclose(np.subtract(found["values"], plain["values"]), 10, rtol=1e-5)


def test_tokens_go_to_the_experts_that_are_allowed(document: Any) -> None:
    (experts,) = document("dump-tensor", "blocks.2.router.experts", "--prompt", TALE, *GPT_OSS, "--experts", "0-1,5", "--full")["tensors"]
    assert {e for row in experts["values"] for e in row} <= {0, 1, 5}
    found = document("generate", TALE, *GREEDY, *GPT_OSS, "--experts", "0-1,5")
    assert found["settings"]["changes"] == [{"kind": "experts", "where": "blocks.*.router.logits", "value": "0,1,5"}]
    assert found["tokens"] != document("generate", TALE, *GREEDY, *GPT_OSS)["tokens"]


def test_a_variable_changes_a_run(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_line = document("generate", TALE, *GREEDY, "--ablate", "blocks.*.attn.heads[:, 1]")
    monkeypatch.setenv("TOYLLM_ABLATE", "blocks.*.attn.heads[:, 1]")
    found = document("generate", TALE, *GREEDY)
    assert (found["tokens"], found["settings"]["changes"]) == (on_the_line["tokens"], on_the_line["settings"]["changes"])
    assert found["tokens"] != document("generate", TALE, *GREEDY, "--ablate", "blocks.5.norm_1[:, 9]")["tokens"]
    monkeypatch.setenv("TOYLLM_EXPERTS", "3")
    monkeypatch.setenv("TOYLLM_MAP", "nowhere.toml")
    monkeypatch.delenv("TOYLLM_ABLATE")
    assert document("dump-tensor", "wte.weight", "--stats")["tensors"], "what runs nothing is not changed"


# score


def test_what_a_head_is_worth_is_a_number(document: Any) -> None:
    ablated = ("score", "--prompt", TALE, "--ablate", "blocks.*.attn.heads[:, 2]", "--against-options")
    found = document(*ablated, "")
    assert found["against"]["kl_mean"] > 0.01
    assert found["against"]["perplexity"] == document("score", "--prompt", TALE)["perplexity"] != found["perplexity"]
    assert (len(found["settings"]["changes"]), found["against"]["settings"]["changes"]) == (1, [])
    same = document(*ablated, "--ablate 'blocks.*.attn.heads[:, 2]'")
    assert (same["against"]["kl_max"], same["perplexity"]) == (0, found["perplexity"])
    assert same["against"]["settings"]["changes"] == same["settings"]["changes"]
    assert document(*ablated[:-1], "--against", "tales-gpt2")["against"]["kl_max"] == 0


def test_positions_count_in_each_window(document: Any, toyllm: Any) -> None:
    ids = ("score", "--prompt-ids", " ".join(map(str, range(100, 120))))
    windows = ("--context", "10", "--stride", "10", "--ablate", "embed[3]")
    plain, found = (document(*ids, *more)["tokens"] for more in (windows[:4], windows))
    changed = [p["number"] for p in ({"number": n} for n in range(20)) if plain[p["number"]] != found[p["number"]]]
    assert set(changed) == {*range(4, 10), *range(14, 20)}
    outcome = toyllm(*ids, *windows[:4], "--ablate", "embed[-1]")
    assert outcome.error.startswith("--ablate embed[-1]: '-1' at axis 0 of embed: a negative position counts back from a prompt's end")
    assert document(*ids, "--ablate", "embed[-2]")["tokens"] != document(*ids)["tokens"], "one window has an end"


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ablate", "embed=0"), "Invalid value for '--ablate': 'embed=0': expected a name, and no value: 'blocks.5.attn.heads[:, 3]'"),
        (("--scale", "embed"), "Invalid value for '--scale': 'embed': expected a name and a number: blocks.*.mlp.out=0.5"),
        (("--scale", "embed=a.npy"), "Invalid value for '--scale': 'a.npy': expected a number"),
        (("--scale", "embed=nan"), "Invalid value for '--scale': 'nan': expected a finite number"),
        (("--patch", "embed="), "Invalid value for '--patch': 'embed=': expected a name and a file or number: blocks.7.out=clean.npy"),
        (("--add", "=1"), "Invalid value for '--add': '=1': expected a name and a file or number"),
        (("--experts", ""), "Invalid value for '--experts': '': expected numbers of experts, such as 3,7 or 0-3"),
        (("--experts", "3, 7"), "Invalid value for '--experts': '3, 7': expected numbers of experts, such as 3,7 or 0-3"),
        (("--experts", "7-3"), "Invalid value for '--experts': '7-3': expected ascending numbers"),
        (("--map", "a.toml", "--ablate", "embed"), "Invalid value for '--map': has no meaning without a .npz or .safetensors file"),
    ],
)
@pytest.mark.parametrize("command", RUNS)
def test_what_is_no_change_is_wrong_usage(toyllm: Any, command: tuple[str, ...], arguments: tuple[str, ...], message: str) -> None:
    outcome = toyllm(*command, *arguments)
    assert outcome.code == 2
    assert outcome.error.startswith(message)
    assert outcome.error.endswith(f"See: toyllm {command[0]} --help")


def test_a_wrong_change_in_the_environment_names_the_variable(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_SCALE", "blocks.0.out = x")
    assert (
        toyllm("generate", "hi").error
        == "Invalid value for '--scale': ' x': expected a number (from TOYLLM_SCALE). See: toyllm generate --help"
    )


def test_what_changes_nothing_that_runs_is_refused(toyllm: Any) -> None:
    outcome = toyllm("dump-tensor", "wte.weight", "--ablate", "embed")
    assert (outcome.code, outcome.error.split(". See")[0]) == (
        2,
        "Invalid value for --ablate: has no meaning without a run; give --prompt or --prompt-ids",
    )


@pytest.mark.parametrize("command", RUNS)
def test_a_name_that_is_not_there_is_told_before_a_file_is_read_ahead(
    toyllm: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(preload, "read_ahead", lambda *arguments: pytest.fail("read ahead"))
    outcome = toyllm(*command, "--ablate", "blocks.1.attn.hedas")
    assert outcome.code == 1
    assert outcome.error.startswith(
        "tales-gpt2: --ablate blocks.1.attn.hedas: no activation of this model is called 'blocks.1.attn.hedas'; did you mean "
        "blocks.1.attn.heads or "
    )
    assert outcome.error.endswith(
        "there are embed, blocks.0-5.(norm_1 attn.q attn.k attn.v attn.scores attn.weights attn.heads attn.out "
        "resid_mid norm_2 mlp.hidden mlp.out out), norm_f, logits"
    )


def test_a_file_that_does_not_fit_is_one_line(toyllm: Any, tmp_path: Path) -> None:
    longer = dumped(toyllm, tmp_path / "longer.npy", "embed")
    outcome = toyllm("dump-tensor", "embed", "--prompt", "hi", "--patch", f"embed={longer}")
    assert (outcome.code, outcome.error) == (
        1,
        f"--patch embed={longer}: found shape [9, 256], expected [T, 256], or their last axes; T up to 2",
    )
    assert toyllm("generate", "hi", "--patch", f"embed={tmp_path}/none.npz").error.startswith(f"{tmp_path}/none.npz: cannot be read")
    outcome = toyllm("generate", "hi", *GREEDY, "--ablate", "embed[\x1b[31m]")
    assert "\x1b" not in outcome.error
