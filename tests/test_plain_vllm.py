"""With molmo_edge installed, plain `vllm.LLM` gets the corrected Molmo in its processes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.models.molmo.stub import TEXT
from molmo_edge.models.molmo.synthetic import Shape, vocabulary
from molmo_edge.models.molmo.tiling import layout_for

SCRIPT = """
import json, sys
import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=2048,
              max_num_seqs=2, kv_cache_memory_bytes=2**28)
    image = Image.fromarray(np.full((900, 1200, 3), 120, np.uint8))
    params = SamplingParams(temperature=0, max_tokens=30)
    prompt = {"prompt": "User: What? Assistant:", "multi_modal_data": {"image": image}}
    few = {**prompt, "mm_processor_kwargs": {"max_crops": 2}}
    outputs = [llm.generate(p, params, use_tqdm=False)[0] for p in (prompt, few, prompt)]
    model = llm.collective_rpc(lambda worker: type(worker.model_runner.model).__module__)
    print(json.dumps({
        "texts": [o.outputs[0].text.strip() for o in outputs],
        "lengths": [len(o.prompt_token_ids) for o in outputs],
        "first": outputs[0].prompt_token_ids[:2],
        "model": model,
    }))
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_vllm_answers_right_with_its_engine_in_another_process(
    stub_vlm: EdgeVLM, cache_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "plain.py"
    script.write_text(SCRIPT)
    folder = next(cache_dir.glob("stub-*"))
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["texts"] == [TEXT] * 3
    assert said["model"] == ["molmo_edge.models.molmo.vllm_model"]
    # One BOS, then the image; max_crops reaches pixels and tokens alike.
    big, few, again = said["lengths"]
    assert big == again
    assert big - few == layout_for(900, 1200).n_tokens - layout_for(900, 1200, 2).n_tokens
    assert said["first"] == [len(vocabulary()), Shape().embedding_size]
