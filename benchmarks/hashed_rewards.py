"""Rewards for a model that has learned nothing: a hash of the response, so that every group has unequal advantages.

Both sides of benchmarks/peers.py call it; it imports nothing of the project.
"""

import zlib


def hashed(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    return [zlib.crc32(response.encode()) / 2**32 for response in responses]
