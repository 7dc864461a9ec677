"""The network that is trained is Molmo 2, and what it is taught is true."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from molmo_edge.bench import scenes
from molmo_edge.models.molmo2.tiling import Tiling
from molmo_edge.points import parse_points
from molmo_edge.reference.molmo2 import ReferenceMolmo2
from molmo_edge.reference.molmo2_inputs import Molmo2Inputs

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("train_demo")


def test_the_trained_network_computes_what_the_reference_does(
    script: ModuleType, tmp_path: Path
) -> None:
    vocabulary = script.Vocabulary()
    model = script.Twin(3, vocabulary.numbers)
    with torch.no_grad():  # as stored
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    script.write(model, vocabulary, tmp_path)
    reference = ReferenceMolmo2.load(tmp_path)
    geometry = script.GEOMETRY
    rng = np.random.default_rng(0)
    rows = script.Rows(vocabulary, 0, script.Stage(0, batch=1))
    rows.drawings = script.Drawings(rng, 4, scenes.MOST)
    kinds = set()
    for _ in range(25):
        row = rows.row(rng)
        kinds.add((row.frames, len(row.drawn)))
        batch = rows.collate([row])
        with torch.no_grad():
            logits = model(batch)[0]
        seen = [pixels for _, pixels in row.drawn]
        crops = (
            importlib.import_module("demo_network").patches(torch.from_numpy(np.stack(seen)))
            if seen
            else None
        )
        if row.frames:
            window = geometry.frame_pooling
        else:  # the global view and the only crop are the same pixels
            window = Tiling(geometry, 1, 1).pooling
            crops = crops.repeat_interleave(2, 0) if seen else None
        step = geometry.n_patches * (1 if row.frames else 2)
        pooling = [np.where(window < 0, -1, window + i * step) for i in range(len(seen))]
        inputs = Molmo2Inputs(crops.numpy(), np.concatenate(pooling)) if seen else None
        branch, tokens = np.array(row.branch), np.array(row.tokens)
        learnt = 0
        for number in range(1, branch.max() + 1):
            chosen = (branch == 0) | (branch == number)
            expected = reference.logits(tokens[chosen], inputs)
            before = np.roll(np.array(row.weight)[chosen] > 0, -1)
            expected = expected[torch.from_numpy(before)]
            got = logits[learnt : learnt + len(expected)]
            assert torch.allclose(got, expected, atol=2e-4), (got - expected).abs().max()
            learnt += len(expected)
        assert learnt == len(logits)
    assert {(False, 1), (False, 2)} < kinds and any(frames for frames, _ in kinds)


def test_answers_that_are_taught_are_true(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    asker = script.Asker(rng)
    pointed = 0
    for _ in range(300):
        scene = scenes.random_scene(rng)
        question, answer = asker.ask([scene], ["1"], False)
        words = question.rstrip("?.").lower().replace("objects", "shapes").split()
        found = parse_points(answer)
        for point in found.points:
            near = [s for s in scene.shapes if abs(s.x - point.x) < 0.006 > abs(s.y - point.y)]
            assert len(near) == 1, (question, answer)
            assert {*words} & {f"{near[0].kind}", f"{near[0].kind}s", "shapes", "shape", "object"}
            assert not {*words} & ({*scenes.COLORS} - {near[0].color})
        pointed += len(found.points)
        assert found.stated_count in (None, len(found.points))
        if answer in ("Yes.", "No.") and question.startswith("Is there a"):
            kinds = [kind for kind in scenes.KINDS if kind in words]
            colors = [color for color in scenes.COLORS if color in words]
            if kinds or colors:
                there = scene.select(*(kinds or [None]), *(colors or [None]))
                assert (answer == "Yes.") == bool(there), question
    assert pointed > 100
