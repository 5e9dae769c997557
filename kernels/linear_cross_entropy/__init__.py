from .launch import (
    backward,
    backward_refuses,
    forward,
    forward_refuses,
    gradients,
    gradients_refuses,
)

__all__ = [
    "backward",
    "backward_refuses",
    "forward",
    "forward_refuses",
    "gradients",
    "gradients_refuses",
]
