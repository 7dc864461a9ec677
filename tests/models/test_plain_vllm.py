"""With molmo_edge installed, plain `vllm.LLM` gets the corrected Molmo in its processes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from molmo_edge.models.molmo.synthetic import hub_config, write_checkpoint
from molmo_edge.models.molmo.tiling import tiling_for
from molmo_edge.reference.verify import (
    EXACT_BOUND,
    QUESTION,
    Answer,
    compare,
    reference_answers,
    synthetic_image,
)
from molmo_edge.requests import question

SCRIPT = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, image, question = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=2048,
              max_num_seqs=2, kv_cache_memory_bytes=2**28)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    prompt = {"prompt": f"User: {question} Assistant:"}
    image = {**prompt, "multi_modal_data": {"image": Image.open(image)}}
    few = {**image, "mm_processor_kwargs": {"max_crops": 1}}
    outputs = [llm.generate(p, params, use_tqdm=False)[0] for p in (image, few)]
    print(json.dumps([
        [o.prompt_token_ids, o.outputs[0].token_ids,
         [e[i].logprob for i, e in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)]]
        for o in outputs
    ]))
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_vllm_in_its_own_process_equals_the_reference(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "molmo-o", hub_config("7b-o"))
    pixels = synthetic_image(224, 460, 0)
    expected = reference_answers(directory, {"image": question(pixels, QUESTION)}, 4)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    script = tmp_path / "plain.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(directory), str(tmp_path / "image.png"), QUESTION],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # vLLM may print after the script.
    line = next(one for one in run.stdout.splitlines() if one.startswith("[["))
    image, few = json.loads(line)
    case = compare("image", expected["image"], Answer(*image, image[2]), True, EXACT_BOUND)
    assert case.ok, case
    # max_crops reaches pixels and tokens alike.
    difference = tiling_for(224, 460).n_tokens - tiling_for(224, 460, 1).n_tokens
    assert len(image[0]) - len(few[0]) == difference
