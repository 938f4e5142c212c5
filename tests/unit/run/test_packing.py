"""What a checkpoint's file can hold: it comes back as it was, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_train.errors import TaskError
from hvd_train.run.packing import pack, require_savable, split, unpack


def test_saved_values_are_restored() -> None:
    flat = torch.arange(6.0)
    state: dict[str, Any] = {
        "view": flat[:4].view(2, 2),
        "overlapping": flat[2:],
        "transposed": torch.arange(6).view(2, 3).t(),
        "é": torch.tensor(True),
        "complex": torch.ones(2, dtype=torch.complex64),
        "nan": float("nan"),
        "nested": {"a": [1, 0.5, None, "é"]},
    }
    require_savable(state, "a test")
    tensors, plain = split(state)
    found, rest = unpack(pack(tensors, plain))
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype is t.dtype and torch.equal(found[n], t) for n, t in tensors.items())
    assert repr(rest) == repr(plain)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("w", torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        ("w", torch.ones(1, dtype=torch.complex128), "torch.complex128"),
        ("__metadata__", torch.ones(1), "its name: "),
        ("a\ud800", torch.ones(1), "its name: "),
        ("w", {1: 2}, "is changed by a round trip through JSON"),
        ("w", (1, 2), "is changed by a round trip through JSON"),
        ("w", {"a": {1, 2}}, "it is a dict: Object of type set"),
        ("w", object(), "it is a object: "),
    ],
)
def test_state_that_cannot_be_restored_is_refused_with_its_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        require_savable({"fine": torch.ones(1), key: value}, "the model")
    assert str(caught.value).startswith(
        f"`{key.encode(errors='backslashreplace').decode()}` in the state of the"
    )
    str(caught.value).encode()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 40, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"]
)
def test_changed_bytes_are_one_error_or_none(content: bytes) -> None:
    if content.endswith(b"{}"):
        assert unpack(content) == ({}, {})
    else:
        with pytest.raises(ValueError, match="not in the safetensors format"):
            unpack(content)
