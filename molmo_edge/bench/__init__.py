"""Measurements that can be repeated and compared: ``molmo-edge bench``.

A sample's way: ``scenarios`` send requests, ``measure`` records them, ``stats`` separates warm-up
from steady state, ``document`` keeps the result, ``report`` and ``compare`` show it. ``ceilings``
adds memory bandwidth and power; ``drift`` compares answers instead of speeds;
``accuracy`` asks about drawn ``scenes``.

    target = Target.choose(model="stub")
    bench = Bench(cases.standard(), RunOptions.choose(target.random_weights))
    document = scenarios.run(bench, target.open, ["report"])
    save(document, report.markdown(document), result_path(Path("bench-results"), target.name))
"""
