"""The model card of a quantised checkpoint: what was done, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import molmo_edge
from molmo_edge.quantize.formats import Format


def model_card(
    base: str,
    form: Format,
    errors: Mapping[str, float],
    in_bytes: int,
    out_bytes: int,
    pictures: int = 0,
) -> str:
    """Markdown with the error of every layer; `pictures` is how many it was calibrated on."""
    worst = max(errors, key=lambda name: errors[name])
    searched = (
        f"The scale of each group is the best of {len(form.search)} by squared error."
        if len(form.search) > 1
        else "Scales cover the largest value of a row."
    )
    if pictures:
        used = (
            f"Calibrated on {pictures} picture{'s' if pictures > 1 else ''}: columns of a layer "
            "are scaled by a power of the mean size of their inputs, chosen per layer by the error "
            "of its output; the inverse is in the norm or the layer before, so that the model "
            "computes the same. Squared errors count by the mean square of a column's inputs."
        )
        counted = ", each column counting with the mean square of its inputs on the pictures"
    else:
        used, counted = "No pictures and no text were used.", ""
    rows = "\n".join(f"| `{name}` | {error:.4f} |" for name, error in errors.items())
    return f"""# {base}, {form.scheme}

Made from `{base}` by molmo_edge {molmo_edge.__version__} (`molmo-edge quantize`, scheme
`{form.scheme}`). The original's licence and terms of use hold for this copy too.

- Linear layers of the language model: {form.summary}.
  Rounded to nearest. {searched} {used}
- Vision tower, embeddings, norms, biases and LM head: bfloat16.
- Weights: {in_bytes / 1e9:.2f} GB → {out_bytes / 1e9:.2f} GB.
- Format: compressed-tensors, `{form.compression}`; vLLM loads it as it is.

Relative error of a layer is the Frobenius norm of (stored - original) over that of the
original{counted}:
median {statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} in `{worst}`.
It says nothing about answers: measure those with `molmo-edge bench drift` against the original.

| layer | relative error |
|---|---|
{rows}
"""
