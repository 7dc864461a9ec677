"""From a model's name to its folder: what is refused at once, and what is not imported for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo_edge.errors import ModelError
from molmo_edge.models.hub import STUB, locate
from molmo_edge.models.molmo import stub, stub_weights

HEAVY = "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"


def printed(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{HEAVY}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def there(root: Path) -> Path:
    """A stub that is there already."""
    folder = root / f"stub-{stub._VERSION}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_stub_that_is_there_is_found_without_torch(tmp_path: Path) -> None:
    folder = there(tmp_path)
    code = (
        "from pathlib import Path\n"
        "from molmo_edge.models.hub import locate\n"
        f"print(locate('stub', Path({str(tmp_path)!r})))"
    )
    assert printed(code).split() == [str(folder), "[]"]


def test_a_description_that_is_there_is_found_without_torch(tmp_path: Path) -> None:
    name = "allenai/Molmo-7B-D-0924"
    folder = tmp_path / "shaped-1" / "Molmo-7B-D-0924"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    code = (
        "from pathlib import Path\n"
        "from molmo_edge.models import hub as checkpoints\n"
        "checkpoints._cached = lambda name: None\n"
        f"print(checkpoints.locate({name!r}, Path({str(tmp_path)!r}), 'dummy'))"
    )
    assert printed(code).split() == [str(folder), "[]"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("'no such model'", "ModelError"),
        ("'/no/such/folder'", "ModelError"),
        ("'stub', cache_dir='/dev/null/x'", "ModelError"),
        ("'stub', max_crops=0", "ConfigError"),
        ("'stub', profle='cpu'", "ConfigError"),
    ],
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(
    arguments: str, error: str
) -> None:
    code = (
        "from molmo_edge import EdgeVLM\n"
        "from molmo_edge.errors import MolmoEdgeError\n"
        "try:\n"
        f"    EdgeVLM({arguments})\n"
        "except MolmoEdgeError as exc:\n"
        "    print(type(exc).__name__)"
    )
    began = time.monotonic()
    name, heavy = printed(code).split(maxsplit=1)
    assert name == error
    assert heavy.strip() == "[]"
    assert time.monotonic() - began < 20  # a loaded machine's; idle, it is below two seconds


def test_a_stub_that_is_missing_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(folder: Path) -> None:
        written.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(stub_weights, "write", write)
    folder = locate(STUB, tmp_path)
    assert folder == locate(STUB, tmp_path) and (folder / "config.json").is_file()
    assert len(written) == 1 and not written[0].exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_stub_that_cannot_be_written_is_a_model_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match="cache_dir"):
        locate(STUB, blocked)
