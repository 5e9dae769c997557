from .launch import forward, forward_refuses

__all__ = ["forward", "forward_refuses"]
