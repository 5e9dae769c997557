"""Triton kernels and their launchers.  Imports torch, triton and itself, nothing of ``fastlm``."""
