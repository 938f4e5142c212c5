"""What csrc/python/ring.cpp gives to Python."""

from hvd_train.comm._shm import FlatBuffer, Operation, Team

class PeerLost(Exception): ...
class PeerStalled(Exception): ...
class MPIFailure(Exception): ...
class Overflow(Exception): ...

class Ring:
    """The channels between hosts that this rank drives."""

    payload_bytes: int
    late: int
    def __init__(self, comm: int, ranks: list[list[int]], host: int, local_rank: int) -> None: ...
    def owned(self, numel: int) -> tuple[int, int]: ...

class RingAverage(Operation):
    """An average over several hosts."""

    def __init__(
        self,
        ring: Ring,
        team: Team,
        buffer: FlatBuffer,
        shares: list[float],
        slot: int,
        version: int,
        owned: int,
        timeout_s: float,
        hooks: int,
        wire: int,
    ) -> None: ...
