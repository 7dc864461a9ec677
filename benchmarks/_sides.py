"""The three ways to ask one model that `overhead.py` compares, each in a process of its own.

Every side answers the same requests on the same engine arguments. It is told what to ask in lines
of JSON on standard input and answers in lines of JSON; the clock around a request is the same one
line of code for all of them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from molmo_edge.bench.cases import Case, fresh, standard
from molmo_edge.engine.vllm_args import BuildPlan
from molmo_edge.errors import BenchmarkError

TEXT = "Write a short story about a robot in a garden."
SIDES = ("ours", "bare", "http")
SERVER_START_S = 900.0
HOST = "127.0.0.1"


class Side(Protocol):
    """One way to ask."""

    def prepare(self, image: Any) -> Any:
        """Whatever has to happen to a picture before the clock runs; the picture may be None."""
        ...

    def ask(self, prepared: Any, text: str, tokens: int) -> dict[str, Any]:
        """Answers with exactly `tokens` tokens, greedily: prompt_tokens, output_tokens, text."""
        ...


def plan_of(options: Mapping[str, Any]) -> BuildPlan:
    """The engine arguments that `EdgeVLM(**options)` builds with; sets the environment too."""
    from molmo_edge.devices.profiles import load_profile, select_profile
    from molmo_edge.engine.build import (
        engine_device,
        engine_environment,
        plan_build,
        quiet,
        set_environment,
    )
    from molmo_edge.models.hub import default_cache_dir, locate
    from molmo_edge.models.molmo.layout import read_config
    from molmo_edge.models.registry import family_of
    from molmo_edge.settings import resolve

    given = dict(options)
    config = given.pop("config", None)
    device = engine_device()
    chosen: list[Any] = []

    def profile_settings(asked: str) -> tuple[str, Mapping[str, Any]]:
        chosen.append(select_profile(device)[0] if asked == "auto" else load_profile(asked))
        return chosen[0].name, chosen[0].as_settings()

    resolved = resolve(given, config=config, profile_settings=profile_settings)
    settings, profile = resolved.settings, chosen[0]
    quiet()
    set_environment(engine_environment(settings, device, profile))
    root = settings.cache_dir or default_cache_dir()
    folder = locate(settings.model, root, settings.load_format)
    checkpoint = read_config(folder)
    return plan_build(resolved, device, family_of(checkpoint), folder, checkpoint, profile)


class Ours:
    """`EdgeVLM.query`."""

    def __init__(self, vlm: Any) -> None:
        self._vlm = vlm

    def prepare(self, image: Any) -> Any:
        return image

    def ask(self, prepared: Any, text: str, tokens: int) -> dict[str, Any]:
        result = self._vlm.query(prepared, text, max_tokens=tokens, ignore_eos=True)
        metrics = result.metrics
        return {
            "prompt_tokens": metrics.prompt_tokens,
            "output_tokens": metrics.output_tokens,
            "text": result.text,
            "cached_tokens": metrics.cached_tokens,
        }


class Bare:
    """`vllm.LLM.generate` in this thread, with the plugin's model as any vLLM user gets it."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams

        self._llm = llm
        self._params = SamplingParams

    def prepare(self, image: Any) -> Any:
        return image

    def ask(self, prepared: Any, text: str, tokens: int) -> dict[str, Any]:
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        prompt: dict[str, Any] = {"prompt": f"User: {text} Assistant:"}
        if prepared is None:
            # Without a picture vLLM tokenises the bare string: no BOS, no space before it.
            tokenizer = self._llm.get_tokenizer()
            bos = tokenizer.bos_token_id
            start = tokenizer.eos_token_id if bos is None else bos
            ids = tokenizer.encode(f" User: {text} Assistant:", add_special_tokens=False)
            prompt = {"prompt_token_ids": [start, *ids]}
        else:
            prompt["multi_modal_data"] = {"image": prepared}
        output = self._llm.generate(prompt, params, use_tqdm=False)[0]
        return {
            "prompt_tokens": len(output.prompt_token_ids),
            "output_tokens": len(output.outputs[0].token_ids),
            "text": output.outputs[0].text.lstrip(),
            "cached_tokens": output.num_cached_tokens,
        }


class Http:
    """vLLM's OpenAI-compatible server, asked without streaming over one kept connection's worth
    of requests; encoding the picture as PNG is not timed, decoding it in the server is."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model

    def prepare(self, image: Any) -> Any:
        if image is None:
            return None
        data = io.BytesIO()
        image.save(data, format="PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

    def ask(self, prepared: Any, text: str, tokens: int) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if prepared is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": prepared}})
        answer = self._post(
            "/v1/chat/completions",
            {
                "model": self._model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            },
        )
        usage = answer["usage"]
        return {
            "prompt_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "text": answer["choices"][0]["message"]["content"].lstrip(),
            "cached_tokens": None,
        }

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)


def threads_environment(threads: int | None) -> dict[str, str]:
    """Holds a CPU engine to so many threads, bound to no core; None leaves them to vLLM.

    With a core for each thread to itself the default is right. Where others compute too, threads
    wait for each other at the end of every kernel, for far longer than the kernel takes.
    """
    if threads is None:
        return {}
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def server_arguments(llm_args: Mapping[str, Any]) -> list[str]:
    """The engine arguments as the server's command line.

    `use_tqdm_on_load` alone has no switch there; it only draws a bar.
    """
    words: list[str] = []
    for name, value in llm_args.items():
        option = "--" + name.replace("_", "-")
        if name == "use_tqdm_on_load" or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, Mapping | list | tuple):
            words += [option, json.dumps(value)]
        else:
            words += [option, str(value)]
    return words


@contextmanager
def opened(side: str, options: Mapping[str, Any]) -> Iterator[tuple[Side, dict[str, Any]]]:
    """One side, ready to be asked, and what it says of itself."""
    plan = plan_of(options)
    told = {"environment": dict(plan.environment), "llm_args": _plain(plan.llm_args)}
    if side == "ours":
        from molmo_edge import EdgeVLM

        with EdgeVLM(**options) as vlm:
            yield Ours(vlm), {**told, "environment": dict(vlm.environment)}
    elif side == "bare":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        plan.family.prepare()
        yield Bare(LLM(**plan.llm_args)), told
    else:
        with _server(plan) as url:
            yield Http(url, str(plan.llm_args["model"])), told


@contextmanager
def _server(plan: BuildPlan) -> Iterator[str]:
    """`vllm serve` on the loopback interface, as its module, since some wheels lack the command."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", HOST, "--port", str(port)),
        *server_arguments(plan.llm_args),
    ]
    # As its users have it: the engine in a process of its own.
    environ = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(command, env=environ, stdout=sys.stderr)
    try:
        url = f"http://{HOST}:{port}"
        _await(url, server)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SERVER_START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise BenchmarkError("the server ended before it answered; its log says why")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    raise BenchmarkError(f"the server did not answer within {SERVER_START_S:.0f} s")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def timed(
    side: Side,
    case: Case,
    number: int | None,
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """One request on the common clock; `number` makes the picture a new one, None means text."""
    image = None if number is None or case.image is None else fresh(case.image, number)
    prepared = side.prepare(image)
    text = TEXT if image is None else case.question
    busy = time.process_time()
    began = clock()
    answer = side.ask(prepared, text, tokens)
    seconds = clock() - began
    return {**answer, "seconds": seconds, "cpu_s": time.process_time() - busy}


def child(side: str, options: Mapping[str, Any]) -> None:
    """Serves one side until standard input ends."""
    # What vLLM prints must not get between the lines of JSON.
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        case = standard()[0]
        with opened(side, options) as (one, told):
            print(json.dumps({"ready": told}), file=out, flush=True)
            for line in sys.stdin:
                asked = json.loads(line)
                answer = timed(one, case, asked["number"], asked["tokens"])
                print(json.dumps(answer), file=out, flush=True)


class Process:
    """The parent's end of `child`: a side that is asked by `ask(number, tokens)`."""

    def __init__(
        self,
        side: str,
        options: Mapping[str, Any],
        log: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.side, self._log = side, log
        self._file = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), side, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env={**os.environ, **(environ or {})},
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Waits until the side is up."""
        told: dict[str, Any] = self._line()["ready"]
        return told

    def ask(self, number: int | None, tokens: int) -> dict[str, Any]:
        """One request; see `timed`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"number": number, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise self._lost() from exc
        return self._line()

    def close(self) -> None:
        """Ends the side; a process that does not go is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._file.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._lost()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self) -> BenchmarkError:
        self._process.wait(60)  # its last words reach the log before it ends
        tail = self._log.read_text(errors="replace")[-1500:]
        return BenchmarkError(f"the side '{self.side}' ended early:\n{tail}")


if __name__ == "__main__":
    child(sys.argv[1], json.loads(sys.argv[2]))
