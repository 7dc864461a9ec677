"""How often a model is right about drawn scenes whose content is known.

Scenes and questions follow from a seed: every model and configuration answers the same ones.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from molmo_edge.bench import cases, environment, tables
from molmo_edge.bench.document import Environment, Part, now
from molmo_edge.bench.environment import Target
from molmo_edge.bench.scenes import COLORS, KINDS, Scene, Shape, random_clip, random_scene
from molmo_edge.bench.tables import UNKNOWN
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.points import CountResult
from molmo_edge.requests import Request
from molmo_edge.video import Video

HELD_OUT = 0x5CE7E5
"""The first number of every seed here; no training may have it."""
NEAR, NEAR_IN_CLIP = 0.03, 0.05
"""Largest distance of a point from the centre of its object, of the image's width."""
TIMES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Of a clip's frames, seconds."""
OPTIONS: Any = {"max_tokens": 256}
MEASURES = {
    "points": "objects found",
    "extra_points": "extra points, of all objects",
    "distance": "distance of those found, of the width",
    "counts": "counts right",
    "counts_0": "counts right, of none",
    "counts_1_4": "counts right, of 1 to 4",
    "counts_5_8": "counts right, of 5 to 8",
    "absent": "no point where nothing is",
    "yes_no": "yes or no right",
    "color": "colours right",
    "caption": "captions, F1",
    "points_in_two": "two images, objects found",
    "extra_points_in_two": "two images, extra points",
    "counts_in_two": "two images, counts right",
    "track": "clips, frames followed",
    "other": "no point in other images",
}
GOALS = {"points": 0.9, "extra_points": 0.05, "counts": 0.9, "yes_no": 0.95}
"""Of the demo model, at least; of extra points, at most."""

Selector = tuple[str | None, str | None]
Centre = tuple[float, float]


class Measure(Part):
    """``value`` is a fraction of ``of`` objects, questions or frames, null where there are none."""

    value: float | None = None
    of: int = 0


class Mistake(Part):
    question: str
    right: str
    answer: str


class Accuracy(Part):
    """One configuration; ``mistakes`` has the first five of each measure."""

    name: str
    passed: bool
    seconds: float
    environment: Environment
    measures: dict[str, Measure]
    mistakes: dict[str, list[Mistake]]


class AccuracyDocument(Part):
    """A whole accuracy result: the same questions to every configuration."""

    format: Literal["molmo-edge-accuracy"] = "molmo-edge-accuracy"
    version: Literal[1] = 1
    created: str
    scenes: int
    seed: int
    goals: dict[str, float] = Field(default_factory=lambda: dict(GOALS))
    results: list[Accuracy] = Field(default_factory=list)


class Question(NamedTuple):
    """A question, the measure it belongs to, and what is right.

    That is, by measure, a number, a word, pairs of colour and kind, nothing, or for each image or
    frame its (width, height) and the centres of the shapes, as fractions of these.
    """

    measure: str
    request: Request[Any]
    right: Any

    @property
    def text(self) -> str:
        return f"{self.request.verb}: {self.request.text}"


def label(selector: Selector, plural: bool) -> str:
    """A (kind, colour) in words: "red circle", "circles", "red shapes"."""
    kind, color = selector
    return " ".join(filter(None, (color, (kind or "shape") + "s" * plural)))


def choose(
    rng: np.random.Generator, scenes: Sequence[Scene], least: int, most: int = 99
) -> Selector | None:
    """A (kind, colour) of `least` to `most` shapes; each number that occurs is equally likely."""
    by_number = defaultdict(list)
    for kind in (None, *KINDS):
        for color in (None, *COLORS):
            number = sum(len(scene.select(kind, color)) for scene in scenes)
            # A kind and a colour of which neither is there are too easy.
            near = any(scene.select(kind) or scene.select(None, color) for scene in scenes)
            if least <= number <= most and (near or None in (kind, color)):
                by_number[number].append((kind, color))
    if not by_number:
        return None
    selectors = by_number[int(rng.choice(list(by_number)))]
    return selectors[rng.integers(len(selectors))]


def questions(scenes: int, seed: int) -> Iterator[Question]:
    """The questions of an evaluation, drawn as they are needed."""
    last = None
    for number in range(scenes):
        rng = np.random.default_rng((HELD_OUT, seed, number))
        scene = random_scene(rng)
        image = scene.draw()
        yield from _point_and_count(rng, [scene], [image])
        yield from _about(rng, scene, image)
        if last is not None and number % 2:
            yield from _point_and_count(rng, [last[0], scene], [last[1], image], "_in_two")
        if number % 4 == 0:
            yield _track(random_clip(rng, TIMES))
        last = scene, image
    for image in _other_images():
        for asked in ("red circle", "green stars", "yellow square", "purple triangles"):
            yield Question("other", Request.point(image, asked, **OPTIONS), None)


def _point_and_count(
    rng: np.random.Generator, scenes: list[Scene], images: list[Image.Image], suffix: str = ""
) -> Iterator[Question]:
    there = choose(rng, scenes, 1)
    counted = (there if rng.random() < 0.8 else None) or choose(rng, scenes, 0, 0)
    if counted is not None:
        number = sum(len(scene.select(*counted)) for scene in scenes)
        request = Request.count(images, label(counted, True), **OPTIONS)
        yield Question(f"counts{suffix}", request, number)
    if there is not None:
        right = [(scene.size, _centres(scene.select(*there))) for scene in scenes]
        asked = label(there, sum(len(centres) for _, centres in right) > 1)
        yield Question(f"points{suffix}", Request.point(images, asked, **OPTIONS), right)


def _about(rng: np.random.Generator, scene: Scene, image: Image.Image) -> Iterator[Question]:
    there, missing = choose(rng, [scene], 1), choose(rng, [scene], 0, 0)
    if missing is not None:
        asked = label(missing, bool(rng.integers(2)))
        yield Question("absent", Request.point(image, asked, **OPTIONS), None)
    if there is not None and missing is not None:
        for selector, right in ((there, "yes"), (missing, "no")):
            text = f"Are there any {label(selector, True)}?"
            if None not in selector:
                article = "an" if selector[1] == "orange" else "a"
                text = f"Is there {article} {label(selector, False)} in this image?"
            yield Question("yes_no", Request(image, text, **OPTIONS), right)
    for shape in scene.shapes:
        if len(scene.select(shape.kind)) == 1:
            request = Request(image, f"What color is the {shape.kind}?", **OPTIONS)
            yield Question("color", request, shape.color)
    if scene.shapes:
        pairs = {(shape.color, shape.kind) for shape in scene.shapes}
        yield Question("caption", Request.caption(image, "short", **OPTIONS), pairs)


def _track(clip: Sequence[Scene]) -> Question:
    """About the first shape, which moves."""
    mover = clip[0].shapes[0]
    video = Video([scene.draw() for scene in clip], timestamps=TIMES)
    request = Request.track(video, label((mover.kind, mover.color), False), **OPTIONS)
    return Question("track", request, [(scene.size, _centres(scene.shapes[:1])) for scene in clip])


def _centres(shapes: Sequence[Shape]) -> list[Centre]:
    return [(round(shape.x, 4), round(shape.y, 4)) for shape in shapes]


def _other_images() -> list[Image.Image]:
    """Images that are no drawn scenes, without the shapes that are asked about."""
    noise = np.random.default_rng(HELD_OUT).integers(0, 256, (240, 320, 3), np.uint8)
    page = Image.new("RGB", (320, 240), "white")
    for y in range(20, 220, 24):
        ImageDraw.Draw(page).text((20, y), "A page of text has no shapes.", "black", font_size=18)
    shipped = [case.image for case in cases.standard() if case.image is not None]
    return [*shipped, shipped[0].crop((0, 0, 300, 300)), Image.fromarray(noise), page]


def score(question: Question, answer: Any) -> dict[str, tuple[float, float]]:
    """Measure → what the answer of `EdgeVLM` reaches, and of how much."""
    name, right = question.measure, question.right
    if name.startswith("counts"):
        point = (answer.number == right, 1)
        group = "0" if right == 0 else "1_4" if right < 5 else "5_8"
        return {name: point} if "two" in name else {name: point, f"counts_{group}": point}
    if name.startswith("points"):
        found: list[float] = []
        for index, (size, centres) in enumerate(right):
            points = [point for point in answer.points if (point.image_index or 0) == index]
            # No point is near two shapes: they are further apart.
            found += [one for one in _nearest(points, centres, size) if one <= NEAR]
        total = sum(len(centres) for _, centres in right)
        scores: dict[str, tuple[float, float]] = {
            name: (len(found), total),
            f"extra_{name}": (len(answer.points) - len(found), total),
        }
        return scores if "two" in name else {**scores, "distance": (sum(found), len(found))}
    if name == "track":
        track = next(iter(answer.tracks.values()), ())  # one object is asked for
        followed = 0
        for t, (size, centres) in zip(TIMES, right, strict=True):
            points = [point for point in track if abs(point.time_s - t) < 0.25]
            followed += _nearest(points, centres, size)[0] <= NEAR_IN_CLIP
        return {name: (followed, len(TIMES))}
    words = re.findall(r"\w+", answer.text.lower())
    if name == "caption":
        pairs = {(color, noun.removesuffix("s")) for color, noun in itertools.pairwise(words)}
        pairs = {(color, kind) for color, kind in pairs if color in COLORS and kind in KINDS}
        return {name: (2 * len(pairs & right), len(pairs) + len(right))}
    if name == "yes_no":
        return {name: (words[:1] == [right], 1)}
    if name == "color":
        return {name: (COLORS.keys() & words == {right}, 1)}
    return {name: (not answer.points, 1)}


def _nearest(
    points: Sequence[Any], centres: Sequence[Centre], size: tuple[int, int]
) -> list[float]:
    """Distance from each centre to the nearest point, of the width; 1 without any."""
    width, height = size
    return [
        min((math.hypot(p.x - x, (p.y - y) * height / width) for p in points), default=1.0)
        for x, y in centres
    ]


def evaluate(
    vlm: Any, name: str, asked: Iterator[Question], progress: Callable[[str], object]
) -> Accuracy:
    """Accuracy in the questions that the engine supports; raises the error of a failed request."""
    began, numbers = time.monotonic(), itertools.count()
    waiting: dict[int, Question] = {}
    totals = {measure: np.zeros(2) for measure in MEASURES}
    mistakes: dict[str, list[Mistake]] = defaultdict(list)

    def requests() -> Iterator[Request[Any]]:
        for question in asked:
            request = question.request
            needed = [request.verb]
            needed += ["images"] if isinstance(request.image, list) and request.image[1:] else []
            needed += ["video"] if request.video is not None else []
            if all(map(vlm.supports, needed)):
                waiting[next(numbers)] = question
                yield request

    for number, answer in vlm.iter_batch(requests()):
        if isinstance(answer, MolmoEdgeError):
            raise answer
        progress(f"{name}: {number + 1} questions")
        question = waiting.pop(number)
        text = (answer.points if isinstance(answer, CountResult) else answer).text
        mistake = Mistake(question=question.text, right=str(question.right), answer=text)
        for measure, (reached, of) in score(question, answer).items():
            totals[measure] += reached, of
            wrong = reached > 0 if "extra" in measure else reached < of
            if wrong and measure != "distance" and len(mistakes[measure]) < 5:
                mistakes[measure].append(mistake)
    measures = {
        measure: Measure(value=reached / of if of else None, of=int(of))
        for measure, (reached, of) in totals.items()
    }
    known = [(name, value) for name in GOALS if (value := measures[name].value) is not None]
    return Accuracy(
        name=name,
        passed=all(
            (value <= GOALS[goal]) if "extra" in goal else value >= GOALS[goal]
            for goal, value in known
        ),
        seconds=time.monotonic() - began,
        environment=environment.of(vlm),
        measures=measures,
        mistakes=mistakes,
    )


def run(
    chosen: Mapping[str, Target],
    *,
    scenes: int = 200,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
    save: Callable[[AccuracyDocument], object] = lambda document: None,
) -> AccuracyDocument:
    """Accuracy of every configuration, saved after each; raises what an engine or request does."""
    document = AccuracyDocument(created=now(), scenes=scenes, seed=seed)
    for name, target in chosen.items():
        progress(f"starting {name}")
        with target.open(True) as vlm:  # with prefix cache: an image has several questions
            document.results.append(evaluate(vlm, name, questions(scenes, seed), progress))
        save(document)
    return document


LEGEND = (
    f"found: a point within {NEAR:.0%} of the width of the object's centre; followed: within "
    f"{NEAR_IN_CLIP:.0%}; captions: the named pairs of colour and shape against those there"
)


def markdown(document: AccuracyDocument) -> str:
    models = {result.environment.model.name or UNKNOWN for result in document.results}
    software = environment.software_line(document.results[0].environment)
    verdicts = [
        f"{result.name}: goals {'reached' if result.passed else 'MISSED'}, {result.seconds:.0f} s"
        for result in document.results
    ]
    return tables.page(
        [
            f"# Accuracy of {tables.escape(', '.join(sorted(models)))} on drawn scenes",
            tables.items([f"{document.scenes} scenes of seed {document.seed}", software]),
            table(document),
            tables.items([*verdicts, LEGEND]),
        ]
    )


def table(document: AccuracyDocument) -> str:
    """The measures, of how many, the goals, and a column for each configuration."""
    heads = ("", "of", "goal", *(result.name for result in document.results))
    lines = []
    for name, title in MEASURES.items():
        measures = [result.measures.get(name, Measure()) for result in document.results]
        of, goal = max(measure.of for measure in measures), document.goals.get(name)
        bound = f"at {'most' if 'extra' in name else 'least'} "
        wanted = UNKNOWN if goal is None else bound + tables.percent(goal)
        lines.append([title, str(of), wanted, *(tables.percent(one.value, 1) for one in measures)])
    return tables.table(heads, lines, keep=len(heads))
