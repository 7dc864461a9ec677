from array import array

from std_msgs.msg import Header

class Image:
    header: Header
    height: int
    width: int
    encoding: str
    step: int
    data: array[int]
