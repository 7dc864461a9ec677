"""``python -m molmo_edge.bench``: how fast, how steady, how near the limit.

Without arguments it measures the three standard cases on the stub (random weights, any machine).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from molmo_edge.bench import ceilings, command, forms, terminal
from molmo_edge.bench.scenarios import Load
from molmo_edge.bench.suite import SCENARIOS, Suite, known
from molmo_edge.errors import BenchmarkError, MolmoEdgeError

app = typer.Typer(
    name="bench",
    help="Measure speed, steadiness and ceilings; compare and report results.",
    invoke_without_command=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


P = ParamSpec("P")
R = TypeVar("R")


class DriftForm(StrEnum):
    """Forms of a drift result on standard output."""

    table = "table"
    md = "md"
    json = "json"


class Form(StrEnum):
    """Forms of a result on standard output."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


def told(work: Callable[P, R]) -> Callable[P, R]:
    """Turn molmo_edge's errors into one line on standard error and exit status 2."""

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except MolmoEdgeError as exc:
            Console(stderr=True).print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from exc

    return wrapped


@app.callback()
@told
def bench(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="Model folder or name; default: stub.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A deployment, like configs/thor.toml.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Your picture; repeatable.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about --image.")] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SCENARIOS)} or all; repeatable; default: report."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Least iterations of a row; default: 10.")
    ] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Most; default: twice.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no row goes past its least number.")
    ] = None,
    width: Annotated[float, typer.Option(help="Stop when the interval is ± this share.")] = 0.02,
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens of a request.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos/--stop-at-eos", help="Default: only random weights ignore it."),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    sizes: Annotated[
        str | None, typer.Option(help="Sweep picture sizes: 640x480,1280x960.")
    ] = None,
    sweep_crops: Annotated[str | None, typer.Option(help="Sweep max_crops: 1,4,12.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of throughput.")] = "1,2,4,8",
    users: Annotated[str, typer.Option(help="Users of concurrency.")] = "1,2,4,8",
    rates: Annotated[str | None, typer.Option(help="Open-loop requests a second.")] = None,
    fps: Annotated[float, typer.Option(help="Frames a second of camera.")] = 10.0,
    starts: Annotated[int, typer.Option(help="Cold starts with disk caches present.")] = 2,
    load_format: Annotated[
        str | None, typer.Option(help="dummy: random weights of the model's shape.")
    ] = None,
    max_crops: Annotated[int | None, typer.Option(help="Crops of a picture, engine-wide.")] = None,
    precision: Annotated[str | None, typer.Option()] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    max_model_len: Annotated[int | None, typer.Option()] = None,
    max_num_seqs: Annotated[int | None, typer.Option()] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile.")] = None,
    label: Annotated[str | None, typer.Option(help="Heading of this run in comparisons.")] = None,
    output: Annotated[Path, typer.Option(help="Folder, or .json file, of the result.")] = Path(
        "bench-results"
    ),
    form: Annotated[Form, typer.Option("-o", "--format", help="On standard output.")] = Form.table,
) -> None:
    """Run scenarios and write a JSON document and a Markdown page."""
    if ctx.invoked_subcommand is not None:
        return
    names = tuple(scenario or ["report"])
    names = tuple(SCENARIOS) if "all" in names else names
    known(names)
    target = command.Target.chosen(
        model,
        config,
        {
            "load_format": load_format,
            "max_crops": max_crops,
            "precision": precision,
            "kv_cache_dtype": kv_cache_dtype,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "profile": profile,
            "seed": seed,
        },
    )
    plan = command.plan_of(
        target,
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
        batches=command.numbers_of(batches, "--batches", int),
        users=command.numbers_of(users, "--users", int),
        rates=command.numbers_of(rates, "--rates", float),
        fps=fps,
        starts=starts,
    )
    cases = command.cases_of(image or [], question, sizes, sweep_crops)
    name = label or target.model or (config.stem if config else "default")
    files = command.Files.at(output, name.rstrip("/").rsplit("/", 1)[-1])
    progress = Console(stderr=True)
    with terminal.Watcher(progress) as watcher:

        def opened(caches: bool) -> AbstractContextManager[Any]:
            watcher.starting(f"starting {name}")
            return target.open(caches)

        document = Suite(
            open=opened,
            cases=cases,
            plan=plan,
            names=names,
            load=load,
            save=files.save,
            observer=watcher,
            start_command=target.start_command(image[0] if image else None),
            meter=ceilings.Meter.of,
            label=label,
        ).run()
    if form is Form.table:
        terminal.show(document, Console())
    else:
        typer.echo(forms.render(document, form.value), nl=False)
    progress.print(f"written: {files.json} and {files.markdown.name}", soft_wrap=True)
    if any("interrupted" in note for note in document.notes):
        raise typer.Exit(130)
    if not document.complete:
        raise typer.Exit(1)


Results = Annotated[list[Path], typer.Argument(help="Result documents (JSON).")]


@app.command(name="compare")
@told
def compare_results(
    results: Results,
    form: Annotated[Form, typer.Option("-o", "--format", help="table or md.")] = Form.table,
    strict: Annotated[bool, typer.Option(help="Exit status 1 if the results are unlike.")] = False,
) -> None:
    """Put results side by side and say what makes them unlike."""
    from molmo_edge.bench import store
    from molmo_edge.bench.compare import compare

    found = compare([store.load(path) for path in results])
    if form is Form.md:
        typer.echo(found.markdown(), nl=False)
    elif form is Form.table:
        terminal.show_comparison(found, Console())
    else:
        raise BenchmarkError("compare prints table or md")
    if strict and found.flags:
        raise typer.Exit(1)


@app.command()
@told
def report(
    results: Results,
    output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("bench-report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder for the plots as PNG.")] = None,
) -> None:
    """Make one self-contained HTML page, with plots (extra `plot`)."""
    from molmo_edge.bench import plots, store
    from molmo_edge.bench.report import html

    documents = [store.load(path) for path in results]
    store.write_text(html(documents), output)
    typer.echo(f"written: {output}")
    if png is not None:
        for name, figure in plots.figures(documents).items():
            plots.png(figure, png / f"{name}.png")
            typer.echo(f"written: {png / name}.png")


@app.command(name="drift")
@told
def drift_command(
    model: Annotated[str | None, typer.Option(help="Model folder or name; default: stub.")] = None,
    config: Annotated[Path | None, typer.Option(help="A deployment to start from.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Reference first: auto,fp8,fp8_per_token_head.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Reference first: bf16,fp8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Reference first: float32,bfloat16.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Your picture; repeatable.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about --image.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each reference answer.")] = 64,
    min_equal: Annotated[float, typer.Option(help="Least share of equal greedy tokens.")] = 0.95,
    max_kl: Annotated[float, typer.Option(help="Largest mean KL in nats.")] = 0.05,
    output: Annotated[Path, typer.Option(help="Folder, or .json file.")] = Path("bench-results"),
    form: Annotated[DriftForm, typer.Option("-o", "--format")] = DriftForm.table,
) -> None:
    """Same prompts under several configurations; exit status 1 if one drifts too far."""
    from molmo_edge.bench import cases as case_set
    from molmo_edge.bench import drift, drift_run, store

    target = command.Target.chosen(model, config, {})
    chosen = drift_run.variants(
        target, {"kv_cache_dtype": kv_cache_dtype, "precision": precision, "dtype": dtype}
    )
    files = command.Files.at(output, f"drift-{(target.model or 'default').rsplit('/', 1)[-1]}")
    progress = Console(stderr=True)

    def save(found: drift.DriftDocument) -> None:
        store.write_text(found.model_dump_json(indent=1) + "\n", files.json)
        store.write_text(drift_run.markdown(found), files.markdown)

    found = drift_run.run(
        chosen,
        case_set.own(image, question) if image else drift.prompts(),
        max_tokens=max_tokens,
        bounds=drift.Bounds(min_equal, max_kl),
        progress=lambda text: progress.print(f"answering with {text}", markup=False),
        save=save,
    )
    if form is DriftForm.json:
        typer.echo(found.model_dump_json(indent=1))
    elif form is DriftForm.md:
        typer.echo(drift_run.markdown(found), nl=False)
    else:
        terminal.show_drift(found, Console())
    progress.print(f"written: {files.json} and {files.markdown.name}", soft_wrap=True)
    if not all(one.passed for one in found.drifts):
        raise typer.Exit(1)


@app.command()
def schema(
    drift: Annotated[bool, typer.Option("--drift", help="Of drift results instead.")] = False,
) -> None:
    """Print the JSON Schema of a result document."""
    import json

    from molmo_edge.bench import document
    from molmo_edge.bench import drift as drifts

    typer.echo(json.dumps(drifts.schema() if drift else document.schema(), indent=1))


def main() -> None:
    """Entry point of ``python -m molmo_edge.bench``."""
    app(prog_name="python -m molmo_edge.bench")


if __name__ == "__main__":
    main()
