"""Start the node, configure it, and activate it once the model is loaded."""

from launch import LaunchDescription
from launch.actions import EmitEvent, RegisterEventHandler
from launch.events import matches_action
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition


def generate_launch_description() -> LaunchDescription:
    node = LifecycleNode(
        package="molmo_edge_ros",
        executable="molmo_edge",
        name="molmo_edge",
        namespace="",
        parameters=[{"model": "demo", "question": "What is in the image?"}],
        remappings=[("image", "/camera/image_raw")],
    )

    def change(transition: int) -> EmitEvent:
        event = ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)
        return EmitEvent(event=event)

    loaded = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(Transition.TRANSITION_ACTIVATE)],
    )
    return LaunchDescription(
        [node, RegisterEventHandler(loaded), change(Transition.TRANSITION_CONFIGURE)]
    )
