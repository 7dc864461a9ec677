"""``python -m molmo_edge.bench``, also ``molmo-edge bench``.

Without arguments it measures the three standard cases on the stub (random weights, any machine).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from molmo_edge.bench import cases as case_set
from molmo_edge.bench import document as documents
from molmo_edge.bench import drift as drifts
from molmo_edge.bench import report, suite, tables
from molmo_edge.bench.measure import Bench, Load, RunOptions
from molmo_edge.bench.target import Target
from molmo_edge.cli.common import Commands, ConfigOption, ModelOption, console, messages
from molmo_edge.errors import BenchmarkError

N = TypeVar("N", int, float)

app = typer.Typer(
    name="bench",
    cls=Commands,
    help="Measure speed, steadiness and ceilings; compare and report results.",
    invoke_without_command=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """``640x480,1280x960`` as (width, height) pairs in pixels."""
    sizes = []
    for part in filter(None, (text or "").split(",")):
        match = re.fullmatch(r"\s*([1-9]\d{0,4})\s*x\s*([1-9]\d{0,4})\s*", part)
        if match is None:
            raise BenchmarkError("--sizes must look like 640x480,1280x960 (width x height)")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)


def parse_numbers(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """``1,2,4`` as numbers."""
    try:
        return tuple(kind(part) for part in (text or "").split(",") if part.strip())
    except ValueError as exc:
        raise BenchmarkError(f"{option} must be numbers separated by commas, like 1,2,4") from exc


Form = Literal["table", "md", "csv", "json", "jsonl"]
FormOption = Annotated[Form, typer.Option("-o", "--format", help="On standard output.")]
ImageOption = Annotated[list[Path] | None, typer.Option(help="Your image; repeatable.")]
QuestionOption = Annotated[str | None, typer.Option(help="What to ask about --image.")]
OutputOption = Annotated[Path, typer.Option(help="Directory, or .json file, of the result.")]
Results = Annotated[list[Path], typer.Argument(help="Result documents (JSON).")]
DEFAULT_OUTPUT = Path("bench-results")


@app.callback()
def bench(
    ctx: typer.Context,
    model: ModelOption = None,
    config: ConfigOption = None,
    image: ImageOption = None,
    question: QuestionOption = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(suite.SCENARIOS)} or all; repeatable; default: report."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Minimum iterations of a row; default: 10.")
    ] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Maximum; default: twice.")] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(help="Stop adding iterations beyond the minimum after this many seconds."),
    ] = None,
    width: Annotated[
        float, typer.Option(help="Stop when the interval is ± this fraction of the mean.")
    ] = 0.02,
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens of a request.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos/--stop-at-eos", help="Default: only random weights ignore it."),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    sizes: Annotated[str | None, typer.Option(help="Sweep image sizes: 640x480,1280x960.")] = None,
    sweep_crops: Annotated[str | None, typer.Option(help="Sweep max_crops: 1,4,12.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of throughput.")] = "1,2,4,8",
    users: Annotated[str, typer.Option(help="Users of concurrency.")] = "1,2,4,8",
    rates: Annotated[str | None, typer.Option(help="Open-loop requests per second.")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of camera.")] = 10.0,
    starts: Annotated[int, typer.Option(help="Cold starts with disk caches present.")] = 2,
    load_format: Annotated[
        str | None, typer.Option(help="dummy: random weights of the model's shape.")
    ] = None,
    max_crops: Annotated[int | None, typer.Option(help="Crops of an image, engine-wide.")] = None,
    precision: Annotated[str | None, typer.Option()] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    max_model_len: Annotated[int | None, typer.Option()] = None,
    max_num_seqs: Annotated[int | None, typer.Option()] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile.")] = None,
    label: Annotated[str | None, typer.Option(help="Heading of this run in comparisons.")] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    form: FormOption = "table",
) -> None:
    """Run scenarios and write a JSON document and a Markdown page."""
    if ctx.invoked_subcommand is not None:
        return
    names = scenario or ["report"]
    suite.choose(names)
    settings = {
        "load_format": load_format,
        "max_crops": max_crops,
        "precision": precision,
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "profile": profile,
        "seed": seed,
    }
    target = Target.choose(model, config, settings)
    options = RunOptions.choose(
        target.random_weights,
        iterations=iterations,
        max_iterations=max_iterations,
        time_limit_s=time_limit,
        width=width,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    load = Load(
        batches=parse_numbers(batches, "--batches", int),
        users=parse_numbers(users, "--users", int),
        rates=parse_numbers(rates, "--rates", float),
        fps=fps,
        starts=starts,
    )
    chosen = case_set.own(image, question) if image else case_set.standard()
    crops = parse_numbers(sweep_crops, "--sweep-crops", int)
    chosen = case_set.sweep(chosen, parse_sizes(sizes), crops)
    name = label or target.name
    path = documents.result_path(output, name.rstrip("/").rsplit("/", 1)[-1])
    with messages.status("") as status:
        run = Bench(
            cases=chosen,
            options=options,
            load=load,
            label=label,
            save=lambda document: report.write(document, path),
            progress=status.update,
            sensors=True,
            start_command=target.start_command(image[0] if image else None),
        )
        document = suite.run(run, target.open, names)
    if form == "table":
        report.show(document, console)
    else:
        typer.echo(report.render(document, form), nl=False)
    messages.print(f"written: {path} and {path.with_suffix('.md').name}", soft_wrap=True)
    if any("interrupted" in note for note in document.notes):
        raise typer.Exit(130)
    if not document.complete:
        raise typer.Exit(1)


@app.command(name="compare")
def compare_results(
    results: Results,
    form: Annotated[Literal["table", "md"], typer.Option("-o", "--format")] = "table",
    strict: Annotated[
        bool, typer.Option(help="Exit status 1 if the results are not comparable.")
    ] = False,
) -> None:
    """Put results side by side and say what makes them not comparable."""
    from molmo_edge.bench.compare import compare

    comparison = compare([documents.load(path) for path in results])
    if form == "md":
        typer.echo(comparison.markdown(), nl=False)
    else:
        tables.show(comparison.blocks(), console)
    if strict and comparison.flags:
        raise typer.Exit(1)


@app.command(name="report")
def report_results(
    results: Results,
    output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("bench-report.html"),
    png: Annotated[Path | None, typer.Option(help="Directory for the plots as PNG.")] = None,
) -> None:
    """Make one self-contained HTML page, with plots (extra `plot`)."""
    from molmo_edge.bench import plots

    loaded = [documents.load(path) for path in results]
    documents.write_bytes(report.html(loaded).encode(), output)
    typer.echo(f"written: {output}")
    if png is not None:
        for name, figure in plots.figures(loaded).items():
            plots.png(figure, png / f"{name}.png")
            typer.echo(f"written: {png / name}.png")


@app.command(name="drift")
def drift_command(
    model: ModelOption = None,
    config: ConfigOption = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Reference first: auto,fp8,fp8_per_token_head.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Reference first: bf16,fp8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Reference first: float32,bfloat16.")] = None,
    image: ImageOption = None,
    question: QuestionOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each reference answer.")] = 64,
    min_equal: Annotated[
        float, typer.Option(help="Minimum fraction of equal greedy tokens.")
    ] = 0.95,
    max_kl: Annotated[float, typer.Option(help="Maximum mean KL in nats.")] = 0.05,
    output: OutputOption = DEFAULT_OUTPUT,
    form: Annotated[Literal["table", "md", "json"], typer.Option("-o", "--format")] = "table",
) -> None:
    """Same prompts under several configurations; exit status 1 if one drifts too far."""
    target = Target.choose(model, config, {})
    choices = {"kv_cache_dtype": kv_cache_dtype, "precision": precision, "dtype": dtype}
    chosen = drifts.variants(target, choices)
    path = documents.result_path(output, f"drift-{target.name.rsplit('/', 1)[-1]}")

    def save(document: drifts.DriftDocument) -> None:
        documents.write(document, path)
        documents.write_bytes(drifts.markdown(document).encode(), path.with_suffix(".md"))

    document = drifts.run(
        chosen,
        case_set.own(image, question) if image else drifts.prompts(),
        max_tokens=max_tokens,
        min_equal=min_equal,
        max_kl=max_kl,
        progress=lambda text: messages.print(f"answering with {text}", markup=False),
        save=save,
    )
    if form == "json":
        typer.echo(documents.dumps(document))
    elif form == "md":
        typer.echo(drifts.markdown(document), nl=False)
    else:
        tables.show(drifts.blocks(document), console)
    messages.print(f"written: {path} and {path.with_suffix('.md').name}", soft_wrap=True)
    if not all(one.passed for one in document.drifts):
        raise typer.Exit(1)


@app.command()
def schema(
    drift: Annotated[bool, typer.Option("--drift", help="Of drift results instead.")] = False,
) -> None:
    """Print the JSON Schema of a result document."""
    kind = drifts.DriftDocument if drift else documents.Document
    typer.echo(json.dumps(documents.schema(kind), indent=1))
