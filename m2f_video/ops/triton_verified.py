"""Graphics cards that the Triton kernels have passed their tests on."""

VERIFIED: frozenset[tuple[int, int]] = frozenset({(9, 0)})
"""Compute capabilities (major, minor) of NVIDIA's cards; on these `auto` takes the kernels.

Add one after `make gpu` has passed on a card that has it; it prints the line.
"""
