"""The node: configure loads the model, activate subscribes. What it does is in `looker`."""

from __future__ import annotations

from contextlib import ExitStack

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PointStamped
from molmo_edge_interfaces.action import Ask
from rclpy.action import ActionServer, CancelResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String

from molmo_edge import EdgeVLM
from molmo_edge.errors import MolmoEdgeError
from molmo_edge_ros.looker import Answer, Frame, Looker, rgb

DONE, FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class MolmoEdge(LifecycleNode):
    """Parameters: ``model``, ``config``, ``question``, ``label``, ``max_tokens``, ``timeout_s``.

    Subscribes to ``image``. Publishes ``~/answer``, ``~/points`` in pixels with the image's header,
    and ``/diagnostics``; serves the action ``~/ask``.
    """

    def __init__(self) -> None:
        super().__init__("molmo_edge")
        for name, default in (("model", ""), ("config", ""), ("question", ""), ("label", "")):
            self.declare_parameter(name, default)
        self.declare_parameter("max_tokens", 100)
        self.declare_parameter("timeout_s", 10.0)
        self._group = ReentrantCallbackGroup()
        self._vlm: EdgeVLM | None = None
        self._looker: Looker | None = None
        # What configure and activate opened, to close in reverse.
        self._configured, self._active = ExitStack(), ExitStack()

    def _text(self, name: str) -> str:
        return str(self.get_parameter(name).value)

    def _failed(self, exc: Exception) -> TransitionCallbackReturn:
        self.get_logger().error(f"{type(exc).__name__}: {exc}")  # rclpy does not log it
        return FAILED

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model; this takes seconds to minutes."""
        try:
            with ExitStack() as opened:
                vlm = EdgeVLM(self._text("model") or None, config=self._text("config") or None)
                opened.enter_context(vlm)
                self._answer = self.create_publisher(String, "~/answer", 1)
                opened.callback(self.destroy_publisher, self._answer)
                self._points = self.create_publisher(PointStamped, "~/points", 10)
                opened.callback(self.destroy_publisher, self._points)
                self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 1)
                opened.callback(self.destroy_publisher, self._diagnostics)
                ask = ActionServer(
                    self, Ask, "~/ask", self._execute, callback_group=self._group,
                    cancel_callback=lambda _: CancelResponse.ACCEPT,
                )  # fmt: skip
                opened.callback(ask.destroy)
                self._vlm, self._configured = vlm, opened.pop_all()
        except Exception as exc:
            return self._failed(exc)
        return DONE

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._vlm is None:
            return FAILED
        try:
            options = {
                "max_tokens": int(self.get_parameter("max_tokens").value),
                "timeout": float(self.get_parameter("timeout_s").value),
            }
            with ExitStack() as opened:
                looker = Looker(
                    self._vlm, self._text("question"), self._text("label"), self._answered, options
                )
                looker.start()
                opened.callback(looker.stop)
                images = self.create_subscription(
                    Image, "image", self._offer, NEWEST, callback_group=self._group
                )
                opened.callback(self.destroy_subscription, images)
                opened.callback(self.destroy_timer, self.create_timer(1.0, self._diagnose))
                self._looker, self._active = looker, opened.pop_all()
        except Exception as exc:
            return self._failed(exc)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop asking after the answer that is generated now."""
        self._looker = None
        self._active.close()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.close()

    on_shutdown = on_error = on_cleanup

    def close(self) -> TransitionCallbackReturn:
        """End the thread and the engine."""
        self._looker = None
        self._active.close()
        self._vlm = None
        self._configured.close()
        return DONE

    def _offer(self, message: Image) -> None:
        looker = self._looker
        if looker is None:
            return
        try:
            pixels = rgb(
                message.encoding, message.height, message.width, message.step, bytes(message.data)
            )
        except ValueError as exc:
            self.get_logger().error(str(exc), throttle_duration_sec=10.0)
        else:
            looker.offer(Frame(pixels, message.header))

    def _answered(self, answer: Answer) -> None:
        if answer.error is not None:
            message = f"{type(answer.error).__name__}: {answer.error}"
            self.get_logger().warning(message, throttle_duration_sec=10.0)
        elif answer.result is not None:
            self._answer.publish(String(data=answer.result.text))
        for column, row in answer.pixels():
            point = PointStamped(header=answer.frame.header)
            point.point.x, point.point.y = float(column), float(row)
            self._points.publish(point)

    def _execute(self, goal: ServerGoalHandle) -> Ask.Result:
        def feedback(text: str) -> None:
            goal.publish_feedback(Ask.Feedback(text_so_far=text))

        looker = self._looker
        try:
            if looker is None:
                raise ValueError("the node is not active")
            result = looker.ask(goal.request.question, feedback, lambda: goal.is_cancel_requested)
        except (MolmoEdgeError, ValueError) as exc:
            goal.abort()
            return Ask.Result(answer=str(exc), finish_reason="error")
        if result is None:
            goal.canceled()
            return Ask.Result()
        goal.succeed()
        return Ask.Result(answer=result.text, finish_reason=result.finish_reason)

    def _diagnose(self) -> None:
        looker = self._looker
        if looker is None:
            return
        values = looker.diagnostics()
        healthy = values["state"] == "ready" and not values["error"]
        status = DiagnosticStatus(
            level=DiagnosticStatus.OK if healthy else DiagnosticStatus.WARN,
            name=self.get_name(),
            message=values["error"] or values["state"],
            values=[KeyValue(key=key, value=value) for key, value in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)


def main() -> None:
    rclpy.init()
    node, executor = MolmoEdge(), MultiThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()
