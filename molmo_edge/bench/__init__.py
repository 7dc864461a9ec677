"""``python -m molmo_edge.bench``: measurements that can be repeated, compared and believed.

``cases`` says what is asked, ``measure`` times it, ``stats`` tells warm-up from steady state,
``scenarios``, ``load`` and ``coldstart`` are the kinds of measurement, ``suite`` runs them and
``record`` keeps the growing ``document``; ``ceilings`` adds memory and power. ``tables``,
``terminal``, ``forms``, ``plots``, ``report`` and ``compare`` show what a document says, and
``drift`` what a cheaper configuration does to the answers.
"""
