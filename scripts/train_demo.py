"""Train the demo model: a small Molmo 2 that knows drawn scenes, and write its checkpoint.

    python scripts/train_demo.py molmo_edge/models/demo

Plain torch, float32, seeded; no data but what it draws. The network (`demo_network`) computes what
the reference implementation computes. Beside the loss of the answers' tokens it learns, from heads
that are not kept, what the vision tower and the pooled features see where: without them it takes
many times longer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo_network import GEOMETRY, NEAR, PROCESSING, SIDE, TEXT_SIZES, Twin, config
from demo_questions import ABOUT, STEP, Asker, coordinate, other_image, texts
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from molmo_edge.bench import accuracy, scenes
from molmo_edge.bench.environment import Target
from molmo_edge.bench.scenes import COLORS, KINDS, Scene
from molmo_edge.bench.tables import percent
from molmo_edge.models.hub import DIGESTS
from molmo_edge.models.molmo2 import synthetic
from molmo_edge.models.molmo2.config import ImageIds
from molmo_edge.models.molmo2.image_processor import frame_patches
from molmo_edge.models.molmo2.prompts import frame_tokens, image_tokens
from molmo_edge.models.molmo2.tiling import Tiling

Pixels = npt.NDArray[np.uint8]

LENGTH = 256
"""Tokens of a row: its images, then as many questions about them as fit."""
CARD = """\
---
license: apache-2.0
---
# The demo model of molmo_edge

A Molmo 2 of 2.6 million parameters that knows drawn scenes: circles, squares, triangles and stars
in red, orange, yellow, green, blue, purple, black and white, up to eight on a plain, graded or
noisy background. It points, counts, answers yes/no and colour questions, describes a scene in a
sentence, takes two images, and tracks shapes in a clip of up to eight frames of which one moves. It
answers anything else with a sentence that says what it is; what it says of other images means
nothing.

The files are an ordinary Molmo 2 checkpoint of the hub's layout (Qwen 3 text model) with images of
140 pixels, one crop, and a vocabulary of its own, in which each coordinate is one token, in steps
of 5 thousandths. Made by `python scripts/train_demo.py`: plain torch, seed {seed}, {steps} steps,
{minutes:.0f} minutes on two CPU cores; no data but drawings.

`molmo-edge bench accuracy --scenes {scenes}`, scenes it was not trained on, greedy:

| | | of |
|---|---|---|
{table}
"""
# For programs that take the prompt's form from the checkpoint; molmo_edge does not.
CHAT_TEMPLATE = """\
{%- set n = namespace(images=0, seen=0) -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == "image" -%}{%- set n.images = n.images + 1 -%}
{%- endfor -%}{%- endfor -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}
{%- set n.seen = n.seen + 1 -%}
{{ "Image " ~ n.seen if n.images > 1 }}<|image|>
{%- elif part.type == "video" -%}<|video|>
{%- endif -%}{%- endfor -%}{%- endfor -%}
{%- for message in messages -%}
{{ " " if message.role == "assistant" }}<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}
{%- else -%}
{{ message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ") }}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True)
class Stage:
    """What is learnt until a step: at first to see, then to answer about more and more.

    Attributes:
        until: the step.
        batch: rows of a step.
        most: shapes of a scene.
        see_only: rows are single scenes without questions; `single`: with questions.
    """

    until: int
    batch: int = 24
    most: int = scenes.MOST
    see_only: bool = False
    single: bool = False


ROUNDS = (4400, 5400)
"""Steps at which the rate of learning has fallen to nothing."""
STAGES = (
    Stage(600, batch=64, see_only=True),
    Stage(760, most=1, single=True),
    Stage(1100, most=3, single=True),
    Stage(2000, single=True),
    *map(Stage, ROUNDS),
)


class Vocabulary:
    """The tokenizer, from the texts that can be asked and answered: a token for each word of them.

    Whatever else a user writes is spelled in bytes.
    """

    def __init__(self) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        split = ByteLevel(add_prefix_space=False)
        pieces = {piece for text in texts() for piece, _ in split.pre_tokenize_str(text)}
        numbers = [f"Ġ{value:03d}" for value in range(0, 1000, STEP)]
        self.words = [*sorted(pieces | {*"0123456789"}), *numbers]
        vocab = synthetic.vocabulary(self.words)
        rows = int(TEXT_SIZES["vocab_size"])
        assert len(vocab) + len(synthetic.SPECIAL) <= rows, len(vocab)
        self.tokenizer = synthetic.tokenizer(
            vocab, synthetic.SPECIAL, rows, [*synthetic.IMAGE_TOKENS]
        )
        self.numbers = torch.tensor([vocab[number] for number in numbers])
        self.end = self.tokenizer.token_to_id("<|im_end|>")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass
class Row:
    """One sequence of `LENGTH` tokens: images, then questions that do not see each other.

    Attributes:
        branch: of each token: 0 of the images, then the number of its question.
        weight: of the token in the loss: 0 if it is no part of an answer; those of long answers
            count less.
        drawn: scenes, None for what is no scene, and their pixels; `frames`: they are a clip's.
    """

    tokens: list[int]
    position: list[int]
    branch: list[int]
    weight: list[float]
    drawn: list[tuple[Scene | None, Pixels]]
    frames: bool


class Drawings:
    """Scenes and their pixels; each is used a few times, mirrored, before it is replaced."""

    USES = 4

    def __init__(self, rng: np.random.Generator, size: int, most: int) -> None:
        self.rng, self.size, self.most = rng, size, most
        self.kept: list[tuple[Scene, Pixels]] = []

    def next(self) -> tuple[Scene, Pixels]:
        at = int(self.rng.integers(self.size))
        if at >= len(self.kept) or self.rng.random() < 1 / self.USES:
            count = int(self.rng.integers(0, self.most + 1))
            scene = scenes.random_scene(self.rng, count, longest=(140, 640))
            image = scene.draw()
            if self.rng.random() < 0.4:  # smooth edges, as other programs draw them
                image = image.reduce(2)
            self.kept[at : at + 1] = [(scene, pixels(image))]
        scene, seen = self.kept[min(at, len(self.kept) - 1)]
        for axis, name in ((0, "y"), (1, "x")):
            if self.rng.random() < 0.5:
                seen = np.flip(seen, axis)
                shapes = (replace(s, **{name: 1 - getattr(s, name)}) for s in scene.shapes)
                scene = replace(scene, shapes=tuple(shapes))
        return scene, seen


def pixels(image: Image.Image) -> Pixels:
    """What the model sees of an image, (side, side, 3) uint8."""
    side = GEOMETRY.crop_patches
    values = frame_patches([np.asarray(image)], GEOMETRY)[0].view(side, side, 14, 14, 3)
    whole = values.transpose(1, 2).reshape(SIDE, SIDE, 3)
    return ((whole + 1) * 127.5).round().to(torch.uint8).numpy()


class Rows(IterableDataset[dict[str, Any]]):
    """Endless batches of rows, asked anew; each worker has its own."""

    def __init__(self, vocabulary: Vocabulary, seed: int, stage: Stage) -> None:
        self.vocabulary, self.seed, self.stage = vocabulary, seed, stage
        self.image_ids = ImageIds.from_config(config())
        whole = Tiling(GEOMETRY, 1, 1)
        self.image_part = image_tokens(whole, self.image_ids, PROCESSING).tolist()
        self.frame_part = frame_tokens(self.image_ids, PROCESSING).tolist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        self.drawings = Drawings(rng, 50 * self.stage.batch, self.stage.most)
        while True:
            yield self.collate([self.row(rng) for _ in range(self.stage.batch)])

    def row(self, rng: np.random.Generator) -> Row:
        asker, ids, part = Asker(rng), self.vocabulary.ids, rng.random()
        tokens, drawn, frames = [self.vocabulary.end], [], False
        if self.stage.see_only:
            return Row([], [], [], [], [self.drawings.next()], False)
        if part < 0.6 or self.stage.single:
            drawn = [self.drawings.next()]
            tokens += self.image_part
        elif part < 0.73:
            drawn = [self.drawings.next() for _ in range(3 if part < 0.62 else 2)]
            for i in range(len(drawn)):
                tokens += [*ids(f"Image {i + 1}"), *self.image_part]
        elif part < 0.9:
            frames, count = True, int(rng.integers(2, PROCESSING.max_frames + 1))
            gap = 0.5 if rng.random() < 0.6 else float(rng.integers(2, 21)) / 10
            times = [f"{i * gap:.1f}" for i in range(count)]
            clip = scenes.random_clip(rng, [float(t) for t in times])
            drawn = [(scene, pixels(scene.draw())) for scene in clip]
            for i, at in enumerate(times):
                tokens += [*ids(f"{' ' if i else ''}{at} "), *self.frame_part]
        elif part < 0.97:
            drawn = [(None, pixels(other_image(rng)))]
            tokens += self.image_part
        shown = [scene for scene, _ in drawn if scene]

        def ask() -> tuple[str, str]:
            if frames:
                return asker.ask_clip(shown, times)
            if shown:
                return asker.ask(shown, ["1", "2", "3"][: len(shown)], False)
            question, answer = asker.ask_other()
            return question, answer if drawn else ABOUT

        row = Row(
            tokens, [*range(len(tokens))], [0] * len(tokens), [0.0] * len(tokens), drawn, frames
        )
        first, before = len(tokens), ""
        for number in range(1, 100):
            question, answer = ask()
            asked = f"{before}<|im_start|>user\n{question}<|im_end|>\n"
            prompt = ids(f"{asked}<|im_start|>assistant\n")
            # Now and then a question that follows another; the blank is the chat template's.
            follows = rng.random() < 0.1
            before = f"{asked} <|im_start|>assistant\n{answer}<|im_end|>\n" if follows else ""
            learnt = [*ids(answer), self.vocabulary.end]
            both = [*prompt, *learnt]
            if len(row.tokens) + len(both) > LENGTH:
                break
            row.tokens += both
            row.position += range(first, first + len(both))
            row.branch += [number] * len(both)
            row.weight += [0.0] * len(prompt) + [len(learnt) ** -0.5] * len(learnt)
        return row

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if not self.stage.see_only:
            for name, padding in (("tokens", 0), ("position", 0), ("weight", 0.0)):
                lines = [getattr(row, name) for row in rows]
                padded = [line + [padding] * (LENGTH - len(line)) for line in lines]
                out[name] = torch.tensor(padded)
            out["answer"] = out["weight"] > 0
            # Padding sees itself and the images.
            branches = [[*row.branch, *range(len(row.branch) - LENGTH, 0)] for row in rows]
            out["branch"] = torch.tensor(branches)
        # Images first, then frames, each in the order of the rows.
        for name, is_clip in (("images", False), ("frames", True)):
            drawn = [one for row in rows if row.frames is is_clip for one in row.drawn]
            out[name] = torch.from_numpy(np.stack([seen for _, seen in drawn])) if drawn else None
            pool = GEOMETRY.frame_pool if is_clip else GEOMETRY.pool
            out[f"{name}_seen"] = what_is_seen([scene for scene, _ in drawn], pool)
        out["clip"] = torch.tensor([row.frames for row in rows])
        return out


def what_is_seen(shown: Sequence[Scene | None], pool: int) -> dict[str, torch.Tensor]:
    """What is to be seen: the shape that covers each patch, and that centred in each window.

    Of each: kind and colour (0 for none), and the centre's x and y in steps of coordinates.
    """
    n, side = len(shown), GEOMETRY.crop_patches
    windows = -(-side // pool)
    before = -side % pool // 2
    patches = np.zeros((n, side, side, 4), np.int64)
    cells = np.zeros((n, windows, windows, 4), np.int64)
    middle = (np.arange(side) + 0.5) / side
    for i, scene in enumerate(shown):
        for shape in scene.shapes if scene else ():
            kind, color = KINDS.index(shape.kind) + 1, [*COLORS].index(shape.color) + 1
            x, y = (int(coordinate(at)) // STEP for at in (shape.x, shape.y))
            width, height = scene.size
            across, down = np.meshgrid((middle - shape.x) * width, (middle - shape.y) * height)
            inside = across**2 + down**2 < (0.85 * shape.radius * min(width, height)) ** 2
            row, column = int(shape.y * side), int(shape.x * side)
            inside[row, column] = True
            patches[i][inside] = kind, color, x, y
            cells[i, (row + before) // pool, (column + before) // pool] = kind, color, x, y
    return {
        "patches": torch.from_numpy(patches).flatten(1, 2),
        "cells": torch.from_numpy(cells).flatten(1, 2),
    }


class Muon:
    """Momentum whose direction is orthogonalised (Newton-Schulz), for matrices inside the network.

    torch.optim.Muon computes in bfloat16, which a CPU without its instructions does very slowly.
    """

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        self.matrices = matrices
        self.momentum = [torch.zeros_like(m) for m in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        alike: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(self.matrices):
            if matrix.grad is not None:
                alike.setdefault(matrix.shape, []).append(i)
        for shape, chosen in alike.items():  # matrices of one shape at once
            grads = torch.stack([self.matrices[i].grad for i in chosen])
            momenta = torch.stack([self.momentum[i] for i in chosen]).lerp_(grads, 0.05)
            x = grads.lerp(momenta, 0.95)
            x = x.mT if shape[0] > shape[1] else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            x = x.mT if shape[0] > shape[1] else x
            for i, momentum, way in zip(chosen, momenta, x, strict=True):
                self.momentum[i].copy_(momentum)
                self.matrices[i].mul_(1 - 0.02 * rate)
                self.matrices[i].sub_(way, alpha=rate * max(1, shape[0] / shape[1]) ** 0.5)


class Trainer:
    """Optimisers, schedule, and a state that can be saved and gone on from."""

    def __init__(self, model: Twin, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.step, self.seconds = 0, 0.0
        inside = [
            parameter for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and ("block" in name or "pooling" in name or "projector" in name)
        ]  # fmt: skip
        known = {id(parameter) for parameter in inside}
        self.muon = Muon(inside)
        others = [p for p in model.parameters() if id(p) not in known]
        self.adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def learn(self, batch: Mapping[str, Any], rate: float, see_only: bool) -> dict[str, float]:
        if see_only:
            loss = self.model.see(batch)[1]
            told = {"seen": loss.item()}
        else:
            logits, seen_part = self.model(batch)
            answer = batch["answer"]
            answers = self.loss(logits, batch["tokens"][answer], batch["weight"][answer])
            loss = 2 * answers + 0.5 * seen_part
            told = {"answers": answers.item(), "seen": seen_part.item()}
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = 3e-3 * rate
        self.muon.step(0.02 * rate)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return told

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Of a coordinate, near ones count too."""
        logs, numbers = logits.log_softmax(-1), self.vocabulary.numbers
        number = targets - numbers[0]
        is_number = (number >= 0) & (number < len(numbers))
        words = -logs[~is_number].gather(1, targets[~is_number, None])[:, 0]
        near = -(logs[is_number][:, numbers] * NEAR[number[is_number]]).sum(1)
        total = words @ weight[~is_number] + near @ weight[is_number]
        return total / weight.sum()

    @torch.no_grad()
    def measure(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Shares of right tokens, each after the right ones before it."""
        logits, seen_part = self.model(batch)
        targets, numbers = batch["tokens"][batch["answer"]], self.vocabulary.numbers
        best = logits.argmax(-1)
        number = (targets >= numbers[0]) & (targets <= numbers[-1])
        words = [self.vocabulary.tokenizer.token_to_id(word) for word in ("Yes", "No")]
        polar = torch.isin(targets, torch.tensor(words))
        right = best == targets
        off = (best - targets).abs()[number] * STEP
        return {
            "loss": float(self.loss(logits, targets, batch["weight"][batch["answer"]])),
            "seen": float(seen_part),
            "words": float(right[~number].float().mean()),
            "yes/no": float(right[polar].float().mean()),
            "coordinates within 30": float((off <= 30).float().mean()),
            "median off": float(off.float().median()),
        }

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "momentum": self.muon.momentum,
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.muon.momentum = list(state["momentum"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]


def write(model: Twin, vocabulary: Vocabulary, directory: Path) -> None:
    """Write the checkpoint, in the hub's file layout."""
    synthetic.write_description(directory, config(), vocabulary.words)
    for name, changes in (
        ("preprocessor_config.json", {"max_crops": PROCESSING.max_crops,
                                      "overlap_margins": GEOMETRY.margin_patches}),
        ("video_preprocessor_config.json", {"num_frames": PROCESSING.max_frames}),
    ):  # fmt: skip
        stated = json.loads((directory / name).read_text(encoding="utf-8"))
        synthetic.write_json(directory, {name: {**stated, **changes}})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tensors = {name: model.w(name).detach().bfloat16() for name in model.names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    digests = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(directory.iterdir())
        if path.suffix in (".json", ".jinja", ".safetensors")
    ]
    (directory / DIGESTS).write_text("".join(digests))


def loader(rows: Rows) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(rows, batch_size=None, num_workers=1, prefetch_factor=4))


def rate_at(step: int) -> float:
    """Rises, stays, and falls to nothing at the end of each round."""
    end = next(end for end in ROUNDS if step < end)
    return min(0.5, (step + 1) / 100, (end - step) / end)


def listed(told: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in told.items())


def card(directory: Path, steps: int, minutes: float, seed: int) -> None:
    """Ask the checkpoint about held-out scenes and write its card."""
    document = accuracy.run({"demo": Target(str(directory))}, scenes=400)
    measures = document.results[0].measures
    lines = [
        f"| {title} | {percent(measures[name].value, 1)} | {measures[name].of} |"
        for name, title in accuracy.MEASURES.items()
    ]
    text = CARD.format(
        steps=steps, minutes=minutes, seed=seed, scenes=document.scenes, table="\n".join(lines)
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    vocabulary = Vocabulary()
    trainer = Trainer(Twin(options.seed, vocabulary.numbers), vocabulary)
    # An interrupted training goes on from here.
    if (state := options.output.with_suffix(".state")).exists():
        trainer.load(torch.load(state))
    held_out = next(iter(Rows(vocabulary, options.seed + 1000, Stage(0, batch=64))))
    stage = batches = None
    while trainer.step < ROUNDS[-1]:
        began = time.monotonic()
        now = next(s for s in STAGES if trainer.step < s.until)
        if now != stage:
            stage, batches = now, loader(Rows(vocabulary, options.seed + trainer.step, now))
        rate = rate_at(trainer.step) * (2 if stage.see_only else 1)
        told = trainer.learn(next(batches), rate, stage.see_only)
        trainer.seconds += time.monotonic() - began
        if trainer.step % 20 == 0:
            print(f"{trainer.step}, {trainer.seconds:.0f} s: {listed(told)}", flush=True)
        if trainer.step % 200 == 0:
            print(f"held out: {listed(trainer.measure(held_out))}", flush=True)
            torch.save(trainer.state(), state)
            write(trainer.model, vocabulary, options.output)
    card(options.output, trainer.step, trainer.seconds / 60, options.seed)


if __name__ == "__main__":
    main()
