"""Write the figures of the pages from the recorded results and from `molmo-edge plan`.

    python benchmarks/figures.py            # rewrite the pages
    python benchmarks/figures.py --check    # exit status 1 if a page differs

A page has each block of figures between `<!-- figures: NAME -->` and `<!-- end of figures -->`;
NAME is a function of this module.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bulk as bulk_rates
import harness
import kanoa_report
import label as label_rates
import own_cost as own_costs
from speculation import markdown as speculation_table

from molmo_edge.bench import accuracy
from molmo_edge.bench.tables import UNKNOWN, number, percent, table
from molmo_edge.devices.detect import known_device
from molmo_edge.devices.plan import Plan, plan
from molmo_edge.devices.shapes import TOKENS_PER_FRAME, model_shape

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

H200 = ("2026-11-27-h200-molmo2", "2026-11-27-h200")
VERIFY, OVERHEAD = "2026-11-27-verify-cpu", "2026-11-28-overhead-cpu"
SPECULATION = "2026-11-28-speculation-cpu"
PREPROCESS = "2026-11-27-preprocess-cpu"
OWN_COST, BULK = "2026-11-28-own-cost-cpu", ("2026-11-28-bulk-cpu", "2026-11-28-bulk-stub-cpu")
LABEL, LABEL_STUB = "2026-11-28-label-cpu", "2026-11-28-label-stub-cpu"
KANOA, REPORT = "2026-11-28-kanoa-stub-cpu", "2025-12-08-thor"
ACCURACY, QUANTISED = "2026-11-28-demo-accuracy-cpu", "2026-11-28-demo-quantised-cpu"
STOCK = "stock vLLM, "
FAMILIES = {"molmo2": "Molmo 2", "molmo": "Molmo 1"}


def result(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def machine(document: Mapping[str, Any]) -> str:
    return f"{document['device']['name']}, vLLM {document['software']['vllm']}"


def link(name: str) -> str:
    return f"`benchmarks/results/{name}.json`"


# The README's.


def answers() -> str:
    """Differences from the reference implementations, by what is rounded."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(name: str, family: str, cases: list[dict[str, Any]]) -> None:
        rows.setdefault(name, {}).setdefault(family, []).extend(cases)

    cpu = result(VERIFY)
    for report in (report for reports in cpu["layouts"].values() for report in reports):
        name = f"{STOCK if report['stock'] else ''}float32, {machine(cpu)}"
        add(name, report["family"], report["cases"])
    for document in map(result, H200):
        for case in document["stages"]["verify"].values():
            if "ours" not in case["values"]:
                continue  # it did not finish
            options = case["options"]
            what = [{"float32": "float32", "bfloat16": "BF16"}[options["dtype"]]]
            kv_cache = options.get("kv_cache_dtype", "auto")
            what += [f"KV cache {kv_cache}"] if kv_cache != "auto" else []
            what += ["FP8 weights"] if options["engine_args"].get("precision") == "fp8" else []
            name, family = f"{', '.join(what)}, {machine(document)}", options.get("family", "molmo")
            add(name, family, case["values"]["ours"]["cases"])
            if "stock" in case["values"]:
                add(STOCK + name, family, case["values"]["stock"]["cases"])
    # What is exact first, stock vLLM last.
    names = sorted(rows, key=lambda name: (STOCK in name, "float32" not in name, name))
    lines = [[name, *(_drift(rows[name].get(family, [])) for family in FAMILIES)] for name in names]
    sources = ",\n".join(map(link, (VERIFY, *H200)))
    return (
        f"{table(['largest difference of log-probability', *FAMILIES.values()], lines)}\n\n"
        "Equal is every token of each case of `molmo-edge verify`. Where numbers are rounded, the\n"
        "reference's tokens are forced and their log-probabilities compared. Random weights; from\n"
        f"{sources}."
    )


def _drift(cases: Sequence[Mapping[str, Any]]) -> str:
    if not cases:
        return UNKNOWN
    wrong = sum(not case["ok"] for case in cases)
    worst = max(case["max_dlogprob"] for case in cases)
    if wrong:
        return f"wrong in {wrong} of {len(cases)} cases"
    return f"equal, {worst:.1e}" if worst < 1e-4 else f"{worst:.3f}"


def speed() -> str:
    """Decode speed and time to first token on the H200."""
    document, lines = result(H200[0]), []
    copy = document["stages"]["decode"]["copy"]["values"]["bandwidth_bytes_s"]
    for case in document["stages"]["decode"].values():
        engine = case.get("options", {}).get("engine")
        if engine is None:
            continue
        for name, row in case["values"].items():
            if name in ("environment", "13 crops", "9 crops") or row["error"]:
                continue
            step = (row["ceiling"] or {}).get("bytes_per_token")
            tps, ttft = row["decode_tps"]["median"], row["ttft_s"]["median"]
            kind = (engine["precision"], engine["kv_cache_dtype"], name.replace("-", " "))
            share = percent(tps * step / copy if step else None)
            model = engine["model"].rpartition("/")[2]
            lines.append([model, *kind, number(tps, 0), share, number(ttft, 0, 1000)])
    heads = ["shape", "weights", "KV cache", "input", "tok/s", "of a copy's bandwidth", "TTFT ms"]
    ours = document["stages"]["overhead"]["7b"]["values"]["result"]["decode_tps"]
    return (
        f"{machine(document)}, batch 1, random weights, medians of {row['decode_tps']['n']}; from\n"
        f"{link(H200[0])}:\n\n{table(heads, sorted(lines))}\n\n"
        f"`EdgeVLM` decodes {harness.interval_text(ours)} of bare vLLM there, which is\n"
        f"{harness.interval_text(ours['floor'])} of itself."
    )


def _plan(model: str, device: str, head: str = "none") -> Plan:
    return plan(model_shape(f"allenai/{model}").with_head(head), known_device(device))


def ceilings() -> str:
    """The table of `molmo-edge plan`."""
    models, devices = ("Molmo2-4B", "Molmo-7B-D-0924"), {"thor": "Thor", "rtx5080": "RTX 5080"}
    forms = {
        ("bf16", "none"): "BF16",
        ("fp8", "none"): 'precision="fp8"',
        ("w4a16", "none"): "W4A16, quantised",
        ("w4a16", "fp8"): "the same, LM head FP8",
        ("w4a16", "w4a16"): "the same, LM head W4A16",
        ("nvfp4", "none"): "NVFP4, quantised",
        ("nvfp4", "fp8"): "the same, LM head FP8",
    }
    plans = [f"{model}, {name}" for model in models for name in devices.values()]
    lines = []
    for (precision, head), title in forms.items():
        cells = []
        for model in models:
            for device in devices:
                rows = _plan(model, device, head).rows
                row = next(row for row in rows if row.precision == precision)
                known = number(row.decode_tps, 1 if (row.decode_tps or 0) < 100 else 0)
                cells.append(known if row.fits else "does not fit")
        lines.append([title, *cells])
    made = _plan("Molmo2-4B", "thor")
    rates = " and ".join(
        f"{(_plan('Molmo2-4B', device).bandwidth_bytes_s or 0) / 1e9:.0f} GB/s on {name}"
        for device, name in devices.items()
    )
    speeds = table(["tok/s, at most", *plans], lines)
    return (
        f"{made.prompt_tokens:,} prompt and {made.output_tokens:,} answer tokens; each token reads "
        f"blocks and LM head once, at\n{rates}:\n\n{speeds}"
    )


def visuals() -> str:
    """Sizes of images and video of Molmo 2."""
    thor, rtx = (_plan("Molmo2-4B", device).visuals for device in ("thor", "rtx5080"))
    assert thor is not None and rtx is not None
    images = " and ".join(
        f"{size.replace('x', '×')} pixels has {tokens:,}"
        for size, tokens in thor.image_tokens.items()
    )
    limits = " and ".join(
        f"{one.max_model_len:,} tokens on {name} ({one.frames} frames: "
        f"{math.ceil(one.seconds)} s of video)"
        for name, one in (("Thor", thor), ("an RTX 5080", rtx))
    )
    return (
        f"In Molmo 2 an image of {images} tokens, and a video at most {TOKENS_PER_FRAME} for\neach "
        f"frame, two frames per second. Molmo2-4B in FP8 takes requests of\n{limits}."
    )


def demo() -> str:
    document = accuracy.AccuracyDocument.model_validate(result(ACCURACY))
    environment = document.results[0].environment
    return (
        f"{document.scenes} scenes that it never saw, {environment.device.name}, "
        f"vLLM {environment.software['vllm']}; from\n{link(ACCURACY)}:\n\n"
        f"{accuracy.table(document)}\n\n{accuracy.LEGEND.capitalize()}."
    )


def quantised() -> str:
    document = result(QUANTISED)
    return (
        f"{document['settings']['scenes']} scenes, {machine(document)}; from\n{link(QUANTISED)}:"
        f"\n\n{quantised_table(document['rows'])}"
    )


def quantised_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes, the measures that have goals, and drift."""
    lines = []
    for row in rows:
        measures, drift = row.get("accuracy", {}).get("measures", {}), row.get("drift", {})
        values = [measures.get(name, {}).get("value") for name in accuracy.GOALS]
        lines.append(
            [
                row["name"],
                number(row["bytes"], 2, 1e-6),
                *(number(value, 1, 100) for value in values),
                number(drift.get("equal_greedy"), 1, 100),
                number(drift.get("mean_kl"), 4),
            ]
        )
    goals = [f"{accuracy.MEASURES[name]}, %" for name in accuracy.GOALS]
    return table(["weights", "MB", *goals, "equal tokens, %", "KL, nats"], lines)


# Those of the benchmarks' own page.


def overhead() -> str:
    lines = []
    gpu = result(H200[0])
    cpu = result(OVERHEAD)
    for document, measured in (
        (cpu, cpu["result"]),
        (gpu, gpu["stages"]["overhead"]["7b"]["values"]["result"]),
    ):
        speeds, cost = measured["decode_tps"], measured["cost_us"]
        texts = [harness.interval_text(one) for one in (speeds, speeds["floor"])]
        costs = [harness.interval_text(one, 0) for one in (cost, cost["floor"])]
        first = measured["ttft_s"]
        known = first["low"] is not None
        firsts = [harness.interval_text(one) if known else "–" for one in (first, first["floor"])]
        lines.append([machine(document), *texts, *firsts, *costs])
    heads = ["", "decode of bare vLLM's", "floor", "TTFT of bare vLLM's", "floor",
             "CPU µs per token", "floor"]  # fmt: skip
    return table(heads, lines)


def own_cost() -> str:
    document = result(OWN_COST)
    return f"{machine(document)}:\n\n{own_costs.markdown(document['result'])}"


def bulk() -> str:
    documents = [result(name) for name in BULK]
    return f"{machine(documents[0])}:\n\n{bulk_rates.markdown(*documents)}"


def label() -> str:
    """Rates of labelling, its memory, and what became of runs that were killed."""
    document = result(LABEL)
    memory, kills, cluster = (document["result"][part] for part in ("rss", "kills", "cluster"))
    early, late = (number(memory[rows] / 2**20, 0) for rows in ("200", "2000"))
    return (
        f"{machine(document)}:\n\n{label_rates.markdown(document, result(LABEL_STUB))}\n\n"
        f"Resident memory after 200 and 2,000 rows: {early} and {late} MiB. Killed "
        f"{kills['kills']} times, the table of {kills['rows']:,} files has {kills['different']:,} "
        f"different rows, {len(kills['errors'])} of them with the error of a broken file. By two "
        f"actors of Ray {'' if cluster['equal'] and cluster['equal_killed'] else 'not '}the same "
        f"table, also where one of them is killed ({cluster['rows']:,} rows)."
    )


def kanoa() -> str:
    """Rates through kanoa, beside the 2025 report's."""
    document, report = result(KANOA), kanoa_report.reported(RESULTS / f"{REPORT}.json")
    rows = kanoa_report.markdown(document["result"], report)
    return f"The stub in bfloat16 on one core, {machine(document)}:\n\n{rows}\n\n{link(KANOA)}\n"


def speculation() -> str:
    """Drafted tokens against none."""
    document = result(SPECULATION)
    starts = document["settings"]["starts"]
    text = (
        f"{machine(document)}, starts of each side: {starts}; from\n{link(SPECULATION)}:\n\n"
        f"{speculation_table(document['result'], speeds=starts >= 3)}"
    )
    if not any(document["async_scheduling"].values()):
        text += "\n\nvLLM schedules synchronously on every side here."
    return text


def preprocess() -> str:
    document, lines = result(PREPROCESS), []
    for one in document["results"]:
        for name, measured in one["implementations"].items():
            if name != "molmo_edge":
                ours = one["implementations"]["molmo_edge"]["ms"]
                times = harness.interval_text(measured["times_ours"], 1)
                lines.append([one["case"], harness.interval_text(ours, 0), name, times])
    return f"{machine(document)}:\n\n" + table(["", "ours, ms", "other", "× ours"], lines)


def render(page: str) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}{globals()[m[2]]().rstrip()}\n{m[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, different = parser.parse_args().check, False
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = render(old)
        different |= old != new
        if old != new and not check:
            path.write_text(new, encoding="utf-8")
    return int(check and different)


if __name__ == "__main__":
    sys.exit(main())
