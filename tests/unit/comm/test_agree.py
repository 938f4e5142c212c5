"""What fails on one rank fails on all with one message; what must be equal is compared."""

from __future__ import annotations

import pytest

from hvd_train.comm.agree import RankFailed, SetupFailed, attempt, decided, require_equal, together
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import ConfigError, DataError, HvdTrainError, RanksDisagree, UserError
from tests.threads import ThreadCommunicator, on_ranks


def error_of(comm: ThreadCommunicator, failing: dict[int, Exception]) -> tuple[type, str, object]:
    def action() -> int:
        if comm.rank in failing:
            raise failing[comm.rank]
        return comm.rank

    with pytest.raises(HvdTrainError) as caught:
        together(comm, action)
    assert caught.value.agreed
    return type(caught.value), str(caught.value), caught.value.__cause__


def test_values_are_returned_if_nothing_fails() -> None:
    assert on_ranks(3, lambda comm: together(comm, lambda: comm.rank * 2)) == [0, 2, 4]


def test_the_input_of_one_rank_fails_on_all() -> None:
    mistake = DataError("no such shard")
    results = on_ranks(3, lambda comm: error_of(comm, {1: mistake}))
    assert {r[:2] for r in results} == {(SetupFailed, "rank 1 of 3: no such shard")}
    assert [r[2] for r in results] == [None, mistake, None], "the rank itself keeps the cause"
    assert issubclass(SetupFailed, UserError), "exit code 2"


def test_every_rank_knows_how_an_attempt_went_on_the_others() -> None:
    failing = {1: DataError("gone"), 2: ConfigError("bad key"), 3: DataError("gone")}

    def run(comm: ThreadCommunicator) -> tuple[object, object, list[int], str]:
        def action() -> int:
            if comm.rank in failing:
                raise failing[comm.rank]
            return comm.rank * 2

        tried = attempt(comm, action)
        with pytest.raises(RankFailed, match=r"^rank 1 of 5: gone$"):
            tried.why(ConfigError)
        return tried.value, tried.cause, tried.failed, tried.why(DataError)

    for rank, (value, cause, failed, why) in enumerate(on_ranks(5, run)):
        assert value == (None if rank in failing else rank * 2)
        assert cause is failing.get(rank)
        assert (failed, why) == ([1, 2, 3], "rank 1, 3 of 5: gone")
    assert {attempt(SoloCommunicator(), lambda: 1).why(DataError)} == {""}


def test_a_message_of_all_ranks_names_none() -> None:
    failing = {rank: ConfigError("bad key") for rank in range(3)}
    results = on_ranks(3, lambda comm: error_of(comm, failing))
    assert {r[:2] for r in results} == {(SetupFailed, "bad key")}


def test_the_lowest_rank_reports_for_all_with_the_same_message() -> None:
    failing = {1: DataError("gone"), 2: DataError("damaged"), 3: DataError("gone")}
    results = on_ranks(4, lambda comm: error_of(comm, failing))
    assert {r[1] for r in results} == {"rank 1, 3 of 4: gone"}


def test_any_other_exception_comes_with_its_traceback() -> None:
    def broken() -> None:
        raise KeyError("fire")

    def run(comm: ThreadCommunicator) -> str:
        with pytest.raises(RankFailed) as caught:
            together(comm, broken if comm.rank == 2 else lambda: None)
        return str(caught.value)

    (message,) = set(on_ranks(3, run))
    assert message.startswith("rank 2 of 3:\nTraceback (most recent call last)")
    assert message.rstrip().endswith("KeyError: 'fire'")
    assert "in broken" in message
    assert not issubclass(RankFailed, UserError), "exit code 1"


def test_ctrl_c_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(SoloCommunicator(), interrupted)


def test_a_world_of_one_is_a_world_like_the_others() -> None:
    assert together(SoloCommunicator(), lambda: 5) == 5
    with pytest.raises(SetupFailed, match=r"^bad$"):
        together(SoloCommunicator(), lambda: (_ for _ in ()).throw(ConfigError("bad")))
    require_equal(SoloCommunicator(), "things", {"a": 1}, "Remedy.")


def disagreement(values: list[dict[str, object]]) -> str:
    def run(comm: ThreadCommunicator) -> str:
        with pytest.raises(RanksDisagree) as caught:
            require_equal(comm, "things", values[comm.rank], "Make them alike.")
        assert caught.value.agreed
        return str(caught.value)

    (message,) = set(on_ranks(len(values), run))
    return message


def test_a_difference_is_named_with_both_values_and_all_ranks_that_differ() -> None:
    values: list[dict[str, object]] = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]
    expected = "the ranks have different things: b is 2 on rank 0 but 3 on rank 1, 3. Make them alike."
    assert disagreement(values) == expected


def test_hosts_are_named_where_there_are_several() -> None:
    def run(comm: ThreadCommunicator) -> str:
        comm.host = ("h1", "h1", "h2", "h2", "h3")[comm.rank]
        with pytest.raises(RanksDisagree) as caught:
            require_equal(comm, "things", {"a": "new" if comm.rank > 1 else "old"}, "Make them alike.")
        return str(caught.value)

    expected = (
        "the ranks have different things: a is 'old' on rank 0 (h1) but 'new' on rank 2, 3, 4 (h2, h3). Make "
        "them alike."
    )
    assert set(on_ranks(5, run)) == {expected}


def test_a_name_that_is_missing_on_one_side_differs() -> None:
    assert "b is None on rank 0 but 2 on rank 1" in disagreement([{"a": 1}, {"a": 1, "b": 2}])
    assert "b is 2 on rank 0 but None on rank 1" in disagreement([{"a": 1, "b": 2}, {"a": 1}])


def test_equal_values_are_no_disagreement() -> None:
    def run(comm: ThreadCommunicator) -> bool:
        require_equal(comm, "things", {"a": [1, 2], "b": None, "c": 0.1 + 0.2}, "Remedy.")
        return True

    assert on_ranks(3, run) == [True] * 3


def test_rank_0_decides() -> None:
    """The stop flag: the ranks' clocks differ, and all must stop in the same round."""
    checked: list[int] = []

    def run(comm: ThreadCommunicator) -> int:
        return decided(comm, comm.rank + 10, lambda: checked.append(comm.rank))

    assert on_ranks(3, run) == [10, 10, 10]
    assert checked == [0]


def test_what_rank_0_finds_wrong_is_raised_on_all() -> None:
    def check() -> None:
        raise ConfigError("taken over")

    def run(comm: ThreadCommunicator) -> str:
        with pytest.raises(ConfigError) as caught:
            decided(comm, comm.rank, check)
        return str(caught.value)

    assert on_ranks(3, run) == ["taken over"] * 3
