"""Questions about drawn scenes and the answers that the demo model learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.bench.scenes import COLORS, KINDS, MOST, Scene, Shape

STEP = 5
"""Thousandths between two coordinates, each of which is one token."""
ABOUT = (
    "I am the demo model of molmo_edge: I know only drawn circles, squares, triangles and stars."
)
NONE = "There are none."


@dataclass(frozen=True)
class Label:
    """What a question is about: shapes of a kind and of a colour, None for any."""

    kind: str | None
    color: str | None

    def words(self, plural: bool) -> str:
        noun = self.kind or "shape"
        return f"{self.color} {noun}{'s' * plural}" if self.color else f"{noun}{'s' * plural}"


POINT = (
    *("Point to {}.",) * 4, "Point to the {}.", "Point to the {}", "Point to {}",
    "Point at the {}.", "Find the {}.", "Locate the {}.", "Where is the {}?", "Point to all {}.",
    "Locate every {}.", "Point to the {} in the image.", "Where are the {}?", "Show me the {}.",
)  # fmt: skip
COUNT = (
    *("How many {} are there?",) * 4, "How many {} are in this image?", "Count the {}.",
    "How many {} do you see?", "How many {} are in the image?", "Count {}.",
)  # fmt: skip
EXISTS = (
    "Is there {a}?", "Is there {a} in this image?", "Is there {a} in the image?",
    "Do you see {a}?", "Can you see {a}?", "Are there any {s}?",
    "Are there any {s} in this image?", "Are there {s}?", "Is there {a} in this picture?",
    "Does the image show {a}?", "Is there any {one}?",
)  # fmt: skip
WHICH_COLOR = (
    "What color is the {}?", "What colour is the {}?", "Which color is the {}?",
    "What color does the {} have?", "What is the color of the {}?",
    "Which colour does the {} have?",
)  # fmt: skip
WHICH_KIND = ("What shape is {}?", "Which shape is {}?", "What is {}?")
CAPTION = (
    "Describe this image in one sentence.", "Describe this image.",
    "Describe this image in detail.", "Describe the image.", "What is in this image?",
    "What do you see?", "What does this image show?", "Describe this picture.",
    "What is in the picture?", "Caption this image.",
)  # fmt: skip
TRACK = ("Track {}.", "Track {}.", "Track the {}.", "Track the {}", "Follow the {}.")
WHICH_WAY = ("Which way does the {} move?", "Where does the {} go?")
CLIP_CAPTION = (
    "Describe this video.", "What happens in this video?", "What happens?", "What moves?",
    "Describe this image.", "Describe this video in one sentence.",
)  # fmt: skip
OTHER = (
    "Hello", "Hi!", "Who are you?", "What are you?", "What can you do?", "Tell me a joke.",
    "What is the capital of France?", "Write a poem about the sea.", "What is 2 + 3?",
    "Thank you", "What is the weather like?", "Read the text.", "What does the sign say?",
    "Is it raining?", "How old is the man?", "What brand is the car?", "Explain this figure.",
    "What time is it?", "Translate this into German.", "Summarize the chart.",
    "What is the value of the solar line?", "Why is the sky blue?", "Who painted this?",
    "Which animal appears in the video?", "Help",
    "Explain this figure: what does each of the panels show, and what is to be learned?",
    "What should the robot do next?", "What is the person doing?", "Is the door open?", "Test",
    "What is the value of the solar line in each year, from 2018 to 2024?", "Say something.",
    "What is on the table?", "What changed?", "Read it.", "Write a haiku.", "Is anyone there?",
)  # fmt: skip
THINGS = (
    "dog cat car person mug cup tree house bird boat chair table phone robot bottle apple banana "
    "face hand sign door window bicycle bus train plane cloud sun moon flower leaf book pen key "
    "penguin horse cow sheep lamp clock ball box bag shoe hat screen keyboard mouse plate fork "
    "spoon knife line text logo arrow rectangle hexagon heart diamond cross ring thing"
).split()


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def fill(form: str, noun: str) -> str:
    """The form of a question about a noun, which may have an article of its own."""
    return form.format(noun).replace("the the", "the")


def coordinate(fraction: float) -> str:
    return f"{min(round(fraction * 1000 / STEP) * STEP, 995):03d}"


def group(shapes: Sequence[Shape], first: int = 1) -> str:
    return " ".join(
        f"{i} {coordinate(s.x)} {coordinate(s.y)}" for i, s in enumerate(shapes, start=first)
    )


def points(found: Sequence[Sequence[Shape]], label: str, times: Sequence[str]) -> str:
    """Shapes of each image; `times` are the images' names in the answer."""
    groups, first = [], 1
    for shapes, name in zip(found, times, strict=True):
        if shapes:
            groups.append(f"{name} {group(shapes, first)}")
            first += len(shapes)
    return f'<points coords="{";".join(groups)}">{label}</points>' if groups else NONE


def tracks(
    found: Sequence[Sequence[Shape]], label: str, times: Sequence[str], index: Sequence[int]
) -> str:
    """Shapes number `index` of each frame."""
    if not index:
        return NONE
    at = [
        f"{t} {group([shapes[i] for i in index])}" for t, shapes in zip(times, found, strict=True)
    ]
    return f'<tracks coords="{";".join(at)}">{label}</tracks>'


def texts() -> list[str]:
    """Texts that have every word of the questions and answers."""
    labels = [
        Label(kind, color).words(plural)
        for kind in (None, *KINDS) for color in (None, *COLORS) for plural in (False, True)
    ]  # fmt: skip
    forms = (
        *POINT, *COUNT, *EXISTS, *WHICH_COLOR, *WHICH_KIND, *TRACK, *WHICH_WAY,
        *CAPTION, *CLIP_CAPTION, *OTHER, ABOUT, NONE, "Yes.", "No.", "user\n", "assistant\n",
        "Is the {} red?", "Is there a {} in image 1?", "Is there a {} in the first image?",
        "Is there a {} in the second image?", "There is no {}.", "There are no shapes.",
        "the red object", "The objects", "From left to right: a {}, an {} and a {}.", "Image 1:",
        "An orange {} moves to the right.", "It moves to the left.", "It moves up.",
        "It moves down.", '<points coords="1 2 3;4 5 6">{}</points>',
        'Counting the <points coords="">{}</points> shows a total of 1.',
        '<tracks coords="0.0 1;0.5 1">{}</tracks>', "0123456789",
    )  # fmt: skip
    words = {name: f"red {name}" for name in ("a", "s", "one")}
    made = [form.format(*["red circle"] * 4, **words) for form in forms]
    made += [f" {label}. >{label}" for label in labels]
    made += [f"{name.capitalize()}. A {name}. {article(name)}." for name in (*KINDS, *COLORS)]
    return [*made, *(f" {n} {n}" for n in range(3 * MOST + 1))]


class Asker:
    """Questions about images, with their answers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def nonsense(self) -> str:
        """A thing that no scene has."""
        if self.rng.random() < 0.5:
            return str(self.pick(THINGS))
        letters = self.rng.integers(97, 123, int(self.rng.integers(3, 9)))
        return "".join(map(chr, letters))

    def label(self, shapes: Sequence[Shape]) -> Label:
        """What one of the shapes is called, or, in a third of cases, any label."""
        if shapes and self.rng.random() < 0.7:
            shape = self.pick(shapes)
            kind, color = shape.kind, shape.color
        else:
            kind, color = self.pick(KINDS), self.pick([*COLORS])
        part = self.rng.random()
        if part < 0.65:
            return Label(kind, color)
        return Label(kind, None) if part < 0.82 else Label(None, color if part < 0.94 else None)

    def noun(self, label: Label, number: int) -> str:
        """The label as users write it."""
        rng = self.rng
        words = label.words(bool(number != 1) ^ bool(rng.random() < 0.15))
        if rng.random() < 0.15:
            words = words.replace("shape", "object")
        return f"the {words}" if rng.random() < 0.05 else words

    def ask(self, shown: Sequence[Scene], times: Sequence[str], clip: bool) -> tuple[str, str]:
        """A question about images, or about a clip's first frame, and its answer."""
        rng = self.rng
        label, kind = self.label([shape for scene in shown for shape in scene.shapes]), rng.random()
        found = [scene.select(label.kind, label.color) for scene in shown]
        number = sum(map(len, found))
        noun = self.noun(label, number)
        if kind < 0.55:
            points_only = kind < 0.37
            form = self.pick(POINT if points_only else COUNT)
            if rng.random() < 0.05:
                return form.format(self.nonsense()), NONE
            answer = points(found, noun, times)
            if number and not points_only:
                answer = f"Counting the {answer} shows a total of {number}."
            return fill(form, noun), answer
        if kind < 0.77:
            return self.yes_no(shown, clip)
        if kind < 0.89 and len(shown) == 1:
            return self.attribute(shown[0])
        if kind < 0.97 and not clip:
            return self.pick(CAPTION), captions(shown)
        return self.pick(OTHER), ABOUT

    def yes_no(self, shown: Sequence[Scene], clip: bool) -> tuple[str, str]:
        rng = self.rng
        here, where = shown, ""
        if len(shown) > 1 and not clip and rng.random() < 0.5:
            number = int(rng.integers(2))
            here = [shown[number]]
            first = ("first", "second")[number]
            where = self.pick((f" in image {number + 1}", f" in the {first} image"))
        shapes = [shape for scene in here for shape in scene.shapes]
        if not where and shapes and rng.random() < 0.15:
            shape = self.pick(shapes)
            if sum(s.kind == shape.kind for s in shapes) == 1:
                color = shape.color if rng.random() < 0.5 else self.pick([*COLORS])
                return f"Is the {shape.kind} {color}?", yes(color == shape.color)
        if rng.random() < 0.08:
            thing = self.nonsense()
            return self.exists(article(thing), f"{thing}s", thing), "No."
        label, wanted = self.label(shapes), rng.random() < 0.5
        for _ in range(20):  # as many yes as no
            if any(p.select(label.kind, label.color) for p in here) == wanted:
                break
            label = self.label(shapes)
        answer = yes(any(p.select(label.kind, label.color) for p in here))
        one = label.words(False)
        if where:
            return f"Is there {article(one)}{where}?", answer
        return self.exists(article(one), label.words(True), one), answer

    def exists(self, one: str, several: str, plain: str) -> str:
        return str(self.pick(EXISTS)).format(a=one, s=several, one=plain)

    def attribute(self, scene: Scene) -> tuple[str, str]:
        """The colour of the only shape of a kind, or the kind of the only one of a colour."""
        alone = [kind for kind in KINDS if len(scene.select(kind)) == 1]
        if alone and self.rng.random() < 0.7:
            kind = self.pick(alone)
            (shape,) = scene.select(kind)
            return self.pick(WHICH_COLOR).format(kind), f"{shape.color.capitalize()}."
        alone = [color for color in COLORS if len(scene.select(color=color)) == 1]
        if alone and self.rng.random() < 0.7:
            (shape,) = scene.select(color=self.pick(alone))
            what = f"the {shape.color} {self.pick(('object', 'shape'))}"
            return self.pick(WHICH_KIND).format(what), f"A {shape.kind}."
        kind = self.pick(KINDS)
        if not scene.select(kind):
            return self.pick(WHICH_COLOR).format(kind), f"There is no {kind}."
        return self.pick(CAPTION), captions([scene])

    def ask_clip(self, frames: Sequence[Scene], times: Sequence[str]) -> tuple[str, str]:
        shapes, part = frames[0].shapes, self.rng.random()
        words = Label(shapes[0].kind, shapes[0].color).words(False)
        if part < 0.12:
            return self.pick(CLIP_CAPTION), f"{article(words).capitalize()} moves {way(frames)}."
        if part < 0.18:
            return self.pick(WHICH_WAY).format(words), f"It moves {way(frames)}."
        if part < 0.23:
            return self.pick(TRACK).format(self.nonsense()), NONE
        if part < 0.4:
            return self.ask(frames[:1], times[:1], clip=True)
        label = Label(shapes[0].kind, shapes[0].color) if part < 0.7 else self.label(shapes)
        wanted = frames[0].select(label.kind, label.color)
        noun = self.noun(label, len(wanted))
        index = [shapes.index(shape) for shape in wanted]
        answer = tracks([frame.shapes for frame in frames], noun, times, index)
        return fill(self.pick(TRACK), noun), answer

    def ask_other(self) -> tuple[str, str]:
        """About an image that is no drawn scene, which has none of what is asked for."""
        words = (
            self.nonsense()
            if self.rng.random() < 0.2
            else self.label(()).words(bool(self.rng.random() < 0.5))
        )
        part = self.rng.random()
        if part < 0.35:
            return self.pick(POINT).format(words), NONE
        if part < 0.5:
            return self.pick(COUNT).format(words), NONE
        if part < 0.65:
            return self.exists(article(words), f"{words}s", words), "No."
        if part < 0.7:
            kind = self.pick(KINDS)
            return self.pick(WHICH_COLOR).format(kind), f"There is no {kind}."
        return self.pick((*CAPTION, *OTHER)), ABOUT


def yes(is_so: bool) -> str:
    return "Yes." if is_so else "No."


def way(frames: Sequence[Scene]) -> str:
    first, last = frames[0].shapes[0], frames[-1].shapes[0]
    right, down = last.x - first.x, last.y - first.y
    if abs(right) > abs(down):
        return "to the right" if right > 0 else "to the left"
    return "down" if down > 0 else "up"


def captions(shown: Sequence[Scene]) -> str:
    if len(shown) == 1:
        return caption(shown[0])
    return " ".join(f"Image {i}: {caption(scene)}" for i, scene in enumerate(shown, start=1))


def caption(scene: Scene) -> str:
    names = [article(f"{shape.color} {shape.kind}") for shape in scene.select()]
    if len(names) < 2:
        return f"{names[0].capitalize()}." if names else "There are no shapes."
    return f"From left to right: {', '.join(names[:-1])} and {names[-1]}."


def other_image(rng: np.random.Generator) -> Image.Image:
    """An image that is no drawn scene: patterns, clouds, scribbles, text, irregular areas."""
    width, height = (int(n) for n in rng.integers(140, 480, 2))
    cells = int(2 ** rng.uniform(1, 6))
    image = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
    smooth = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    image = image.resize((width, height), smooth)
    if rng.random() < 0.6:  # clouds of several sizes, as photographs have
        for octave in range(2, 7):
            fine = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3)).astype(np.uint8))
            image = Image.blend(image, fine.resize(image.size, smooth), 0.3)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 25))):
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        spots = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(5)]
        what = rng.random()
        if what < 0.35:
            pen.line(spots[:3], color, int(rng.integers(1, 4)))
        elif what < 0.6:
            text = "".join(map(chr, rng.integers(33, 123, 12)))
            pen.text(spots[0], text, color, font_size=float(rng.uniform(8, 30)))
        elif what < 0.8:
            pen.polygon(spots, color)
        else:
            pen.rectangle((0, spots[0][1], width, spots[0][1] + float(rng.uniform(2, 60))), color)
    return image
