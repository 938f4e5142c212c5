"""Messages and tensors between a rank and its worker process: a socket, and memory that both map.

The memory has no name: it is gone when both processes are, however they end.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

BUFFERS = 3
"""Of each direction, used in turn. Before a message is sent, the one of so many before it must have been
received."""

_ALIGNMENT = 64
_HEADER = struct.Struct("<Q")
"""Bytes of the message that follows."""


class _Layout(NamedTuple):
    """Where a tensor is in the memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@final
class Channel:
    """One end of a connection, for one thread at a time. Raises `EOFError` or `ConnectionError` once the
    other end is closed."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sent = 0
        self._to: list[mmap.mmap | None] = [None] * BUFFERS
        self._from: list[mmap.mmap | None] = [None] * BUFFERS

    def close(self) -> None:
        """Ends the connection. May be called twice."""
        self._socket.close()

    def send(self, message: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Sends `message`, which is pickled, and copies of `tensors`: strided, on the CPU, of any dtype."""
        buffer = self._sent % BUFFERS
        self._sent += 1
        layouts, size = _lay_out(tensors or {})
        memory, fd = self._to[buffer], None
        if size and (memory is None or len(memory) < size):
            fd = os.memfd_create("hvd_train-batch")
            os.ftruncate(fd, size)
            memory = self._to[buffer] = mmap.mmap(fd, size)
        for layout, tensor in zip(layouts, (tensors or {}).values(), strict=True):
            if tensor.numel():
                assert memory is not None  # it was made for that many bytes
                _view(memory, layout).copy_(tensor.detach())
        try:
            self._write(pickle.dumps((message, buffer, layouts)), fd)
        finally:
            if fd is not None:
                os.close(fd)

    def receive(self) -> tuple[Any, dict[str, Tensor]]:
        """The next message, and its tensors in memory that is the caller's."""
        content, fd = self._read()
        message, buffer, layouts = pickle.loads(content)
        if fd is not None:
            self._from[buffer] = mmap.mmap(fd, 0)
            os.close(fd)
        memory = self._from[buffer]
        tensors = {}
        for layout in layouts:
            if math.prod(layout.shape):
                assert memory is not None  # sent with the first tensors, or with larger ones
                tensors[layout.name] = _view(memory, layout).clone()
            else:
                tensors[layout.name] = torch.empty(layout.shape, dtype=layout.dtype)
        return message, tensors

    def _write(self, content: bytes, fd: int | None) -> None:
        header = _HEADER.pack(len(content))
        if fd is None:
            self._socket.sendall(header)
        else:
            socket.send_fds(self._socket, [header], [fd])
        self._socket.sendall(content)

    def _read(self) -> tuple[bytes, int | None]:
        header, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
        header += self._exactly(_HEADER.size - len(header)) if header else b""
        if not header:
            raise EOFError
        (size,) = _HEADER.unpack(header)
        return self._exactly(size), fds[0] if fds else None

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[list[_Layout], int]:
    """Where each tensor goes, and the bytes of all."""
    layouts, offset = [], 0
    for name, tensor in tensors.items():
        layouts.append(_Layout(name, tensor.dtype, tuple(tensor.shape), offset))
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return layouts, offset


def _view(memory: mmap.mmap, layout: _Layout) -> Tensor:
    count = math.prod(layout.shape)
    flat = torch.frombuffer(memory, dtype=layout.dtype, count=count, offset=layout.offset)
    return flat.reshape(layout.shape)
