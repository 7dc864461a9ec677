from std_msgs.msg import Header

class Point:
    x: float
    y: float
    z: float

class PointStamped:
    header: Header
    point: Point
    def __init__(self, *, header: Header = ...) -> None: ...
