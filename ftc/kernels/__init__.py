"""Kernels behind the ftc:: operators. Each is tested against its operator's definition in plain PyTorch; nothing here is imported before use."""
