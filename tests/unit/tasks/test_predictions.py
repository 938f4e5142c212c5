"""What the built-in tasks, and your own, predict for a batch of inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Task
from hvd_train.tasks.built_in import Classification, NextToken, Regression
from tests.unit.tasks.test_task import MLP, Fixed, cross_entropies, sample, tokens


def test_the_built_in_tasks_predict_from_inputs_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, float("nan")]], dtype=torch.float64)
    task: Task = Classification(MLP)
    task.build_model(sample(FieldSpec(shape=(2,), dtype="float32"), FieldSpec(shape=(), dtype="int64"), 3))
    batch = {"inputs": torch.zeros(2, 2)}
    found = task.predict(Fixed(logits), batch)
    assert found["class"].tolist()[0] == 1
    assert found["probability"].dtype == torch.float32
    e = np.exp([0.0, 2.0, 1.0])
    assert found["probability"][0].tolist() == pytest.approx(list(e / e.sum()))
    assert found["probability"][1].isnan().all()

    for shape in ((), (1,), (3, 2)):
        task = Regression(MLP)
        task.build_model(sample(FieldSpec(shape=(2,), dtype="float32"), FieldSpec(shape=shape, dtype="int8")))
        outputs = torch.arange(2.0 * math.prod(shape)).reshape(2, -1)
        assert torch.equal(
            task.predict(Fixed(outputs.bfloat16()), batch)["outputs"], outputs.reshape(2, *shape)
        )


@pytest.mark.parametrize("separate", [False, True])
def test_next_token_predicts_what_follows_a_sequence_and_how_likely_it_is(separate: bool) -> None:
    rng = np.random.default_rng(4)
    sequence = np.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    logits = rng.normal(size=(2, 4, 5))
    by_hand = -cross_entropies(logits[:, :-1], sequence[:, 1:]).sum(axis=1)
    task = NextToken(MLP)
    spec = tokens(4, separate=separate)
    task.build_model(spec)
    found = task.predict(
        Fixed(torch.tensor(logits)), {spec.inputs: torch.tensor(sequence, dtype=torch.uint8)}
    )
    assert found["token"].tolist() == logits[:, -1].argmax(axis=1).tolist()
    assert found["log_likelihood"].dtype == torch.float64
    assert found["log_likelihood"].tolist() == pytest.approx(list(by_hand), rel=1e-12)


def test_your_own_task_predicts_what_its_model_gives_for_the_inputs() -> None:
    class Own(Task):
        def build_model(self, spec: SampleSpec) -> nn.Module:
            raise AssertionError("the test builds it")

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            raise AssertionError("there are no targets")

    outputs = torch.ones(2, 3)
    assert torch.equal(Own().predict(Fixed(outputs), {"x": torch.zeros(2, 1)})["outputs"], outputs)
    with pytest.raises(TaskError, match=r"a batch has the datasets x, mask; .* Define `predict` in"):
        Own().predict(Fixed(outputs), {"x": torch.zeros(2, 1), "mask": torch.zeros(2, 1)})
