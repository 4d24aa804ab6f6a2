"""Several processes that share one run, by torch.distributed.

Every process runs the whole pipeline on a copy of the model; what is costly is dealt out and its
results are exchanged. ``Team`` is who takes part. What passes between processes is text (JSON) and
tensors as bytes; nothing is pickled. Process 0 leads: it alone reads and writes the work folder.

Every exchange carries whether its sender has failed, so one process's error ends all of them; a
process that is killed is found by its closed connection and named by who runs beside it.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from mxq.storage import from_text, to_text

Artifact = TypeVar("Artifact")

LONGEST_WAIT = timedelta(days=30)
"""Processes wait for each other as long as the work takes; a lost one closes its connection."""

SEARCH_SECONDS = 5.0
"""Time to find out which process was lost."""


LINGER_SECONDS = 1.0
"""A survivor stays so long, lest the others take it for a lost one too."""


class PeerError(RuntimeError):
    """Another process of the run stopped or was lost; one of those that are left tells it."""

    def __init__(self, message: str, *, is_mine_to_tell: bool) -> None:
        super().__init__(message)
        self.is_mine_to_tell = is_mine_to_tell


@dataclass(frozen=True, slots=True)
class Member:
    """One process: where it runs."""

    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether it has ended, as seen from its own machine; never for one elsewhere."""
        if self.host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run, seen from one of them.

    ``store`` holds what survivors found out about a loss; None in a team of one. ``local_rank`` is
    the number of this process on its machine.
    """

    rank: int
    members: tuple[Member, ...]
    store: Store | None = None
    local_rank: int = 0

    @classmethod
    def alone(cls) -> "Team":
        """A run of one process."""
        return cls(0, (Member(socket.gethostname(), os.getpid()),))

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.members)

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the work folder and prints."""
        return self.rank == 0

    def takes(self, part: int) -> bool:
        """Whether a part of the work is this process's; parts are dealt in turn."""
        return part % self.size == self.rank

    def from_lead(self, kind: type[Artifact], make: Callable[[], Artifact]) -> Artifact:
        """What ``make`` gives in the leading process; the others do not call it."""
        if self.size == 1:
            return make()
        text = to_text(make()) if self.leads else ""
        return from_text(self.exchange(text)[0], kind, "what process 0 sent")

    def gather(self, kind: type[Artifact], mine: Artifact) -> list[Artifact]:
        """What every process has, by rank."""
        if self.size == 1:
            return [mine]
        return [
            from_text(text, kind, f"what process {rank} sent")
            for rank, text in enumerate(self.exchange(to_text(mine)))
        ]

    def exchange(self, text: str) -> list[str]:
        """The text of every process, by rank.

        Raises:
            PeerError: If another process has stopped or was lost.
        """
        return [text] if self.size == 1 else self._exchange(text, has_failed=False)

    def exchange_tensors(
        self, text: str, tensors: Mapping[str, Tensor]
    ) -> list[tuple[str, dict[str, Tensor]]]:
        """The text and the tensors of every process, by rank."""
        if self.size == 1:
            return [(text, dict(tensors))]
        forms = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
        found = []
        for rank, sent in enumerate(self.exchange(json.dumps([text, forms]))):
            its_text, its_forms = json.loads(sent)
            mine = _to_bytes(tensors) if rank == self.rank else _room_for(its_forms)
            if its_forms:
                self._call(lambda mine=mine, rank=rank: dist.broadcast(mine, rank))  # type: ignore[misc]
            found.append((its_text, _from_bytes(mine, its_forms)))
        return found

    def tell_failure(self, error: Exception) -> None:
        """Take part in the exchange that the others are at or come to, as one that has failed."""
        self._exchange(str(error) or repr(error), has_failed=True)

    def _exchange(self, text: str, *, has_failed: bool) -> list[str]:
        sent = text.encode()
        mine = torch.tensor([len(sent), has_failed])
        headers = [torch.empty_like(mine) for _ in self.members]
        self._call(lambda: dist.all_gather(headers, mine))
        longest = max(1, *(int(header[0]) for header in headers))
        padded = torch.frombuffer(bytearray(sent.ljust(longest)), dtype=torch.uint8)
        rows = [torch.empty_like(padded) for _ in self.members]
        self._call(lambda: dist.all_gather(rows, padded))
        texts = [
            row[: int(header[0])].numpy().tobytes().decode()
            for row, header in zip(rows, headers, strict=True)
        ]
        failed = [rank for rank, header in enumerate(headers) if header[1]]
        if failed and not has_failed:
            raise PeerError(
                f"process {failed[0]} of {self.size} stopped: {texts[failed[0]]}",
                is_mine_to_tell=self.leads,
            )
        return texts

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self.loss(str(error)) from error

    def loss(self, why: str) -> PeerError:
        """The error that names the processes that were lost."""
        lost = self._find_lost(SEARCH_SECONDS)
        if not lost:
            places = sorted({m.host for m in self.members} - {socket.gethostname()})
            where = f"on {', '.join(places)} " if places else ""
            return PeerError(
                f"the connection to the other processes {where}broke ({why}); "
                "run the same command again to go on",
                is_mine_to_tell=True,
            )
        numbers = ", ".join(map(str, lost))
        names = f"process {numbers}" if len(lost) == 1 else f"processes {numbers}"
        hosts = sorted({self.members[rank].host for rank in lost})
        is_mine = self.rank == min(rank for rank in range(self.size) if rank not in lost)
        time.sleep(LINGER_SECONDS)
        return PeerError(
            f"{names} of {self.size} on {', '.join(hosts)} ended without a word (killed, or out of "
            "memory); run the same command again to go on from the last finished layer",
            is_mine_to_tell=is_mine,
        )

    def _find_lost(self, seconds: float) -> list[int]:
        """Ranks that ended, as the first survivor saw it: later, survivors have ended too."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            gone = [rank for rank, member in enumerate(self.members) if member.is_gone()]
            if 0 not in gone:  # else the store may be gone with it
                try:
                    assert self.store is not None
                    seen = self.store.compare_set("lost", "", json.dumps(gone) if gone else "")
                    gone = json.loads(seen) if seen else gone
                except RuntimeError:
                    pass  # it is; what is seen from here has to do
            if gone:
                return gone
            time.sleep(0.02)
        return []


@contextmanager
def team_of(environment: Mapping[str, str], versions: Mapping[str, str]) -> Iterator[Team]:
    """The team that torchrun or ``accelerate launch`` describes in the environment.

    Raises:
        ValueError: If the processes run other versions of the libraries.
        PeerError: If another process stops or is lost.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield Team.alone()
        return
    store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    mine = Member(socket.gethostname(), os.getpid())
    team = Team(rank, (mine,) * size, store, int(environment.get("LOCAL_RANK", rank)))
    try:
        team = _introduce(team, versions)
        with _stop_signal(team):
            yield team
    except PeerError:
        raise
    except Exception as error:
        team.tell_failure(error)
        raise
    finally:
        dist.destroy_process_group()


def _introduce(team: Team, versions: Mapping[str, str]) -> Team:
    """The team with every member's place; all have the same libraries."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "versions": dict(versions)}
    all_of_them = [json.loads(text) for text in team.exchange(json.dumps(mine))]
    for rank, other in enumerate(all_of_them):
        if other["versions"] != all_of_them[0]["versions"]:
            raise ValueError(
                f"process {rank} on {other['host']} has {other['versions']}, process 0 has "
                f"{all_of_them[0]['versions']}; install the same versions everywhere"
            )
    members = tuple(Member(other["host"], other["pid"]) for other in all_of_them)
    return replace(team, members=members)


@contextmanager
def _stop_signal(team: Team) -> Iterator[None]:
    """A launcher ends the others when one process is lost; say which before going."""

    def stop(number: int, frame: object) -> None:
        lost = team._find_lost(0.5)
        if lost:
            raise team.loss("stopped by the launcher")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _to_bytes(tensors: Mapping[str, Tensor]) -> Tensor:
    parts = [t.detach().contiguous().flatten().view(torch.uint8) for t in tensors.values()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _room_for(forms: Mapping[str, Any]) -> Tensor:
    return torch.empty(sum(_bytes_of(form) for form in forms.values()), dtype=torch.uint8)


def _from_bytes(row: Tensor, forms: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors, start = {}, 0
    for name, form in forms.items():
        part = row[start : start + _bytes_of(form)].clone()  # a copy is aligned for its type
        tensors[name] = part.view(_dtype_of(form)).reshape(form[1])
        start += _bytes_of(form)
    return tensors


def _bytes_of(form: Sequence[Any]) -> int:
    return int(torch.Size(form[1]).numel()) * _dtype_of(form).itemsize


def _dtype_of(form: Sequence[Any]) -> torch.dtype:
    dtype = getattr(torch, str(form[0]).removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
