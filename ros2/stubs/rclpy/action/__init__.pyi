from collections.abc import Callable
from enum import Enum
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.lifecycle import LifecycleNode

class CancelResponse(Enum):
    REJECT = 1
    ACCEPT = 2

class ActionServer:
    def __init__(
        self,
        node: LifecycleNode,
        action_type: type,
        action_name: str,
        execute_callback: Callable[..., Any],
        *,
        callback_group: CallbackGroup | None = None,
        cancel_callback: Callable[..., CancelResponse] = ...,
    ) -> None: ...
    def destroy(self) -> None: ...
