"""Other commands on bad models: what writes, compares, traces, scores and lists."""

import json
from pathlib import Path

from .making import NAN, WEIGHTS, Case, Command, Make, file_of, gpt2, poked, sharded, with_file

WTE = "transformer.wte.weight"


def command(code: int, says: str, *line: str) -> Command:
    return Command(line, code, says)


def linked(name: str, target: str) -> Make:
    """A model with a link beside it."""

    def make(folder: Path) -> None:
        gpt2(folder)
        (folder / name).symlink_to(target)

    return make


def named(*names: str) -> Make:
    """Tensors of these names alone."""
    return with_file(WEIGHTS, file_of({name: ("F32", [2, 2], bytes(16)) for name in names}))


def extra_shard(folder: Path) -> None:
    """A shard that no index names is not read."""
    sharded(folder)
    (folder / "model-2.safetensors").write_bytes(b"GGUF")


def cache_with_a_bad_model(folder: Path) -> None:
    """A Hugging Face cache whose one model has a type of a megabyte and a link to nothing."""
    snapshot = folder / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "\x1b[2J" + "x" * 1_000_000}))
    (snapshot / WEIGHTS).symlink_to("../../blobs/gone")


CUT = ("cut", "-m", "{}", "--layers", "1", "{}-cut")
SCORE, TRACE = ("score", "-m", "{}", "--prompt-ids", "1 2 3"), ("trace", "-m", "{}", "--prompt-ids", "1 2 3")
COMPARE = ("compare", "{}", "tales-gpt2")
DUMP = ("dump-tensor", "-m", "{}")
OTHERS = [
    Case(
        "others", "cut: a license that is a link to a secret", linked("LICENSE", "/etc/hostname"), (command(1, "a link out of the", *CUT),)
    ),
    Case(
        "others",
        "cut: a tokenizer that is a link to a folder",
        linked("vocab.json", "/etc"),
        (command(1, "--layers 9", *CUT[:4], "9", CUT[5]),),
    ),
    Case("others", "cut: truncated", with_file(WEIGHTS, b"\0" * 7), (command(1, "only 7 bytes", *CUT),)),
    Case("others", "compare: an empty file", with_file(WEIGHTS, b""), (command(1, "an empty file", *COMPARE),)),
    Case("others", "compare: another family of names", named("\x1b[2J", "x" * 1000), (command(3, "they hold", *COMPARE),)),
    Case("others", "score: NaN", poked(WTE, 24, NAN), (command(1, "NaN or infinity", *SCORE), command(0, "", *TRACE))),
    Case("others", "score: one token", gpt2, (command(0, "number.*logprob", *SCORE[:4], "1"),)),
    Case("others", "score: more than there is", gpt2, (command(1, "token id 97", *SCORE[:4], "1 97"),)),
    Case("others", "trace: ids beyond the vocabulary", gpt2, (command(1, "token id 97", *TRACE[:4], "97"),)),
    Case(
        "others",
        "dump: names of every kind",
        named("$\\bad{$", "[/x]", "\x1b[2J\u202e", "", "a\nb"),
        (command(0, r"\\x1b\[2J\\u202e", *DUMP),),
    ),
    Case(
        "others",
        "dump: a name that leads out of an archive",
        named("../../x"),
        (command(1, "cannot be in an .npz", *DUMP, "*", "--save", "{}.npz"),),
    ),
    Case("others", "dump: a regular expression that is none", gpt2, (command(1, "--regex '\\('", *DUMP, "(", "--regex"),)),
    Case(
        "others",
        "dump: a slice beyond the tensor",
        gpt2,
        (command(1, "", *DUMP, WTE, "--slice", "97"), command(0, "", *DUMP, WTE, "--slice", "97:")),
    ),
    Case("others", "dump: a slice of 300 brackets", gpt2, (command(1, "slice", *DUMP, WTE, "--slice", "[" * 300),)),
    Case(
        "others",
        "patched with a pickle",
        with_file(
            "x.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n\x80\x04N."
        ),
        (command(1, "x.npy: cannot be read", "generate", "-m", "{}", "--prompt-ids", "1", "--patch", "blocks.0.out={}/x.npy"),),
    ),
    Case(
        "others",
        "patched with 4 TB",
        with_file(
            "x.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
        ),
        (command(1, "x.npy: cannot be read", "generate", "-m", "{}", "--prompt-ids", "1", "--patch", "blocks.0.out={}/x.npy"),),
    ),
    Case(
        "others",
        "a shard that no index names",
        extra_shard,
        (command(0, "", "params", "-m", "{}"), command(0, "0 errors", "check", "-m", "{}")),
    ),
    Case(
        "others",
        "config alone, of 2,000 layers",
        with_file("c.json", {"model_type": "gpt2", "n_layer": 2000}),
        (command(0, "", "params", "--config", "{}/c.json"),),
    ),
    Case(
        "others",
        "config alone, the largest of everything",
        with_file("c.json", {"model_type": "gpt2", **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_head"), 2**31 - 1)}),
        (command(0, "", "params", "--config", "{}/c.json"), command(0, "", "card", "--config", "{}/c.json")),
    ),
    Case("others", "a model's name with escapes", gpt2, (command(1, r"\\x1b\[2J", "params", "-m", "\x1b[2J\x07\n/x"),)),
    Case("others", "a model's name of 1,000", gpt2, (command(1, "", "params", "-m", "x" * 1000),)),
    Case("others", "no model's name", gpt2, (command(1, "no name", "params", "-m", ""),)),
]
