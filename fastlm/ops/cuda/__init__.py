"""Backend ``"cuda"``: doors to ``fastlm._C``, the kernels in CUDA C++ of ``csrc/``."""
