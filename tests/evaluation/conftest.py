"""A set of 12 random objects on 4 backgrounds, shaped like the quickstart's."""

import numpy as np
import pytest


class TinySet:
    backgrounds = ["red", "green", "white", "black"]
    colours = np.array([(220, 50, 47), (70, 160, 70), (250, 250, 250), (25, 25, 25)], np.uint8)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.objects = [f"object {i}" for i in range(12)]
        self.held_out = [(i, i % 4) for i in range(12)]
        self.shapes = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)

    def picture(self, i, j):
        picture = np.empty((16, 16, 3), np.uint8)
        picture[:] = self.colours[j]
        picture[4:12, 4:12] = self.shapes[i]
        return picture

    def caption(self, i, j):
        return f"{self.objects[i]} on a {self.backgrounds[j]} background"


@pytest.fixture
def tiny_set():
    return TinySet()
