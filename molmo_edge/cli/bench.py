"""``python -m molmo_edge.bench``, also ``molmo-edge bench``.

Without arguments it measures the three standard cases on the stub (random weights, any machine).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from molmo_edge.bench import accuracy as accuracies
from molmo_edge.bench import cases as case_set
from molmo_edge.bench import document as documents
from molmo_edge.bench import drift as drifts
from molmo_edge.bench import report, scenarios, tables
from molmo_edge.bench.environment import Target, integer_or_text
from molmo_edge.bench.measure import Bench, RunOptions
from molmo_edge.cli.common import (
    Commands,
    ConfigOption,
    JsonOption,
    ProfileOption,
    messages,
    show,
    with_options,
    working,
    write,
)

app = typer.Typer(
    name="bench",
    cls=Commands,
    help="Measure speed, steadiness and ceilings; compare and report results.",
    invoke_without_command=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_integers(text: str) -> tuple[int, ...]:
    """``1,2,4`` as integers above 0."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise typer.BadParameter("must be integers above 0 separated by commas, like 1,2,4")
    return tuple(map(int, text.split(",")))


ImageOption = Annotated[list[Path] | None, Option(help="Your image; repeatable.")]
QuestionOption = Annotated[str | None, Option(help="What to ask about --image.")]
OutputOption = Annotated[Path, Option(help="Directory, or .json file, of the result.")]
Results = Annotated[list[Path], Argument(help="Result documents (JSON).")]
OUTPUT = Path("bench-results")


@dataclass(frozen=True)
class TargetOptions:
    """Which engine is measured."""

    model: Annotated[
        str | None,
        Option(
            help="Directory or hub name; by default from the settings, else stub or (answers) demo."
        ),
    ] = None
    config: ConfigOption = None
    load_format: Annotated[
        str | None, Option(help="dummy: random weights of the model's shape.")
    ] = None
    max_crops: Annotated[
        Any, Option(parser=integer_or_text, help="Crops of an image, engine-wide.")
    ] = None
    precision: Annotated[str | None, Option(help="Of the weights: auto, bf16, fp8, …")] = None
    kv_cache_dtype: Annotated[str | None, Option(help="auto, fp8, …")] = None
    dtype: Annotated[str | None, Option(help="Of computing: auto, bfloat16, float32, …")] = None
    max_model_len: Annotated[int | None, Option(help="Tokens of the longest request.")] = None
    max_num_seqs: Annotated[int | None, Option(help="Requests decoded together.")] = None
    profile: ProfileOption = None


@dataclass(frozen=True)
class MeasureOptions:
    """The fields of RunOptions that the command line has, None where the library chooses."""

    iterations: Annotated[int | None, Option(min=1, help="Minimum of a row; default: 10.")] = None
    max_iterations: Annotated[int | None, Option(help="Maximum of a row; default: twice that.")] = (
        None
    )
    time_limit_s: Annotated[
        float | None,
        Option("--time-limit", min=1, help="Seconds of a scenario, shared by its rows."),
    ] = None
    max_tokens: Annotated[int | None, Option(min=1, help="Output tokens of a request.")] = None
    temperature: Annotated[float, Option(min=0, max=2, help="0 is greedy.")] = 0.0
    ignore_eos: Annotated[
        bool | None,
        Option("--ignore-eos/--stop-at-eos", help="Default: only random weights ignore it."),
    ] = None
    batches: Annotated[Any, Option(parser=parse_integers, help="Sizes of throughput.")] = "1,2,4,8"
    users: Annotated[Any, Option(parser=parse_integers, help="Users of concurrency.")] = "1,2,4,8"
    fps: Annotated[float, Option(min=0.001, help="Frames per second of camera.")] = 10.0
    frames: Annotated[Any, Option(parser=parse_integers, help="Frames of each video.")] = "8"
    starts: Annotated[int, Option(min=1, help="Cold starts with disk caches present.")] = 2


@app.callback()
@with_options
def bench(
    ctx: typer.Context,
    engine: TargetOptions,
    measure: MeasureOptions,
    image: ImageOption = None,
    question: QuestionOption = None,
    scenario: Annotated[
        list[str] | None,
        Option(help=f"{', '.join(scenarios.SCENARIOS)} or all; repeatable; default: report."),
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="30 seconds after the start: rates of a small image.")
    ] = False,
    label: Annotated[str | None, Option(help="Heading of this run in comparisons.")] = None,
    output: OutputOption = OUTPUT,
    as_json: JsonOption = False,
) -> None:
    """Run scenarios and write a JSON document and a Markdown page."""
    if ctx.invoked_subcommand is not None:
        return
    names = scenarios.choose(scenario or ["report"])
    target = Target.choose(**vars(engine))
    chosen = case_set.own(image, question) if image else case_set.standard()
    if quick:
        chosen = (case_set.small(chosen[0]),)
    path = documents.result_path(output, label or target.name)
    with working("Starting …") as update:
        run = Bench(
            cases=chosen,
            options=RunOptions.choose(target.random_weights, quick, **vars(measure)),
            label=label,
            save=lambda result: documents.save(result, report.markdown(result), path),
            progress=update,
            sensors=True,
            start_command=target.start_command(image[0] if image else None),
        )
        document = scenarios.run(run, target.open, names)
    page = report.quick(document) if quick else report.terminal(document)
    output_result(document, page, path, as_json)
    if any("interrupted" in note for note in document.notes):
        raise typer.Exit(130)
    if not document.complete:
        raise typer.Exit(1)


def output_result(document: documents.Part, page: str, path: Path, as_json: bool) -> None:
    """Print a result, and where its files are."""
    write(documents.dumps(document)) if as_json else show(tables.Page(page))
    messages.print(f"written: {path} and {path.with_suffix('.md').name}", soft_wrap=True)


@app.command(name="compare")
def compare_results(
    results: Results,
    strict: Annotated[
        bool, Option("--strict", help="Exit status 1 if the results are not comparable.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put results side by side and say what makes them not comparable."""
    from molmo_edge.bench.compare import compare

    made = compare([documents.load(path) for path in results])
    if as_json:
        write(json.dumps(asdict(made), indent=1, ensure_ascii=False) + "\n")
    else:
        show(tables.Page(tables.page([made.table(), made.details()])))
    if strict and made.flags:
        raise typer.Exit(1)


@app.command(name="report")
def report_results(
    results: Results,
    output: Annotated[Path, Option(help="The HTML page.")] = Path("bench-report.html"),
) -> None:
    """Make one self-contained HTML page, with plots (extra `plot`)."""
    loaded = [documents.load(path) for path in results]
    documents.write(report.html(loaded), output)
    show(Text(f"written: {output}"))


@app.command(name="drift")
@with_options
def drift_command(
    engine: TargetOptions,
    image: ImageOption = None,
    question: QuestionOption = None,
    max_tokens: Annotated[int, Option(min=1, help="Tokens of each reference answer.")] = 64,
    min_equal: Annotated[
        float, Option(min=0, max=1, help="Minimum fraction of equal greedy tokens.")
    ] = 0.95,
    max_kl: Annotated[float, Option(min=0, help="Maximum mean KL in nats.")] = 0.05,
    output: OutputOption = OUTPUT,
    as_json: JsonOption = False,
) -> None:
    """Same prompts under several configurations; exit status 1 if one drifts too far.

    One option has several values, the reference first: --kv-cache-dtype auto,fp8.
    """
    chosen = Target.variants(**vars(engine))
    path = documents.result_path(output, f"drift-{next(iter(chosen.values())).name}")
    document = drifts.run(
        chosen,
        case_set.own(image, question) if image else drifts.prompts(),
        max_tokens=max_tokens,
        min_equal=min_equal,
        max_kl=max_kl,
        progress=lambda text: messages.print(f"answering with {text}", markup=False),
        save=lambda result: documents.save(result, drifts.markdown(result), path),
    )
    output_result(document, drifts.markdown(document), path, as_json)
    if not all(one.passed for one in document.drifts):
        raise typer.Exit(1)


@app.command(name="accuracy")
@with_options
def accuracy_command(
    engine: TargetOptions,
    scenes: Annotated[int, Option(min=1, max=100_000, help="Scenes to ask about.")] = 200,
    seed: Annotated[int, Option(min=0, help="Of the scenes and the questions.")] = 0,
    strict: Annotated[bool, Option("--strict", help="Exit status 1 if a goal is missed.")] = False,
    output: OutputOption = OUTPUT,
    as_json: JsonOption = False,
) -> None:
    """Points, counts and answers about drawn scenes, against what is in them.

    One option may have several values, such as --kv-cache-dtype auto,fp8: a column for each.
    """
    chosen = Target.variants(**vars(engine))
    path = documents.result_path(output, f"accuracy-{next(iter(chosen.values())).name}")
    with working("Starting …") as update:
        document = accuracies.run(
            chosen,
            scenes=scenes,
            seed=seed,
            progress=update,
            save=lambda result: documents.save(result, accuracies.markdown(result), path),
        )
    output_result(document, accuracies.markdown(document), path, as_json)
    if strict and not all(one.passed for one in document.results):
        raise typer.Exit(1)
