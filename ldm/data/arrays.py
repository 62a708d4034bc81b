"""Arrays as the payload of a .npy member: plain bytes behind one header, compared and never interpreted.

Format: "NPY", version 1.0, of numpy.lib.format. Not np.load: it runs code that a stranger pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.image import BadImage

DTYPES: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32, "bool": np.bool_}


class Layout:
    """The dtype (a name of DTYPES) and shape that all arrays of one kind have."""

    def __init__(self, kind: str, dtype: str, shape: Sequence[int]) -> None:
        self.kind, self.dtype, self.shape = kind, np.dtype(DTYPES[dtype]).newbyteorder("<"), tuple(shape)
        self.size = int(np.prod(self.shape))
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {self.shape!r}, }}"
        text += " " * (-(10 + len(text) + 1) % 64) + "\n"
        self.header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
        self.nbytes = len(self.header) + self.size * self.dtype.itemsize

    def pack(self, array: NDArray[Any]) -> bytes:
        """The bytes of a member."""
        if array.shape != self.shape:
            raise ValueError(f"{self.kind} of shape {array.shape}, expected {self.shape}")
        return self.header + np.ascontiguousarray(array, self.dtype).tobytes()

    def unpack(self, data: bytes) -> NDArray[Any]:
        """The array, a view of the bytes; raises `BadImage("bad_KIND")` if they are anything else."""
        if len(data) != self.nbytes or not data.startswith(self.header):
            raise BadImage(f"bad_{self.kind}")
        return np.frombuffer(data, self.dtype, self.size, len(self.header)).reshape(self.shape)
