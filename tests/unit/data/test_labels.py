"""What integers look like, and whether they can be classes: extremes with their places, and each refusal."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.labels import (
    MAX_CLASSES,
    Extreme,
    Labels,
    Unclassed,
    join,
    labels_of,
    labels_of_counts,
    misfit,
    objection,
)
from hvd_train.errors import DataError


def look(values: npt.ArrayLike, dtype: str = "int64", **options: object) -> Labels:
    return labels_of(np.asarray(values, dtype), "y", "a.h5", **options)  # type: ignore[arg-type]


def refusal(values: npt.ArrayLike, dtype: str = "int64") -> str:
    return objection(look(values, dtype), "y", "a.h5")


def test_extremes_are_found_with_their_rows() -> None:
    found = look([[3, 5], [9, 4], [1, 9]], first_row=100)
    assert (found.count, found.num_classes) == (6, 10)
    assert (found.lowest, found.highest) == (Extreme(1, "y", "a.h5", 102), Extreme(9, "y", "a.h5", 101))


def test_ignored_values_are_left_out_unless_they_are_tokens() -> None:
    values = [[-100, 2], [-100, -100], [7, -100]]
    found = look(values, "int8", first_row=10)
    assert (found.count, found.lowest, found.highest) == (
        2,
        Extreme(2, "y", "a.h5", 10),
        Extreme(7, "y", "a.h5", 12),
    )
    assert look(values, ignore=False).lowest == Extreme(-100, "y", "a.h5", 0)
    assert look([-100, -100]) == Labels()
    assert (look([-7, -3]).num_classes, Labels().num_classes) == (1, 1)
    assert look([]) == Labels()


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_every_integer_type(dtype: str) -> None:
    top = True if dtype == "bool" else np.iinfo(dtype).max
    found = look([0, 1, top], dtype)
    assert found.num_classes == int(top) + 1, "exact, above 2^63 as well"
    assert bool(refusal([0, 1, top], dtype)) == (int(top) + 1 > MAX_CLASSES)


def test_blocks_joined_are_the_whole() -> None:
    values = np.random.default_rng(0).integers(-5, 1 << 40, 1000)
    blocks = [look(values[i : i + 37], first_row=i) for i in range(0, 1000, 37)]
    assert join(blocks) == look(values)
    assert join([]) == Labels()
    assert join([look([-1, 1]), look([5] * 3), look([-1, 3])]).different == {-1, 1, 3, 5}
    assert join([look(-np.arange(600)), look(-np.arange(1200))]).different is None
    assert join([look(np.arange(600)), look(np.arange(400) + 600)]).different == set(range(1000))
    assert join([look(np.arange(600)), look(np.arange(401) + 600)]).different is None
    many = np.random.default_rng(0).integers(0, 900, 1 << 19)
    assert look(many).different == set(many.tolist()), "counted in pieces"


def test_counts_of_a_header_say_the_same_as_the_values() -> None:
    found = labels_of_counts((0, 3, 0, 2), "y", "a.h5")
    assert (found.count, found.num_classes, found.lowest) == (5, 4, Extreme(1, "y", "a.h5"))
    assert found.different == {1, 3}
    assert labels_of_counts((0, 0), "y", "a.h5") == Labels()


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 2],
        [1, 2, 3],  # class 0 never occurs
        [0, 50_256],  # a large vocabulary and little text
        [MAX_CLASSES - 1],
        [-100, 0, 1],
        np.arange(MAX_CLASSES + 5),  # as many values as classes
    ],
)
def test_values_that_are_classes(values: npt.ArrayLike) -> None:
    assert refusal(values) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [0, 2, -3],
            ["a.h5: `y` holds -3 in row 2; expected class numbers 0, 1, 2", "if that marks targets without"],
        ),
        ([1, -1, 1], ["holds -1 in row 1", "Set data.classes = ['-1', '1'], or write them as 0"]),
        ([1, -1, 0], ["holds -1 in row 1", "set data.ignore_index = -1 if", "number them from 0"]),
        ([0, MAX_CLASSES], ["1,048,577 classes for 2 values, 2 of them different", "numpy.unique(y, return"]),
        (17 * 10**17 + np.arange(2000), ["in row 1999", "more than 1,000 of them different", "'regression'"]),
        ([-100, -100], ["a.h5: every value of `y` is -100, which marks targets to ignore"]),
    ],
)
def test_values_that_are_not_classes_are_refused_with_a_remedy(
    values: npt.ArrayLike, words: list[str]
) -> None:
    text = refusal(values)
    for expected in words:
        assert expected in text
    assert "\n" not in text


def test_invalid_tokens_are_reported_as_tokens() -> None:
    text = objection(look([3, -100], ignore=False), "y", "a.h5", tokens=True)
    assert text.startswith(
        "a.h5: `y` holds -100 in row 1; expected tokens 0, 1, 2, ... Number the tokens from 0."
    )
    assert "regression" not in text


def test_types_and_shapes_that_are_not_class_numbers() -> None:
    assert misfit("y", FieldSpec(shape=(1,), dtype="uint8")) == ""
    assert misfit("y", FieldSpec(shape=(), dtype="bool")) == ""
    assert "in data.classes, such as ['0', '1']" in misfit("y", FieldSpec(shape=(), dtype="float64"))
    assert "Set data.one_hot = true" in misfit("y", FieldSpec(shape=(3,), dtype="float32"))


def test_only_a_task_that_asks_for_the_number_of_classes_is_refused() -> None:
    fields = {"x": FieldSpec(shape=(2,), dtype="float32"), "y": FieldSpec(shape=(), dtype="int64")}
    plain = SampleSpec(inputs="x", targets="y", fields=fields, num_classes=1 << 40, scale=0.5)
    spec: SampleSpec = Unclassed(plain, "a.h5: the reason")
    for same in (spec, copy.copy(spec), pickle.loads(pickle.dumps(spec))):
        assert (same.inputs, same.targets, same.fields, same.scale) == ("x", "y", fields, 0.5)
        assert same.to_json() == plain.to_json(), "as it has always been saved"
        assert "1099511627776" in repr(same)
        with pytest.raises(DataError, match=r"a\.h5: the reason"):
            _ = same.num_classes
    assert SampleSpec.from_json(plain.to_json()) == plain
