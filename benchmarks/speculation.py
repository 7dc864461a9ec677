"""Tokens per step and decode speed with drafted tokens: speculation off, ngram and format.

    python benchmarks/speculation.py --output benchmarks/results/speculation-cpu.json

Two models: a small Molmo 1 that is trained in this script to write a few answers by heart, whose
tokenizer splits pointing answers as that of Molmo-7B-D does, and the demo, a Molmo 2, asked about
drawn scenes. Each side is a fresh process, they follow one another in every round (`--starts`),
and "off" is measured twice: the second against the first is the noise floor. Decode speed is that
of the tokens after the first, all answers of a kind together, one request at a time. A step yields
one token and the drafts that were accepted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from molmo_edge.bench.tables import number, percent, table
from molmo_edge.errors import BenchmarkError

SIDES = {"off": "off", "again": "off", "ngram": "ngram", "format": "format"}
LIMIT_S = 600.0
REPEATS = 10
SCENES = 8
TITLES = {
    "points": "Molmo 1, points",
    "prose": "Molmo 1, prose",
    "demo points": "demo, points and counts",
    "demo track": "demo, tracks",
    "demo other": "demo, other answers",
}


def _pairs(count: int) -> str:
    """Coordinates without a pattern."""
    values = [f"{7 + 37 * i % 89}.{i * 7 % 10}" for i in range(2 * count)]
    return " ".join(
        f'x{i + 1}="{x}" y{i + 1}="{y}"'
        for i, (x, y) in enumerate(zip(values[::2], values[1::2], strict=True))
    )


BY_HEART = {
    "points": {
        "Count the mugs.": f' Counting the <points {_pairs(12)} alt="red mugs">red mugs</points> '
        "shows a total of 12.",
        "Point to the table.": ' <point x="61.5" y="40.4" alt="table">table</point>',
    },
    "prose": {
        "Tell a story.": " A robot came to a garden in the morning, and nobody had told it what a "
        "flower was. It looked at the first one for an hour. Then it asked the gardener, who had 3 "
        "dogs and 12 hens, whether the red thing was broken. She laughed, sat down on the bench "
        "and said that it was only asleep. So the robot waited until noon, quietly, as it had "
        "learned to wait for doors; and when the sun stood over the wall, the poppy opened."
    },
}


def train(directory: Path) -> None:
    """Write the Molmo 1 that knows the answers by heart."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers

    from molmo_edge.devices.tensors import TEXT, tensor_shapes
    from molmo_edge.models.molmo.synthetic import (
        hub_config,
        write_checkpoint,
        write_description,
    )
    from molmo_edge.models.synthetic import random_weights
    from molmo_edge.reference.checkpoint import text_config
    from molmo_edge.reference.molmo import ReferenceMolmo

    class Trainable(ReferenceMolmo):
        def scores(self, ids: Sequence[int]) -> torch.Tensor:
            return self._linear(
                self._decode(self._embed(ids, None), self._new_cache()), self.LM_HEAD
            )

    answers = {q: a for kind in BY_HEART.values() for q, a in kind.items()}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [piece for text in answers.values() for piece, _ in split.pre_tokenize_str(text)]
    # Digits are single tokens, as in Molmo-7B-D.
    words = [word for word in words if not word.strip("Ġ").isdecimal()]
    config = hub_config()
    # The vision tower is never used, and has its real size.
    random, shapes = random_weights(1), tensor_shapes(config)
    weights = {
        name: random(name, shape) if name.startswith(TEXT) else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    write_description(directory, config, words)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = []
    for question, answer in answers.items():
        prompt = tokenizer.encode(f" User: {question} Assistant:").ids
        texts.append(([end, *prompt], [*tokenizer.encode(answer).ids, end]))
    trained = [
        tensor.requires_grad_()
        for name, tensor in weights.items()
        if name.startswith(TEXT) and "new_embedding" not in name
    ]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    for _ in range(1000):
        model, losses = Trainable(text_config(config), weights), []
        for prompt, answer in texts:
            scores = model.scores([*prompt, *answer[:-1]])[len(prompt) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(answer)))
        loss = torch.stack(losses)
        if loss.max().item() < 0.003:
            break
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    harness.progress(f"trained to a loss of {loss.max().item():.4f}")
    known = {name: tensor.detach() for name, tensor in weights.items()}
    write_checkpoint(directory, config, words=words, weights=lambda name, _: known[name])


def requests(model: str) -> dict[str, list[Any]]:
    """Kind → requests."""
    from molmo_edge import Request
    from molmo_edge.bench.accuracy import questions

    if model != "demo":
        return {
            kind: [Request(None, question, max_tokens=400) for question in answers] * REPEATS
            for kind, answers in BY_HEART.items()
        }
    kinds = defaultdict(list)
    for question in questions(SCENES, 7):
        name = question.measure.removesuffix("_in_two")
        kind = {"points": "points", "counts": "points", "track": "track"}.get(name, "other")
        kinds[f"demo {kind}"].append(question.request)
    return kinds


def measure_side(emit: harness.Emit, options: Mapping[str, Any]) -> None:
    """One process: kind → answers, tokens, steps, drafted, accepted, decode seconds."""
    from molmo_edge import CountResult, EdgeVLM

    model = options["model"]
    with EdgeVLM(
        model, speculation=options["speculation"], dtype="float32", max_model_len=2048,
        kv_cache_memory_gb=0.5, engine_args={"disable_log_stats": False},
    ) as vlm:  # fmt: skip
        emit("environment", dict(vlm.environment))
        emit("async_scheduling", vlm.in_engine_thread(async_scheduling))
        asked = requests(model)
        vlm.batch([one[0] for one in asked.values()])  # warm
        for kind, each in asked.items():
            before, tokens, seconds, texts = vlm.in_engine_thread(drafts), 0, 0.0, []
            for request in each:
                (answer,) = vlm.batch([request])
                answer = answer.points if isinstance(answer, CountResult) else answer
                answer = getattr(answer, "result", answer)
                texts.append(answer.text)
                tokens += len(answer.token_ids) - 1
                seconds += answer.metrics.e2e_s - answer.metrics.ttft_s
            drafted, accepted = (
                b - a for a, b in zip(before, vlm.in_engine_thread(drafts), strict=True)
            )
            emit(kind, {"answers": len(each), "tokens": tokens, "steps": tokens - accepted,
                        "drafted": drafted, "accepted": accepted, "seconds": seconds,
                        "texts": texts})  # fmt: skip


def async_scheduling(engine: Any) -> bool:
    return bool(engine.core.vllm_config.scheduler_config.async_scheduling)


def drafts(engine: Any) -> tuple[float, float]:
    """Drafted and accepted tokens since the start."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    values = {metric.name: getattr(metric, "value", 0) for metric in get_metrics_snapshot()}
    names = ("draft_tokens", "accepted_tokens")
    drafted, accepted = (values.get(f"vllm:spec_decode_num_{name}", 0) for name in names)
    return drafted, accepted


def evaluate(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Kind → side → steps, tokens per step, acceptance and decode speed against off."""
    out: dict[str, Any] = {}
    for kind in TITLES:
        speeds = {
            s: [one[s][kind]["tokens"] / one[s][kind]["seconds"] for one in starts]
            for s in starts[0]
        }
        texts = [one[side][kind]["texts"] for one in starts for side in one]
        out[kind] = {"equal_answers": all(text == texts[0] for text in texts)}
        for side in starts[0]:
            last = starts[-1][side][kind]
            out[kind][side] = {
                "steps_per_answer": last["steps"] / last["answers"],
                "tokens_per_step": last["tokens"] / last["steps"],
                "acceptance": last["accepted"] / last["drafted"] if last["drafted"] else None,
                "decode_tps": harness.paired_ratio(speeds[side], speeds["off"]),
            }
    return out


def run(starts: int, threads: int, names: Sequence[str] = tuple(SIDES)) -> dict[str, Any]:
    measured = []
    with tempfile.TemporaryDirectory(prefix="molmo-edge-speculation-") as directory:
        train(Path(directory))
        for start in range(starts):
            order = names if start % 2 == 0 else names[::-1]
            sides: dict[str, Any] = {side: {} for side in names}
            for side in order:
                for model in (directory, "demo"):
                    options = {"model": model, "speculation": SIDES[side]}
                    child = harness.run_child(
                        __file__, "side", options, limit_s=LIMIT_S, threads=threads
                    )
                    if child["status"] != "ok":
                        raise BenchmarkError(f"{side} was not measured: {child['error']}")
                    sides[side] |= child["values"]
            measured.append(sides)
            harness.progress(f"start {start + 1} of {starts}")
    return harness.result(
        "speculation",
        settings={"starts": starts, "threads": threads, "repeats": REPEATS, "scenes": SCENES},
        async_scheduling={side: one["async_scheduling"] for side, one in measured[-1].items()},
        result=evaluate(measured),
        starts=[
            {side: {kind: {k: v for k, v in one[kind].items() if k != "texts"} for kind in TITLES}
             for side, one in sides.items()}
            for sides in measured
        ],
    )  # fmt: skip


def markdown(figures: Mapping[str, Any], *, speeds: bool = True) -> str:
    rows = []
    for kind, sides in figures.items():
        for side in ("ngram", "format"):
            if side not in sides:
                continue
            one = sides[side]
            rows.append([
                TITLES[kind], f"`{side}`", number(sides["off"]["steps_per_answer"], 1),
                number(one["steps_per_answer"], 1), number(one["tokens_per_step"], 2),
                percent(one["acceptance"]), harness.interval_text(one["decode_tps"], 2),
                harness.interval_text(sides["again"]["decode_tps"], 2),
            ])  # fmt: skip
    heads = ["", "speculation", "steps per answer, off", "steps per answer", "tokens per step",
             "accepted", "decode of off's", "floor"]  # fmt: skip
    columns = len(heads) if speeds else len(heads) - 2
    return table(heads[:columns], [row[:columns] for row in rows])


def main() -> None:
    harness.serve_child({"side": measure_side})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="rounds of fresh processes")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine; 0: vLLM's choice")
    parser.add_argument(
        "--without-ngram", action="store_true", help="it takes minutes on some CPUs"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    names = [side for side in SIDES if side != "ngram" or not arguments.without_ngram]
    document = run(arguments.starts, arguments.threads, names)
    print(markdown(document["result"]))
    harness.write(document, arguments.output)
    sys.exit(0 if all(one["equal_answers"] for one in document["result"].values()) else 1)


if __name__ == "__main__":
    harness.start(main)
