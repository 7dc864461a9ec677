"""One self-contained HTML page about one or more results: no scripts, nothing fetched.

Everything that comes from a document (answers, names, errors) is escaped: a model's answer may
hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from molmo_edge.bench import plots, tables
from molmo_edge.bench.compare import compare, head_names
from molmo_edge.bench.document import Document, Scenario

CAPTIONS = {
    "speed": "Hollow points are warm-up by the rule below; the dotted line is where it ends.",
    "latencies": "Time between two tokens; a long tail to the right is jitter.",
    "waterfall": "Medians of the steady iterations; prefill holds the vision tower.",
    "concurrency": "Total over all users, and what each user sees.",
    "roofline": "The line is memory bandwidth over bytes a token: no decode is above it.",
    "devices": "Output tokens over whole request time, all iterations, as in 2025.",
}

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
.warn { background: #fff4d6; border-left: 4px solid #c77f00; padding: .5rem .8rem;
  margin: 1rem 0; }
.warn ul { margin: 0; padding-left: 1.2rem; } .warn li { color: #222; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
  gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption, li { color: #555; font-size: .9rem; }
blockquote { margin: .3rem 0; padding-left: .8rem; border-left: 3px solid #ccc;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def html(documents: Sequence[Document]) -> str:
    """The page. With several documents the comparison comes first.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    names = head_names(documents)
    title = f"Benchmark: {', '.join(names)}"
    body = [f"<h1>{escape(title)}</h1>"]
    if len(documents) > 1:
        found = compare(documents)
        body.append(_table(["", *found.heads], found.lines))
        flags = "".join(f"<li>{escape(flag)}</li>" for flag in found.flags)
        body.append(f'<div class="warn">Not alike:<ul>{flags}</ul></div>' if flags else "")
    body.append('<div class="plots">')
    for name, figure in plots.figures(documents).items():
        body.append(
            f'<figure id="{name}">{plots.svg(figure)}'
            f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        )
    body.append("</div>")
    for name, document in zip(names, documents, strict=True):
        body += _one(name, document)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _one(name: str, document: Document) -> list[str]:
    out = [f"<h2>{escape(name)}</h2>", "<dl>"]
    out += [f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in tables.head(document)]
    out.append("</dl>")
    if not document.complete:
        out.append('<p class="warn">This result is incomplete.</p>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in document.notes)
    out.append(f'<div class="warn"><ul>{notes}</ul></div>' if notes else "")
    for scenario in document.scenarios:
        out += _scenario(scenario)
    if document.rules:
        out.append("<h2>Rules</h2><ul>")
        out += [f"<li>{escape(key)}: {escape(rule)}</li>" for key, rule in document.rules.items()]
        out.append("</ul>")
    return out


def _scenario(scenario: Scenario) -> list[str]:
    out = [f"<h2>{escape(scenario.title)}</h2>"]
    if scenario.error:
        out.append(f'<p class="warn">{escape(scenario.error)}</p>')
    if not scenario.rows:
        return out
    out.append(_table(*tables.grid(scenario)))
    remarks = [remark for row in scenario.rows for remark in tables.remarks(row)]
    out.append("<ul>" + "".join(f"<li>{escape(remark)}</li>" for remark in remarks) + "</ul>")
    heads, lines = tables.phases(scenario)
    if lines:
        out.append(
            f"<details><summary>Warm-up and steady</summary>{_table(heads, lines)}</details>"
        )
    for row in scenario.rows:
        if row.answer is not None:
            out.append(
                f"<details><summary>{escape(row.title)}: last answer</summary>"
                f"<blockquote>{escape(row.answer.text)}</blockquote></details>"
            )
    return out


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    rest = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines
    )
    return (
        '<div class="scroll"><table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{rest}</tbody></table></div>"
    )
