class Ask:
    class Goal:
        question: str

    class Result:
        def __init__(self, *, answer: str = ..., finish_reason: str = ...) -> None: ...

    class Feedback:
        def __init__(self, *, text_so_far: str) -> None: ...
