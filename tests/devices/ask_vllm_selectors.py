"""Prints which attention backends vLLM finds valid on GPUs that are not there.

A script of its own, because it puts stand-ins for compiled modules in place. The Python side of
vLLM is the same in its CPU and CUDA builds; only what was compiled is missing here.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any, ClassVar


def stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


def nothing(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("only selectors run here")


stand_in("vllm._C_stable_libtorch")
interface = {
    # As on these GPUs: version 2 is compiled, 3 is Hopper's, 4 is for the data centre's Blackwell.
    "is_fa_version_supported": lambda version: version == 2,
    "fa_version_unsupported_reason": lambda version: None if version == 2 else "not this GPU",
    "flash_attn_varlen_func": nothing,
    "compile_flash_attn_varlen_func_from_specs": nothing,
    "get_scheduler_metadata": nothing,
}
stand_in("vllm.vllm_flash_attn.flash_attn_interface", **interface)
stand_in("vllm.vllm_flash_attn", __path__=[], **interface)

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from vllm.platforms import cuda  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402


class Absent(cuda.CudaPlatformBase):  # type: ignore[misc]
    """A CUDA platform of a capability that is only said to be there."""

    capability: ClassVar[Any] = None

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return cls.capability

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "a GPU that is not there"


def main() -> None:
    platform = Absent()
    vllm.platforms._current_platform = platform
    # Modules that were imported before the stand-in hold the platform they found then.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm") and hasattr(
            module, "current_platform"
        ):
            module.current_platform = platform  # type: ignore[attr-defined]
    for major, minor in ((8, 7), (11, 0), (12, 0), (12, 1)):
        Absent.capability = DeviceCapability(major, minor)
        cuda._get_backend_priorities.cache_clear()
        for dtype in ("auto", "fp8", "fp8_per_token_head", "int8_per_token_head"):
            config = AttentionSelectorConfig(
                head_size=128, dtype=torch.bfloat16, kv_cache_dtype=dtype, block_size=None
            )
            valid, _ = Absent.get_valid_backends(Absent.capability, config, 28)
            print(f"{major}.{minor} {dtype}={','.join(c.backend.name for c in valid)}")
        tower = ",".join(backend.name for backend in Absent.get_supported_vit_attn_backends())
        print(f"{major}.{minor} vit={tower}")
    Absent.capability = DeviceCapability(8, 7)
    try:
        TritonAttentionImpl(28, 128, 0.1, 4, None, None, "fp8")
        refused = False
    except ValueError as exc:
        refused = "SM89" in str(exc)
    print(f"8.7 refuses fp8={refused}")


if __name__ == "__main__":
    main()
