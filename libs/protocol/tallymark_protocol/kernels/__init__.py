"""Numba kernels that more than one service needs."""
