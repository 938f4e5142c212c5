"""Text as sequences of tokens: bytes, or what a function of the user makes of each line."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import BinaryIO, final

import numpy as np

from hvd_train.data.files import require_regular
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import INPUTS, TARGETS, Block, Source, name_of, rows_of_block
from hvd_train.errors import DataError
from hvd_train.io.user_module import load_module

_READ_BYTES = 1 << 20


@final
class TextSource(Source):
    """Inputs [length] and targets [length], the tokens that follow: uint8 of bytes, else int32. The files are
    one text; tokens at its end that do not fill a sequence are left out.

    Args:
        tokenizer: `bytes`, or `FILE.py:FUNCTION` or `MODULE:FUNCTION`, which makes whole numbers of a line.
        length: tokens of a sequence.

    Raises `DataError`.
    """

    def __init__(self, paths: Sequence[str], tokenizer: str = "bytes", length: int = 128) -> None:
        self._paths = list(paths)
        self._length = length
        self._tokenizer_name = tokenizer
        self._tokenize = None if tokenizer == "bytes" else _load(tokenizer)
        self._num_bytes = self._read_bytes = 0
        for path in paths:
            try:
                require_regular(path, "a text file")
                self._num_bytes += os.path.getsize(path)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}. Expected a text file in UTF-8.") from None
        if self._num_bytes <= length:
            raise DataError(
                f"{self.name}: {self._num_bytes} bytes. Expected more than the {length} tokens of a "
                "sequence: "
                "give more text, or a smaller --length."
            )

    @property
    def name(self) -> str:
        return name_of(self._paths)

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        field = FieldSpec(shape=(self._length,), dtype="uint8" if self._tokenize is None else "int32")
        return {INPUTS: field, TARGETS: field}

    @property
    def num_rows(self) -> int | None:
        return (self._num_bytes - 1) // self._length if self._tokenize is None else None

    @property
    def files(self) -> Collection[str]:
        module = self._tokenizer_name.rpartition(":")[0]
        return [*self._paths, *([module] if module.endswith(".py") else [])]

    @property
    def position(self) -> tuple[int, int]:
        return self._read_bytes, self._num_bytes

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        most = rows_of_block(self.fields) * self._length + 1
        waiting: list[Array] = []
        count = 0
        for tokens in self._tokens(most):
            waiting.append(tokens)
            count += len(tokens)
            if count >= most:
                whole = np.concatenate(waiting)
                yield from self._cut(whole, start)
                rows = (count - 1) // self._length
                waiting = [whole[rows * self._length :].copy()]
                start, count = max(0, start - rows), len(waiting[0])
        if count > self._length:
            yield from self._cut(np.concatenate(waiting), start)

    def _cut(self, tokens: Array, start: int) -> Iterator[Block]:
        """The sequences of some tokens from number `start` on."""
        rows = (len(tokens) - 1) // self._length
        if start < rows:
            inputs, targets = (
                tokens[at : at + rows * self._length].reshape(rows, self._length)[start:] for at in (0, 1)
            )
            yield {INPUTS: inputs, TARGETS: targets}

    def _tokens(self, most: int) -> Iterator[Array]:
        """All tokens, at most so many at once: a line may be long."""
        dtype = np.dtype(self.fields[INPUTS].dtype)
        self._read_bytes = 0
        for path in self._paths:
            with open(path, "rb") as file:
                if self._tokenize is None:
                    while piece := file.read(_READ_BYTES):
                        self._read_bytes += len(piece)
                        yield np.frombuffer(piece, np.uint8)
                    continue
                for where, text in self._lines(file, path):
                    tokens = self._of_line(where, text)
                    del text  # a long one need not be there any more
                    for first in range(0, len(tokens), most):
                        yield tokens[first : first + most].astype(dtype)
                    del tokens

    def _lines(self, file: BinaryIO, path: str) -> Iterator[tuple[str, str]]:
        """What each line is called in messages, and its text."""
        number = 0
        while line := file.readline():
            number += 1
            self._read_bytes += len(line)
            where = f"{path}: line {number}"
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {error.reason}. Expected text in UTF-8: convert it.") from None
            del line
            yield where, text
            del text

    def _of_line(self, where: str, text: str) -> Array:
        assert self._tokenize is not None  # bytes have no lines
        try:
            tokens = np.asarray(self._tokenize(text))
        except Exception as error:
            raise DataError(
                f"{where}: --tokenizer {self._tokenizer_name} raised {type(error).__name__}: {error}. "
                "Expected "
                "whole numbers: correct it."
            ) from error
        if not tokens.size:
            return np.empty(0, np.int32)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**31:
            raise DataError(
                f"{where}: --tokenizer {self._tokenizer_name} gave {tokens.dtype} {list(tokens.shape)}. "
                "Expected "
                "whole numbers from 0 to 2,147,483,647 in a list: correct it."
            )
        return tokens


def _load(tokenizer: str) -> Callable[[str], Sequence[int]]:
    source, _, name = tokenizer.rpartition(":")
    if not source:
        raise DataError(
            f"--tokenizer {tokenizer}: expected `bytes`, `file.py:function` or `package.module:function`."
        )
    function = getattr(load_module(source, "--tokenizer", DataError), name, None)
    if not callable(function):
        raise DataError(f"--tokenizer {tokenizer}: {source} has no function {name}. Name one that it has.")
    return function  # type: ignore[no-any-return]
