"""Make the goldens of scoring: what transformers finds of goldens/score/text.txt with the embedded models, in windows.

Needs torch and transformers (the files in the repository were made with torch 2.13.0 and transformers 5.23.0; each says so),

    python tests/models/make_score_goldens.py

writes goldens/score/{model}.json: `ids`; for each token `logprobs`, `ranks` and `entropies`, null where nothing stands before it in its
window; and two perplexities. `perplexity` is that of the mean over all scored tokens. `guide` is what the loop in transformers'
docs/source/en/perplexity.md comes to, which scores the same tokens in the same windows, but weighs each window but the first as one
token less than it scores, because its labels are counted before they are shifted.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from toyllm.models.location import EMBEDDED

GOLDENS = Path(__file__).parent / "goldens" / "score"
MADE_WITH = f"torch {torch.__version__}, transformers {transformers.__version__}"
WINDOWS = {"tales-gpt2": (64, 24), "tales-gpt-oss": (96, 40)}  # model -> context and stride


def load(name: str) -> Any:
    """An embedded model as transformers runs it: f32, eager, its experts dequantised."""
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if json.loads((EMBEDDED / name / "config.json").read_text())["model_type"] == "gpt_oss":
        settings |= {"experts_implementation": "eager", "quantization_config": transformers.Mxfp4Config(dequantize=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / name, **settings).eval()


def encode(name: str, text: str) -> list[int]:
    """The ids of a text, by transformers' own tokenizer."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / name / "tokenizer.json"))(text)["input_ids"]


@torch.no_grad()
def by_the_guide(model: Any, ids: list[int], context: int, stride: int) -> float:
    """The perplexity that the guide's loop comes to."""
    total, count, reached = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        window = torch.tensor(ids[begin : begin + context])
        end = begin + len(window)
        labels = window.clone()
        labels[: reached - begin] = -100
        total += float(model(window[None], labels=labels[None]).loss) * (end - reached - 1)
        count, reached = count + end - reached - 1, end
        if end == len(ids):
            break
    return math.exp(total / count)


@torch.no_grad()
def scores(model: Any, ids: list[int], context: int, stride: int) -> list[tuple[float, int, float] | None]:
    """Of each token log-probability, rank and entropy in the guide's windows."""
    found: list[tuple[float, int, float] | None] = []
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context]
        log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for i in range(len(found) - begin, len(window)):
            before = log_p[i - 1]
            rank = int((before > before[window[i]]).sum()) + 1
            found.append((float(before[window[i]]), rank, float(-(before.exp() * before).sum())) if i else None)
        if len(found) == len(ids):
            break
    return found


def main() -> None:
    """Make all of it anew."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = (GOLDENS / "text.txt").read_bytes().decode()
    for name, (context, stride) in WINDOWS.items():
        model, ids = load(name), encode(name, text)
        found = scores(model, ids, context, stride)
        logprobs, ranks, entropies = ([token and token[n] for token in found] for n in range(3))
        scored = [p for p in logprobs if p is not None]
        document = {
            "made_with": MADE_WITH,
            "context": context,
            "stride": stride,
            "perplexity": math.exp(-sum(scored) / len(scored)),
            "guide": by_the_guide(model, ids, context, stride),
            "ids": ids,
            "logprobs": logprobs,
            "ranks": ranks,
            "entropies": entropies,
        }
        (GOLDENS / f"{name}.json").write_text(json.dumps(document) + "\n")
        print(name, len(ids), document["perplexity"], document["guide"])


if __name__ == "__main__":
    main()
