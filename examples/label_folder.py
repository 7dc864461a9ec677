"""Label every image of a directory: a count and a caption each, in a Parquet table.

    python examples/label_folder.py photos/ labels/ --count chairs --model allenai/Molmo2-4B

The same command goes on where it was stopped. The built-in demo knows drawn shapes only:

    python examples/label_folder.py molmo_edge/bench/data labels/ --count "red circles"
"""

from __future__ import annotations

import argparse

import pyarrow.parquet as pq

from molmo_edge.label import Source, label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("output")
    parser.add_argument("--count", default="people")
    parser.add_argument("--model", help="default: from the settings, else the built-in demo")
    args = parser.parse_args()

    tasks = [{"name": "count", "count": args.count}, {"name": "caption", "caption": "short"}]
    done = label(Source([args.directory]), args.output, tasks, engine={"model": args.model})
    print(done)
    for row in pq.read_table(args.output).to_pylist():
        print(row["row"], row["error"] or f"{row['count']} {args.count}: {row['caption']}")


if __name__ == "__main__":
    main()
