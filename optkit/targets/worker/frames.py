"""Frames on a pipe: a JSON message with arrays beside it.

::

    "OPTK" | bytes of JSON: u32 | bytes of arrays: u64 | JSON | the arrays, one after the other, C order

The JSON is ``{"message": {...}, "arrays": [[name, dtype, shape], ...]}``; numbers in the header are big-endian.
"""

from __future__ import annotations

import json
import struct
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

MAGIC = b"OPTK"
HEADER = struct.Struct(">4sIQ")
MAX_JSON = 1 << 26


class FrameError(ValueError):
    """What came is not a frame, or not all of one."""


def write_frame(
    file: IO[bytes], message: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> None:
    """Write one frame and flush."""
    arrays = arrays or {}
    described = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({"message": message, "arrays": described}).encode()
    file.write(HEADER.pack(MAGIC, len(text), sum(array.nbytes for array in arrays.values())) + text)
    for array in arrays.values():
        file.write(array.tobytes())
    file.flush()


def read_frame(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]] | None:
    """The next frame, or None where the pipe ends.

    Raises:
        FrameError: something else came, or the pipe ended inside a frame.
    """
    head = file.read(HEADER.size)
    if not head:
        return None
    if head[: len(MAGIC)] != MAGIC[: len(head)] or len(head) < HEADER.size:
        raise FrameError(f"not a frame: {head!r}")
    _, text_bytes, array_bytes = HEADER.unpack(head)
    if text_bytes > MAX_JSON:
        raise FrameError(f"a message of {text_bytes} bytes is over the limit of {MAX_JSON}")
    try:
        document = json.loads(_exactly(file, text_bytes).decode())
        message, described = document["message"], document["arrays"]
        arrays = {}
        for name, dtype, shape in described:
            arrays[name] = _read_array(file, dtype, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, FrameError) else FrameError(f"a frame without sense: {error}") from error
    if sum(array.nbytes for array in arrays.values()) != array_bytes:
        raise FrameError(f"the header says {array_bytes} bytes of arrays, but {described} follow")
    return message, arrays


def _read_array(file: IO[bytes], dtype: str, shape: list[int]) -> np.ndarray[Any, Any]:
    import numpy as np

    count = 1
    for size in shape:
        count *= size
    data = bytearray(_exactly(file, count * np.dtype(dtype).itemsize))
    return np.frombuffer(data, dtype).reshape(shape)


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise FrameError(f"the pipe ended after {len(data)} of {count} bytes")
    return data
