"""Files appear whole or not at all, stay what they were after an error, and nothing is left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from molmo_edge.errors import ConfigError
from molmo_edge.files import expand_home, replacing, write_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, "old")
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
    write_file(path, b"new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_only_regular_files_are_replaced_and_links_stay_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for wrong in (*map(tmp_path.joinpath, ("pipe", "directory", "loop")), Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"):
            write_file(wrong, "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "x"


def test_everyone_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    with replacing(tmp_path / "made") as made:
        made.mkdir()
        (made / "weights").touch(0o600)  # as safetensors does
    assert (tmp_path / "made" / "weights").stat().st_mode & 0o777 == 0o666 & ~0o22
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~0o22


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from molmo_edge.files import replacing\n"
        "with replacing(pathlib.Path('of-the-dead')) as made:\n"
        "    made.write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"writing\n"
        write_file(tmp_path / "a", "x")
        assert len(names(tmp_path)) == 2
        child.send_signal(signal.SIGKILL)
    write_file(tmp_path / "a", "x")
    assert names(tmp_path) == ["a"]


def test_threads_that_write_beside_each_other_do_not_disturb(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for turn in range(20):
            write_file(tmp_path / f"{number % 2}", f"{turn}")

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["0", "1"] and (tmp_path / "0").read_text() == "19"


def test_a_home_directory_is_put_in_or_its_absence_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/robot")
    assert expand_home("~/a.jpg") == Path("/home/robot/a.jpg")
    assert expand_home("~lock.jpg") == Path("~lock.jpg") and expand_home("a~/b") == Path("a~/b")
    with pytest.raises(ConfigError, match="home directory"):
        expand_home("~nobody-has-this-name/a.jpg")
    with pytest.raises(ConfigError, match="NUL"):
        expand_home("a\0b")
