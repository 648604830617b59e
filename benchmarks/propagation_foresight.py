"""Whether the table of `apb explain` foretells what propagation costs: its shares beside what is lost, by prompt.

    python benchmarks/propagation_foresight.py --model PATH --task single_prose --task headings --out FILE

Each prompt is read with all rows (full attention, the question in front too), which gives the answer and the measure:
the share of later layers' attention that would be kept. Then it is read with propagation, for each layer and share.
What that loses is told twice: in nats a token by which the answer over all rows is less likely; and in points of the
score, of prompts that all rows answer at least in part. The rank correlations with the measure (Spearman's) come with
95 % intervals of a bootstrap over prompts. A run that was stopped goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

import apb
from apb.answering import whole
from apb.evaluation.items import Item
from apb.evaluation.scoring import METRICS
from apb.evaluation.settings import Setting
from apb.evaluation.synthetic import items
from apb.foresight import Foresight
from apb.generation import Generation, Sampling
from apb.hardware import fingerprint
from apb.hf.sampling import ends_turn

SEED = 200
ALL_ROWS = Setting.of("full", question_first=True)
ANSWER = 48
"""Most tokens of an answer."""
DRAWS = 2_000
LOST = ("points", "nats")


def prompt_of(row: dict[str, Any]) -> tuple[str, str]:
    """What names a row's prompt."""
    return row["task"], row["sample"]


GROUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "everything": lambda row: 0,
    "prompts of one layer and share": lambda row: (row["layer"], row["share"]),
    "layers and shares of one prompt": prompt_of,
}
"""What is ranked together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--task", action="append", required=True, help="a generated kind; repeatable")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=8, help="of each kind")
    parser.add_argument("--layer", type=int, action="append", help="1/3, 1/2 and 2/3 of the depth if left out")
    parser.add_argument("--share", type=float, action="append", help="repeatable; 0.1, 0.2 and 0.4 if left out")
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    arguments = parser.parse_args()
    engine = apb.Engine.from_pretrained(arguments.model, dtype="bfloat16", verify=False)
    depth = engine.model.config.num_hidden_layers
    layers = arguments.layer or [depth // 3, depth // 2, depth * 2 // 3]
    chosen = [apb.Propagation(layer, share) for layer in layers for share in arguments.share or (0.1, 0.2, 0.4)]
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    tokenizer = engine.needed_tokenizer()
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "length": arguments.length,
        "rows": rows,
    }
    for number in range(arguments.samples):
        for task in arguments.task:
            (item,) = items(tokenizer, task, arguments.length, 1, SEED, first=number, budget=ANSWER)
            known = [(row["layer"], row["share"]) for row in rows if prompt_of(row) == (task, item.sample)]
            missing = [each for each in chosen if (each.layer, each.keep) not in known]
            if missing:
                rows += measured(engine, item, missing)
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
                print(f"{task} {number}: {json.dumps(rows[-len(missing) :])}", file=sys.stderr, flush=True)
    report["correlations"] = correlations(rows)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["correlations"], indent=1))


def measured(engine: apb.Engine, item: Item, chosen: list[apb.Propagation]) -> list[dict[str, Any]]:
    """A row for each propagation of one prompt."""
    tokenizer = engine.needed_tokenizer()
    prompt, _ = item.fitted(tokenizer, True)
    ends = ends_turn(engine.model, tokenizer)
    sampling = Sampling(max_new_tokens=ANSWER, stopping_criteria=ends, top_logprobs=1)

    def answered(session: apb.Session) -> tuple[Generation, float]:
        answer = whole(engine.answering.stream(session, sampling, None))
        return answer, METRICS[item.metric](answer.text, item.answers)

    foresight, reader = Foresight(), ALL_ROWS.engine(engine)
    all_rows, score = answered(reader.prefill(prompt, max_new_tokens=ANSWER, look=foresight.look))
    reader.close()
    likely = sum(each.logprob for each in all_rows.scored)
    rows = []
    for propagation in chosen:
        reader = replace(ALL_ROWS, propagation=propagation).engine(engine)
        session = reader.prefill(prompt, max_new_tokens=ANSWER)
        logprobs, likeliest = session.score(all_rows.token_ids)
        # Where each token is the likeliest, the answer is the same.
        left = score if likeliest.all() else answered(session)[1]
        reader.close()
        rows.append(
            {
                "task": item.task,
                "sample": item.sample,
                "layer": propagation.layer,
                "share": propagation.keep,
                "held": foresight.held(propagation),
                "all_rows": score,
                "points": score - left,
                "nats": (likely - float(logprobs.sum())) / len(logprobs),
            }
        )
    return rows


def correlations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's correlation of what is held with what is lost, by LOST and GROUPS, with its interval."""
    found = []
    for lost in LOST:
        kept = [row for row in rows if lost == "nats" or row["all_rows"]]
        prompts = [[row for row in kept if prompt_of(row) == name] for name in dict.fromkeys(map(prompt_of, kept))]
        for name, group in GROUPS.items():
            random = numpy.random.default_rng(0)
            drawn = [
                # Drawn twice they are two prompts.
                [row | {"sample": str(place)} for place, index in enumerate(order) for row in prompts[index]]
                for order in random.integers(len(prompts), size=(DRAWS, len(prompts)))
            ]
            interval = numpy.nanpercentile([correlation(each, lost, group) for each in drawn], (2.5, 97.5)).tolist()
            told = {"lost": lost, "ranked": name, "prompts": len(prompts)}
            found.append(told | {"correlation": correlation(kept, lost, group), "interval": interval})
    return found


def correlation(rows: list[dict[str, Any]], lost: str, group: Callable[[dict[str, Any]], Any]) -> float:
    """Ranks of each group are taken from their mean, and then correlated together; NaN if nothing varies."""
    parts: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        parts.setdefault(group(row), []).append((row["held"], row[lost]))
    centred = [numpy.stack([ranks(column) for column in numpy.array(part).T]) for part in parts.values()]
    # A group in which nothing is lost, or the same everywhere, says nothing.
    x, y = numpy.concatenate([part for part in centred if part.any(1).all()] or [numpy.zeros((2, 1))], 1)
    square = float((x @ x) * (y @ y))
    return float(x @ y) / square**0.5 if square else math.nan


def ranks(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Ranks less their mean; equal values share one."""
    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place] - (len(values) + 1) / 2


if __name__ == "__main__":
    main()
