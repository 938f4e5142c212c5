"""Datasets with an index as a source: every row once an epoch, and each sample made once for its fields."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.bits import Bits
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.damage import Damage
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec
from hvd_train.data.labels import labels_of
from hvd_train.data.picked import Picked
from hvd_train.data.python.facts import facts_of, reading_lines
from hvd_train.data.readers.plan import ReadingPlan
from hvd_train.data.rows import Rows
from hvd_train.data.screen import training_screen, usable
from hvd_train.data.selection import needed_to_predict, select_rows
from hvd_train.data.survey import survey
from hvd_train.errors import DataError
from tests.unit.data.python_datasets import seen, write_module
from tests.unit.data.shards import row_numbers, write_foreign

ROWS = 60


def catalog_of(name: str, **data: Any) -> Catalog:
    return open_catalog(DataConfig(path=name, **data))


def plan_of(name: str, rank: int = 0, ranks: int = 1, **data: Any) -> ReadingPlan:
    config = DataConfig(path=name, batch_size=8, **data)
    return ReadingPlan(catalog=open_catalog(config), data=config, seed=3, rank=rank, world_size=ranks)


def message(name: str, **data: Any) -> str:
    """Of the error that reading all rows ends with."""

    def read() -> None:
        catalog = catalog_of(name, **data)
        Rows(catalog.train, catalog.sample.fields).read(0, ROWS)

    with pytest.raises(DataError) as error:
        read()
    return str(error.value)


KINDS = {
    "a dataset of torch": "",
    "a dict of arrays": """
        class Plain(Plain):
            def __getitem__(self, i):
                return {"inputs": inputs_of(i), "targets": np.int64(i % 7), "more": "text"}
    """,
    "a list": "Plain = [(inputs_of(i), i % 7) for i in range(60)]",
    "an object": "Plain = Plain()",
    "a function": """
        class Own:
            def __len__(self):
                return 60

            def __getitem__(self, i):
                return inputs_of(i).tolist() and inputs_of(i), torch.tensor(i % 7)

        def Plain(number=1):
            return Own()
    """,
    "tensors that need a gradient": """
        class Plain(Plain):
            def __getitem__(self, i):
                return torch.from_numpy(inputs_of(i)).requires_grad_(), i % 7
    """,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reading", ["memory", "stream", "auto"])
def test_every_row_once_an_epoch(kind: str, reading: Any, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, KINDS[kind])}:Plain"
    orders = []
    for _ in range(2):
        reader = plan_of(name, reading=reading).reader(1 << 30)
        for epoch in range(2):
            reader.start_epoch(epoch)
            orders.append([row for _ in range(8) for row in row_numbers(reader.next_batch(8) or {})])
        reader.close()
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ROWS))


def test_the_sample_is_that_of_the_same_rows_in_a_file(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", ROWS)
    of_file = catalog_of(str(tmp_path / "a.h5"))
    made = catalog_of(f"{write_module(tmp_path)}:Plain")
    assert made.sample == of_file.sample
    assert made.sample.fields == {
        "inputs": FieldSpec(shape=(3,), dtype="float32"),
        "targets": FieldSpec(shape=(), dtype="int64"),
    }
    assert made.sample.num_classes == 7


@pytest.mark.parametrize("data", [{}, {"redeal": "epoch"}, {"order": "global"}], ids=str)
@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_ranks_share_the_rows(data: dict[str, Any], reading: Any, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Plain"
    plans = [plan_of(name, rank, 3, reading=reading, **data) for rank in range(3)]
    readers = [plan.reader(1 << 30) for plan in plans]
    for epoch in range(2):
        used: list[int] = []
        for reader in readers:
            reader.start_epoch(epoch)
            while (batch := reader.next_batch(8)) is not None:
                used += row_numbers(batch)
        assert sorted(used) == list(range(ROWS))
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_a_reader_goes_on_where_it_was(reading: Any, tmp_path: Path) -> None:
    plan = plan_of(f"{write_module(tmp_path)}:Plain", reading=reading)
    reader, again = plan.reader(1 << 30), plan.reader(1 << 30)
    reader.start_epoch(1)
    reader.next_batch(11)
    again.load_state_dict(reader.state_dict())
    assert not again.restarted
    assert row_numbers(again.next_batch(ROWS) or {}) == row_numbers(reader.next_batch(ROWS) or {})
    reader.close()
    again.close()


def test_each_sample_is_made_once_for_all_of_its_fields(tmp_path: Path) -> None:
    """In memory once in all; as a stream once an epoch."""
    name = f"{write_module(tmp_path)}:Known"
    for reading, times in (("memory", 1), ("stream", 2)):
        reader = plan_of(name, reading=reading).reader(1 << 30)
        assert seen() == [0]  # what a sample is
        seen().clear()
        reader.open()
        for epoch in range(2):
            reader.start_epoch(epoch)
            while reader.next_batch(8) is not None:
                pass
        reader.close()
        counts = Counter(seen())
        assert all(counts[row] >= times for row in range(ROWS))
        assert len(seen()) <= ROWS * (times + (reading == "stream")), "a stream reads one window ahead"


def test_a_survey_makes_a_thousand_samples_at_most_once_each(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, 'Known.rows = 5000')}:Known"
    catalog = catalog_of(name)
    seen().clear()
    found = survey(catalog.train, catalog.sample.fields)
    assert {field.values.rows for field in found.values()} == {len(seen())}
    assert set(Counter(seen()).values()) == {1}
    assert 900 < len(seen()) <= 1000
    assert found["inputs"].num_rows == 5000


def test_of_rows_that_an_epoch_has_left_these_alone_are_made(tmp_path: Path) -> None:
    catalog = catalog_of(f"{write_module(tmp_path)}:Known")
    left = Bits(ROWS)
    left.set(np.array([3, 4, 20, 59]))
    seen().clear()
    picked = Picked(Rows(catalog.train, catalog.sample.fields), left)
    assert row_numbers(picked.read(0, 4)) == seen() == [3, 4, 20, 59]


LABELS = {
    "targets": "Plain.targets = torch.arange(60) % 7",
    "labels": "Plain.labels = np.arange(60, dtype=np.uint8) % 7",
    "not of its length": "Plain.targets = [1, 2]; Plain.labels = tuple(i % 7 for i in range(60))",
}


@pytest.mark.parametrize("kind", LABELS)
def test_classes_are_counted_by_the_attribute_of_the_dataset(kind: str, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, LABELS[kind])}:Plain"
    catalog = catalog_of(name)
    assert seen() == [0]
    assert catalog.sample.num_classes == 7
    assert catalog.labels == labels_of(np.arange(60) % 7, "targets", name)
    assert reading_lines(catalog.shards, "targets") == []


def test_classes_are_named_by_the_attribute_of_the_dataset(tmp_path: Path) -> None:
    text = """
    Plain.classes = list("abcdefgh")
    Known.classes = tuple("abc")
    Other = type("Other", (Known,), {"classes": ["a", "x"]})
    """
    path = write_module(tmp_path, text)
    named = catalog_of(f"{path}:Plain").sample
    assert (named.class_names, named.num_classes) == (tuple("abcdefgh"), 8)
    few = catalog_of(f"{path}:Known")
    assert (few.sample.class_names, few.sample.num_classes) == ((), 7)
    assert few.warnings[-1].endswith(
        "`targets` holds 6 in row 6, but 3 classes have names, by manifest.json or the attribute `classes` "
        "of a dataset: they are not used. Give each class a name."
    )
    with pytest.raises(DataError) as error:
        catalog_of(f"{path}:Plain", validation=f"{path}:Other")
    assert str(error.value) == (
        f"{path}:Other: the classes are `a`, `x`; in {path}:Plain they are `a`, `b`, `c`, `d`, `e`, `f`, "
        "`g`, `h`. Expected the same names for the same numbers: list all names in one order in the "
        "attribute `classes`."
    )


def test_else_every_sample_is_made_once_for_them(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Plain"
    catalog = catalog_of(name)
    assert sorted(seen()) == sorted([0, *range(ROWS)])
    assert catalog.labels == labels_of(np.arange(60) % 7, "targets", name)
    assert reading_lines(catalog.shards, "targets") == [
        f"{name}: each rank reads its part of the 60 samples once to count the classes, as the dataset has "
        "no attribute `targets` or `labels` with one for each."
    ]


def test_what_the_ranks_compare(tmp_path: Path) -> None:
    """A digest of the targets tells datasets apart that each rank has shuffled for itself."""
    text = """
    Other = type("Other", (Known,), {"__init__": lambda self: setattr(self, "targets", [5] * 60)})
    """
    path = write_module(tmp_path, text)
    facts = []
    for dataset in ("Plain", "Known", "Other", "generated"):
        catalog_of(f"{path}:{dataset}")
        facts.append({k.partition(" of mine.py")[0]: v for k, v in facts_of([f"{path}:{dataset}"]).items()})
    sample = {"samples": 60, "sample 0": "`inputs` float32 [3], `targets` int64 []"}
    assert facts[0] == sample
    assert {**facts[1], **sample} == facts[1] != {**facts[2], **sample}
    assert [len(found) for found in facts] == [2, 3, 3, 3]
    assert facts_of([str(tmp_path / "a.h5")]) == {}


@pytest.mark.parametrize("on_damage", ["error", "skip"])
def test_an_attribute_that_differs_from_a_sample(on_damage: Any, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, 'Plain.targets = [0] * 41 + [5] * 19')}:Plain"
    config = DataConfig(path=name, on_damage=on_damage)
    catalog = open_catalog(config)
    rows = Rows(catalog.train, catalog.sample.fields, screen=training_screen(config, catalog.sample))
    with pytest.raises(DataError) as error:
        rows.read(42, 60)
    assert str(error.value) == (
        f"{name}: the target of sample 42 is 0, but its attribute `targets` has 5 there. Expected the same, "
        "since the classes are counted by that attribute: correct it, or give it another name."
    )


BROKEN = """
class Plain(Plain):
    def __getitem__(self, i):
        if i in (3, 50, 51):
            raise OSError("no such picture")
        return super().__getitem__(i)
"""


def test_a_sample_that_fails_is_an_error(tmp_path: Path) -> None:
    path = write_module(tmp_path, BROKEN)
    line = Path(path).read_text().splitlines().index('            raise OSError("no such picture")') + 1
    found = message(f"{path}:Plain")
    assert found == (
        f"{path}:Plain: sample 3 cannot be read: OSError: no such picture ({path}, line {line}). Expected a "
        "sample for each of 0 to 59: correct the dataset; a training leaves such samples out by "
        "data.on_damage = 'skip'."
    )


def test_samples_that_fail_are_left_out_on_request(tmp_path: Path) -> None:
    """And are named as damaged rows are; the others are made once."""
    name = f"{write_module(tmp_path, BROKEN)}:Plain"
    config = DataConfig(path=name, on_damage="skip")
    catalog = open_catalog(config)
    assert catalog.labels.count == 57
    screen = training_screen(config, catalog.sample)
    assert screen is not None
    seen().clear()
    batch, kept, left_out = usable(Rows(catalog.train, catalog.sample.fields, screen=screen).read(0, ROWS))
    assert kept.tolist() == row_numbers(batch) == [row for row in range(ROWS) if row not in (3, 50, 51)]
    assert seen() == kept.tolist()
    assert left_out == {"damaged": 3}
    (damage,) = screen.unreported_damage(new_files=True)
    assert isinstance(damage, Damage)
    assert damage.ranges == ((3, 4), (50, 52))


UNLIKE = {
    "shape": (
        "inputs_of(i)[:2], i % 7",
        "`inputs` of sample 4 is float32 [2]. Expected float32 [3], as in sample 0:",
    ),
    "dtype": (
        "inputs_of(i).astype('f8'), i % 7",
        "`inputs` of sample 4 is float64 [3]. Expected float32 [3], as in sample 0:",
    ),
    "another number": (
        "inputs_of(i), 0.5",
        "`targets` of sample 4 is float64 []. Expected int64 [], as in sample 0:",
    ),
    "no targets": (
        "inputs_of(i)",
        "sample 4 has the fields `inputs`. Expected `targets`, as in sample 0: return",
    ),
    "three parts": (
        "(1, 2, 3)",
        "sample 4 has 3 parts; expected (inputs, targets), a dict of named fields, or one array. Return one",
    ),
    "nothing": (
        "inputs_of(i), None",
        "`targets` of sample 4 is a NoneType. Expected a tensor, an array, a number, a bool or an image: "
        "convert it.",
    ),
    "ragged": ("[[1, 2], [3]], 1", "`inputs` of sample 4 is a list without an array: "),
    "a type that numpy lacks": (
        "torch.zeros(3, dtype=torch.bfloat16), 1",
        "`inputs` of sample 4 is a Tensor without an array: Got unsupported ScalarType BFloat16. Expected a "
        "tensor,",
    ),
    "complex": (
        "np.zeros(3, complex), 1",
        "`inputs` of sample 4 is a ndarray of complex128. Expected a tensor, an",
    ),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_sample_that_is_not_like_the_first(kind: str, tmp_path: Path) -> None:
    value, expected = UNLIKE[kind]
    name = f"""{
        write_module(
            tmp_path,
            f'''
        class Plain(Plain):
            def __getitem__(self, i):
                return ({value}) if i == 4 else super().__getitem__(i)
        ''',
        )
    }:Plain"""
    assert message(name).startswith(f"{name}: {expected}")


def test_values_of_many_kinds(tmp_path: Path) -> None:
    text = """
    from PIL import Image

    class Plain:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {
                "image": Image.new("RGB", (4, 2), (i, 2, 3)),
                "big": np.array([i], ">i2"),
                "half": torch.tensor(0.5, dtype=torch.half),
                "yes": i == 1,
                "float": 0.25 * i,
                "rows": [[i, 2], [3, 4]],
            }
    """
    name = f"{write_module(tmp_path, text)}:Plain"
    fields = {key: key for key in ("big", "half", "yes", "float", "rows")}
    catalog = catalog_of(name, fields={"inputs": "image", **fields}, targets="yes")
    assert {key: str(field) for key, field in catalog.sample.fields.items()} == {
        "inputs": "uint8 [2, 4, 3]",
        "big": "int16 [1]",
        "half": "float16 []",
        "yes": "bool []",
        "float": "float64 []",
        "rows": "int64 [2, 2]",
    }
    rows = Rows(catalog.train, catalog.sample.fields).read(1, 3)
    assert rows["inputs"][:, 1, 3].tolist() == [[1, 2, 3], [2, 2, 3]]
    assert rows["big"].tolist() == [[1], [2]]
    assert rows["yes"].tolist() == [True, False]
    assert rows["float"].tolist() == [0.25, 0.5]
    assert rows["rows"].tolist() == [[[1, 2], [3, 4]], [[2, 2], [3, 4]]]


NAMED = """
class Plain(Plain):
    def __getitem__(self, i):
        SEEN.append(i)
        animal = ["cat", "dog"][i % 2]
        return {"picture": inputs_of(i), "animal": animal, "votes": np.eye(3)[i % 3], "n": i % 5 - 1}
"""


def test_fields_have_the_names_that_a_configuration_gives_them(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, NAMED)}:Plain"
    catalog = catalog_of(
        name, fields={"inputs": "picture", "label": "animal"}, targets="label", classes=("dog", "cat")
    )
    assert catalog.sample.class_names == ("dog", "cat")
    assert catalog.sample.num_classes == 2
    assert catalog.sample.fields["inputs"].place == "picture"
    rows = Rows(catalog.train, catalog.sample.fields).read(2, 5)
    assert rows["label"].tolist() == [1, 0, 1]
    assert rows["inputs"][:, 0].tolist() == [2, 3, 4]


def test_classes_in_other_forms(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, NAMED)}:Plain"
    one_hot = catalog_of(name, inputs="picture", targets="votes", one_hot=True)
    assert one_hot.sample.num_classes == 3
    assert Rows(one_hot.train, one_hot.sample.fields).read(4, 7)["votes"].tolist() == [1, 2, 0]
    ignored = catalog_of(name, inputs="picture", targets="n", ignore_index=-1)
    assert ignored.sample.num_classes == 4
    assert Rows(ignored.train, ignored.sample.fields).read(4, 7)["n"].tolist() == [3, -100, 0]
    found = message(name, inputs="picture", targets="animal", classes=("dog", "mouse"))
    assert found.startswith(
        f"{name}: `animal` holds `cat` in row 0; expected one of data.classes: `dog`, `mouse`."
    )


def test_texts_of_the_attribute_are_classes(tmp_path: Path) -> None:
    text = NAMED + "\nPlain.labels = ['cat', 'dog'] * 30"
    name = f"{write_module(tmp_path, text)}:Plain"
    catalog = catalog_of(name, inputs="picture", targets="animal", classes=("cat", "dog"))
    assert seen() == [0]
    assert catalog.labels.count == 60
    assert Rows(catalog.train, catalog.sample.fields).read(2, 5)["animal"].tolist() == [0, 1, 0]


REFUSED = {
    "a part of a field": (
        {"inputs": "picture[0:2]", "targets": "n"},
        "`picture[0:2]` = 'picture[0:2]': {name} is a Python dataset. Expected the name of a field of its "
        "samples, `picture`, `animal`, `votes`, `n`: name one, and cut it in the dataset.",
    ),
    "groups": (
        {"inputs": "picture", "fields": {"targets": "*/n"}},
        "`targets` = '*/n': {name} is a Python dataset. Expected the name of a field of its samples, "
        "`picture`, `animal`, `votes`, `n`: name one, and cut it in the dataset.",
    ),
    "no such field": (
        {},
        "{name}: a sample has the fields `picture`, `animal`, `votes`, `n`; expected `inputs`. Name them in "
        "data.inputs, data.targets, data.fields, or return such a field.",
    ),
    "text": (
        {"inputs": "picture", "targets": "animal"},
        "{name}: `animal` of a sample is text; expected numbers. List the texts that are classes in "
        "data.classes if it is the targets, else leave it out.",
    ),
    "rows of any length": (
        {"inputs": "picture", "targets": "n", "max_length": 4},
        "data.max_length: {name} is a Python dataset, whose samples have one shape. Expected it with files "
        "alone: leave it out, and pad or turn the values in the dataset.",
    ),
    "another axis": (
        {"inputs": "picture", "targets": "n", "samples_axis": -1},
        "data.samples_axis: {name} is a Python dataset, whose samples have one shape. Expected it with files "
        "alone: leave it out, and pad or turn the values in the dataset.",
    ),
    "copies": (
        {"inputs": "picture", "targets": "n", "cache": "/tmp"},
        "data.cache = '/tmp': {name} is a Python dataset; expected files, which are copied. Leave data.cache "
        "out.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_only_files_have_is_refused(kind: str, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, NAMED)}:Plain"
    data, expected = REFUSED[kind]
    assert message(name, **data) == expected.format(name=name)


def test_files_cannot_be_mapped_where_there_are_none(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Plain"
    reader = plan_of(name, reading="mmap").reader(1 << 30)
    with pytest.raises(DataError) as error:
        reader.open()
    assert str(error.value) == (
        f"{name}: with data.reading = 'mmap', it is a Python dataset; expected files, which are mapped into "
        "memory. Choose `memory` or `stream`."
    )
    for budget, mode, why in (
        (1 << 30, "memory", "the rows fit into half of the free memory"),
        (
            1 << 10,
            "stream",
            "the rows do not fit into half of the free memory, and are not mapped, since they come from a "
            "Python dataset",
        ),
    ):
        chosen = plan_of(name).reader(budget)
        assert (chosen.mode, chosen.why) == (mode, why)
        chosen.close()


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    text = """
    class Plain(Plain):
        def __getitem__(self, i):
            return (inputs_of(i) * (np.nan if i == 7 else 1), i % 7)
    """
    name = f"{write_module(tmp_path, text)}:Plain"
    config = DataConfig(path=name, not_finite="skip")
    catalog = open_catalog(config)
    rows = Rows(catalog.train, catalog.sample.fields, screen=training_screen(config, catalog.sample))
    _, kept, left_out = usable(rows.read(0, 10))
    assert (kept.tolist(), left_out) == ([0, 1, 2, 3, 4, 5, 6, 8, 9], {"not_finite": 1})
    assert rows.screen is not None
    assert rows.screen.first_not_finite == f"{name}: `inputs` holds nan in row 7"


def test_validation_rows_are_a_part_or_another_dataset(tmp_path: Path) -> None:
    path = write_module(tmp_path, "Other = type('Other', (Plain,), {'rows': 9})")
    part = catalog_of(f"{path}:Plain", validation=0.25)
    assert [sum(span.num_rows for span in spans) for spans in (part.train, part.validation)] == [45, 15]
    other = catalog_of(f"{path}:Plain", validation=f"{path}:Other")
    assert other.validation == (Span(f"{path}:Other", 0, 9),)
    write_foreign(tmp_path / "v.h5", 12)
    assert catalog_of(f"{path}:Plain", validation=str(tmp_path / "v.h5")).validation[0].num_rows == 12
    with pytest.raises(DataError, match=r"leaves 0 shards of data\.path"):
        catalog_of(f"{path}:Plain", validation=f"{path}:Plain")


def test_a_model_is_used_on_samples_without_targets(tmp_path: Path) -> None:
    path = write_module(tmp_path, "Alone = [inputs_of(i) for i in range(5)]")
    sample = catalog_of(f"{path}:Plain").sample
    selected = select_rows(f"{path}:Alone", sample, needed_to_predict(sample))
    assert Rows(selected.spans, selected.fields).read(3, 5)["inputs"].tolist() == [
        [3, 3.25, 3.5],
        [4, 4.25, 4.5],
    ]
    wrong = "`inputs` is float32 [2]; the model was trained on float32 [3]. Convert the data, or name other "
    name = f"{write_module(tmp_path, 'Alone = [inputs_of(i)[:2] for i in range(5)]')}:Alone"
    with pytest.raises(DataError) as error:
        select_rows(name, sample, ("inputs",))
    assert str(error.value) == f"{name}: a sample of {wrong}files."


def test_inputs_are_their_own_targets_if_that_is_asked_for(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, 'Alone = [inputs_of(i) for i in range(5)]')}:Alone"
    assert catalog_of(name, targets="inputs").sample.fields == {
        "inputs": FieldSpec(shape=(3,), dtype="float32")
    }
