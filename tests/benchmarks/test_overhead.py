"""The comparison with bare vLLM: fair turns, and numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import _pairs
import _sides
import overhead
import pytest
from PIL import Image

from molmo_edge.bench.cases import Case
from molmo_edge.errors import MolmoEdgeError


class Machine:
    """Two sides whose requests take known times; keeps the order in which they were asked."""

    def __init__(self, token_s: dict[str, float], first_s: float = 0.5) -> None:
        self.token_s, self.first_s = token_s, first_s
        self.asked: list[tuple[str, int | None, int]] = []

    def ask(self, side: str, number: int | None, tokens: int) -> dict[str, Any]:
        self.asked.append((side, number, tokens))
        first = 0.01 if number is None else self.first_s
        seconds = first + (tokens - 1) * self.token_s[side]
        return {
            "prompt_tokens": 5,
            "output_tokens": tokens,
            "text": "x" * tokens,
            "cached_tokens": 0,
            "seconds": seconds,
            "cpu_s": seconds,
        }

    def rounds(self, count: int = 6, **more: Any) -> list[dict[str, dict[str, Any]]]:
        asks = {name: lambda n, t, name=name: self.ask(name, n, t) for name in self.token_s}
        return overhead.rounds(
            asks,
            count=count,
            decode_tokens=101,
            request_tokens=11,
            rest_s=0.0,
            sleep=lambda s: None,
            **more,
        )


def test_sides_take_turns_and_who_is_first_changes() -> None:
    machine = Machine({"ours": 0.01, "bare": 0.01})
    machine.rounds(2)
    names = [side for side, _, _ in machine.asked]
    assert names[:8] == ["ours", "bare"] * 4
    assert names[8:] == ["bare", "ours"] * 4


def test_both_sides_get_the_same_picture_and_no_picture_comes_twice() -> None:
    machine = Machine({"ours": 0.01, "bare": 0.01})
    machine.rounds(3)
    shown = [(side, number) for side, number, _ in machine.asked if number is not None]
    assert len(set(shown)) == len(shown) == 12
    assert {n for side, n in shown if side == "ours"} == {n for s, n in shown if s == "bare"}


def test_decode_speed_is_what_the_long_answer_takes_beyond_the_short_one() -> None:
    found = overhead.evaluate([Machine({"ours": 0.0100, "bare": 0.0098}).rounds()], "bare")
    assert found["decode_tps"]["median"] == pytest.approx(0.98)
    assert found["ttft_s"]["median"] == pytest.approx(1.0)
    assert found["passed"] and found["equal_answers"] == 1.0


def test_a_slower_decode_than_promised_does_not_pass() -> None:
    found = overhead.evaluate([Machine({"ours": 0.0100, "bare": 0.0090}).rounds()], "bare")
    assert found["decode_tps"]["median"] == pytest.approx(0.9)
    assert not found["passed"]


def test_every_start_counts_and_is_told_apart() -> None:
    """A start whose memory lies badly for one side says little of the sides."""
    lucky, unlucky = ({"ours": 0.0100, "bare": bare} for bare in (0.0100, 0.0098))
    found = overhead.evaluate(
        [Machine(unlucky).rounds(6), Machine(lucky).rounds(6), Machine(lucky).rounds(6)], "bare"
    )
    ratios = [start["decode_tps"] for start in found["starts"]]
    assert ratios == pytest.approx([0.98, 1.0, 1.0])
    assert found["decode_tps"]["median"] == pytest.approx(1.0)
    assert found["decode_tps"]["pairs"] == 18
    assert found["decode_tps"]["mean_ratio"] == pytest.approx((0.98 + 2) / 3, abs=1e-4)


def test_a_start_without_a_pair_is_refused() -> None:
    with pytest.raises(MolmoEdgeError, match="one pair for each start"):
        overhead.run({}, starts=3, pairs=2)


def test_no_round_begins_behind_the_deadline() -> None:
    assert Machine({"ours": 0.01, "bare": 0.01}).rounds(3, deadline=0.0) == []


def test_one_disturbed_pair_does_not_move_the_ratio() -> None:
    found = _pairs.compare([1.0, 1.0, 1.0, 9.0, 1.0], [1.0] * 5)
    assert found["median"] == 1.0
    assert found["mean_ratio"] == pytest.approx(2.6)
    assert found["low"] <= 1.0 <= found["high"]


def test_two_pairs_have_a_ratio_and_no_interval() -> None:
    found = _pairs.compare([2.0, 2.0], [1.0, 1.0])
    assert found["median"] == 2.0
    assert [found[name] for name in ("low", "high", "mean_ratio")] == [None] * 3


def test_a_one_token_answer_that_was_held_up_makes_no_long_one_look_fast() -> None:
    done = Machine({"ours": 0.01, "bare": 0.01}).rounds()
    done[2]["text_first"]["bare"]["seconds"] += 0.3
    assert overhead.series_of(done, "bare")["decode_tps"] == pytest.approx([100.0] * 6)


def test_series_of_unequal_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="equal length"):
        _pairs.compare([1.0], [1.0, 2.0])


def test_rounds_before_the_steady_part_are_left_out() -> None:
    slow_first = [50.0, 50.0, 50.0, *[100.0] * 8]
    assert _pairs.steady_from([slow_first, [100.0] * 11]) == (3, True)
    # Three steady rounds are too few to be called a steady part.
    assert _pairs.steady_from([[50.0] * 4 + [100.0] * 3, [100.0] * 7]) == (0, False)


def test_the_server_gets_the_same_engine_arguments() -> None:
    words = _sides.server_arguments(
        {
            "model": "folder",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "limit_mm_per_prompt": {"image": 1},
            "quantization": None,
            "use_tqdm_on_load": False,
        }
    )
    assert words == [
        *("--model", "folder"),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--limit-mm-per-prompt", '{"image": 1}'),
    ]


class Recording:
    """A side that only looks at what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str, int]] = []

    def prepare(self, image: Any) -> Any:
        return image

    def ask(self, prepared: Any, text: str, tokens: int) -> dict[str, Any]:
        self.seen.append((prepared, text, tokens))
        return {"output_tokens": tokens}


def test_a_request_with_a_number_has_its_own_picture_and_one_without_is_text() -> None:
    case = Case("c", "C", "What?", Image.new("RGB", (8, 8)))
    side, ticks = Recording(), iter([1.0, 3.5, 4.0, 5.0])
    found = _sides.timed(side, case, 7, 3, clock=lambda: next(ticks))
    assert found["seconds"] == 2.5
    _sides.timed(side, case, None, 2, clock=lambda: next(ticks))
    (picture, question, _), (none, text, _) = side.seen
    assert picture.getpixel((7, 7)) == (0, 0, 7) and question == "What?"
    assert none is None and text == _sides.TEXT


def test_a_side_that_dies_is_told_with_the_end_of_its_log(tmp_path: Any) -> None:
    side = _sides.Process("nonsense", {"unknown_option": 1}, tmp_path / "log")
    try:
        with pytest.raises(_sides.BenchmarkError, match="unknown_option"):
            side.ready()
    finally:
        side.close()
