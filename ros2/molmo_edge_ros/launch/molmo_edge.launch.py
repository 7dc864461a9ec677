"""Start the node, configure it, and activate it once the model is loaded."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

PARAMETERS = {"model": "demo", "question": "", "label": ""}


def generate_launch_description() -> LaunchDescription:
    defaults = {"image": "/camera/image_raw", **PARAMETERS}
    arguments = [DeclareLaunchArgument(name, default_value=one) for name, one in defaults.items()]
    # As text, which "yes" would not be otherwise.
    values = {
        name: ParameterValue(LaunchConfiguration(name), value_type=str) for name in PARAMETERS
    }
    node = LifecycleNode(
        package="molmo_edge_ros",
        executable="molmo_edge",
        name="molmo_edge",
        namespace="",
        parameters=[values],
        remappings=[("image", LaunchConfiguration("image"))],
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
        [*arguments, node, RegisterEventHandler(loaded), change(Transition.TRANSITION_CONFIGURE)]
    )
