"""The ROS 2 package: its logic on a fake engine, its node on stand-ins of ROS, and its types."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault

ROS = Path(__file__).parents[2] / "ros2"
PACKAGE = ROS / "molmo_edge_ros"
POINT = '<points coords="1 1 500 250">mug</points>'


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))


def answer(turns: Any) -> str:
    if "mug" in turns[-1].text:
        return POINT
    return f"red is {int(np.asarray(turns[-1].images[0])[0, 0, 0])}"


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(answer, step_s=0.005)


def frame(red: int) -> Any:
    from molmo_edge_ros.looker import Frame

    return Frame(np.full((48, 64, 3), [red, 0, 0], np.uint8), f"header {red}")


def test_pixels_of_every_encoding() -> None:
    from molmo_edge_ros.looker import rgb

    # Two rows of two pixels, padded to ten bytes.
    data = bytes(range(20))
    assert rgb("rgb8", 2, 2, 10, data)[1].tolist() == [[10, 11, 12], [13, 14, 15]]
    assert rgb("bgr8", 2, 2, 10, data)[0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert rgb("bgra8", 2, 2, 10, data)[0].tolist() == [[2, 1, 0], [6, 5, 4]]
    assert rgb("mono8", 2, 2, 10, data)[1].tolist() == [[10] * 3, [11] * 3]
    for encoding, step, message in (
        ("bayer_rggb8", 10, "cannot read"),
        ("rgb8", 99, "fewer bytes"),
        ("rgb8", 5, "do not hold"),
    ):
        with pytest.raises(ValueError, match=message):
            rgb(encoding, 2, 2, step, data)


def test_the_newest_frame_is_asked_about_and_others_are_dropped(vlm: EdgeVLM) -> None:
    from molmo_edge_ros.looker import Looker

    answers: queue.Queue[Any] = queue.Queue()
    looker = Looker(vlm, "What colour?", "", answers.put)
    for red in range(5):
        looker.offer(frame(red))
    looker.start()
    answer = answers.get(timeout=10)
    assert answer.result.text == "red is 4" and answer.frame.header == "header 4"
    assert looker.dropped == 4 and answer.pixels() == []
    looker.offer(frame(9))
    assert answers.get(timeout=10).result.text == "red is 9"
    looker.stop()
    said = looker.diagnostics()
    assert (said["state"], said["answers"], said["error"]) == ("ready", "2", "")
    assert float(said["seconds of the last answer"]) > 0


def test_points_are_pixels_and_errors_are_answers(vlm: EdgeVLM) -> None:
    from molmo_edge_ros.looker import Looker

    answers: queue.Queue[Any] = queue.Queue()
    looker = Looker(vlm, "", "mug", answers.put)
    looker.start()
    looker.offer(frame(1))
    assert answers.get(timeout=10).pixels() == [(32, 12)]
    looker.options = {"timeout": 0.001}
    looker.offer(frame(2))
    assert "deadline" in str(answers.get(timeout=10).error) and "deadline" in str(looker.error)
    looker.stop()


def test_the_state_of_a_dead_engine_and_an_answer_nobody_takes() -> None:
    from molmo_edge_ros.looker import Looker

    broken = FakeEngine.factory("a", faults=[Fault("step", RuntimeError("broken"))])
    answers: queue.Queue[Any] = queue.Queue()
    with EdgeVLM(engine=broken) as vlm:
        looker = Looker(vlm, "What?", "", answers.put)
        looker.start()
        looker.offer(frame(1))
        assert answers.get(timeout=10).error is not None
        looker.stop()
        assert (looker.diagnostics()["state"], looker.diagnostics()["model"]) == ("dead", "fake")

    def gone(answer: Any) -> None:
        answers.put(answer)
        raise RuntimeError("no publisher")

    with EdgeVLM(engine=FakeEngine.factory("a")) as vlm:
        looker = Looker(vlm, "What?", "", gone)
        looker.start()
        for red in range(2):
            looker.offer(frame(red))
            assert answers.get(timeout=10).frame.header == f"header {red}"
        looker.stop()
        assert looker.diagnostics()["error"] == "RuntimeError: no publisher"


def test_a_goal_has_feedback_and_can_be_cancelled(vlm: EdgeVLM) -> None:
    from molmo_edge_ros.looker import Looker

    looker = Looker(vlm, "", "", lambda answer: None)
    with pytest.raises(ValueError, match="no image has arrived"):
        looker.ask("What?", print, lambda: False)
    looker.offer(frame(3))
    texts: list[str] = []
    result = looker.ask("What?", texts.append, lambda: False)
    assert result is not None and texts[-1] == result.text == "red is 3"
    assert looker.ask("What?", texts.append, lambda: True) is None
    assert vlm.query(None, "mug").text == POINT  # nothing is left in the engine


class Node:
    """What the node uses of `rclpy.lifecycle.LifecycleNode`."""

    def __init__(self, name: str) -> None:
        self.values: dict[str, Any] = {}
        self.topics: dict[str, list[Any]] = {}
        self.get_logger = mock.MagicMock()
        self.get_clock = mock.MagicMock()
        self.destroy_timer = self.destroy_subscription = self.destroy_publisher = mock.Mock()
        self.destroy_node = mock.Mock()

    def declare_parameter(self, name: str, value: Any) -> None:
        self.values[name] = {"label": "mug", "timeout_s": 5.0}.get(name, value)

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.values[name])

    def get_name(self) -> str:
        return "molmo_edge"

    def create_publisher(self, kind: Any, topic: str, qos: Any) -> Any:
        return SimpleNamespace(publish=self.topics.setdefault(topic, []).append)

    def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any, **_: Any) -> Any:
        self.callback = callback

    def create_timer(self, seconds: float, callback: Any) -> Any:
        self.tick = callback

    def on_activate(self, state: Any) -> str:
        return "success"

    on_deactivate = on_activate


def stand_ins() -> dict[str, ModuleType]:
    class Message(SimpleNamespace):
        OK, WARN = b"\0", b"\1"

        def __init__(self, **values: Any) -> None:
            super().__init__(**{"point": SimpleNamespace(), "header": SimpleNamespace(), **values})

    names = [
        *("rclpy", "rclpy.action", "rclpy.action.server", "rclpy.callback_groups", "rclpy.qos"),
        *("rclpy.executors", "rclpy.lifecycle", "sensor_msgs", "sensor_msgs.msg", "std_msgs"),
        *("std_msgs.msg", "geometry_msgs", "geometry_msgs.msg", "diagnostic_msgs"),
        *("diagnostic_msgs.msg", "molmo_edge_interfaces", "molmo_edge_interfaces.action"),
    ]
    ros: dict[str, Any] = {name: mock.MagicMock() for name in names}
    ros["rclpy.lifecycle"].LifecycleNode = Node
    ros["rclpy.executors"].ExternalShutdownException = type("Shutdown", (Exception,), {})
    ros["rclpy.lifecycle"].TransitionCallbackReturn = SimpleNamespace(
        SUCCESS="success", FAILURE="failure"
    )
    for name in ("std_msgs.msg", "geometry_msgs.msg", "diagnostic_msgs.msg"):
        for kind in ("String", "PointStamped", "DiagnosticArray", "DiagnosticStatus", "KeyValue"):
            setattr(ros[name], kind, Message)
    ros["molmo_edge_interfaces.action"].Ask = SimpleNamespace(Result=Message, Feedback=Message)
    return ros


def test_the_node_lives_from_configure_to_cleanup() -> None:
    sys.modules.pop("molmo_edge_ros.node", None)
    with mock.patch.dict(sys.modules, stand_ins()):
        from molmo_edge_ros import node as module

        node: Any = module.MolmoEdge()
        fake = FakeEngine.factory(answer, step_s=0.005)
        with mock.patch.object(module, "EdgeVLM", lambda *_, **__: EdgeVLM(engine=fake)):
            assert node.on_configure(None) == "success"
        assert node.on_activate(None) == "success"
        image = SimpleNamespace(
            encoding="rgb8", height=48, width=64, step=192, data=bytes(48 * 192), header="stamp"
        )
        node.callback(image)
        points = node.topics["~/points"]
        for _ in range(1000):
            if points:
                break
            time.sleep(0.01)
        [point] = points
        assert (point.header, point.point.x, point.point.y) == ("stamp", 32.0, 12.0)
        image.encoding = "yuv422"
        node.callback(image)
        assert "cannot read yuv422" in node.get_logger().error.call_args[0][0]
        node.tick()
        [array] = node.topics["/diagnostics"]
        assert array.status[0].message == "ready" and array.status[0].level == b"\0"
        goal = mock.MagicMock(is_cancel_requested=False)
        goal.request.question = "What colour?"
        assert node._execute(goal).answer == "red is 0"
        goal.succeed.assert_called_once()
        goal.is_cancel_requested = True
        node._execute(goal)
        goal.canceled.assert_called_once()
        assert node.on_deactivate(None) == "success"
        assert node._execute(goal).answer == "the node is not active"
        assert node.on_cleanup(None) == "success" and fake.calls["close"] == 1
        with mock.patch.object(module, "EdgeVLM", side_effect=module.MolmoEdgeError("no model")):
            assert node.on_configure(None) == "failure"


def test_what_fails_halfway_leaves_nothing_open() -> None:
    sys.modules.pop("molmo_edge_ros.node", None)
    with mock.patch.dict(sys.modules, stand_ins()):
        from molmo_edge_ros import node as module

        node: Any = module.MolmoEdge()
        fake = FakeEngine.factory(answer)
        with mock.patch.object(module, "EdgeVLM", lambda *_, **__: EdgeVLM(engine=fake)):
            with mock.patch.object(module, "ActionServer", side_effect=RuntimeError("no action")):
                assert node.on_configure(None) == "failure"
            assert fake.calls["close"] == 1
            assert "no action" in node.get_logger().error.call_args[0][0]
            assert node.on_configure(None) == "success"
        with mock.patch.object(node, "create_timer", side_effect=RuntimeError("no timer")):
            assert node.on_activate(None) == "failure"
        assert "molmo-edge-looker" not in {thread.name for thread in threading.enumerate()}
        assert node.on_activate(None) == "success" and node.on_error(None) == "success"
        assert fake.calls["close"] == 2
        executor = module.MultiThreadedExecutor.return_value
        executor.spin.side_effect = module.ExternalShutdownException
        module.main()


@pytest.mark.slow
def test_the_node_has_the_types_of_ros() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mypy", str(PACKAGE / "molmo_edge_ros"),
         "--cache-dir", "/dev/null"],
        capture_output=True, text=True, cwd=ROS.parent,
        env={**os.environ, "MYPYPATH": f"{ROS / 'stubs'}:{PACKAGE}"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_the_packages_say_what_they_need() -> None:
    for name in ("molmo_edge_ros", "molmo_edge_interfaces"):
        root = ElementTree.parse(ROS / name / "package.xml").getroot()
        assert root.findtext("name") == name and root.findtext("license") == "Apache-2.0"
    used = (PACKAGE / "molmo_edge_ros" / "node.py").read_text()
    for needed in ElementTree.parse(PACKAGE / "package.xml").getroot().findall("depend"):
        assert str(needed.text).replace("lifecycle_msgs", "rclpy.lifecycle") in used
