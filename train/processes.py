"""Several processes of one run: how they meet, agree, and stop together."""

import contextlib
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from train.config import TrainConfig, differences, report_error, to_dict
from train.errors import UserError

MEETING = 600
"""Seconds for which a process waits for those that come up late, and at the end for those that are
not done yet, such as the first one, which writes for all; XLA then aborts it."""

SILENCE = 30
"""Seconds of silence after which a process counts as dead, and the others stop."""

PARTING = 10
"""Seconds in which a mistake that all processes meet is met by the last of them."""

OWN = ("coordinator", "num_processes", "process_id", "run_dir", "data", "tokenizer", "config",
       "resume", "profile")  # fmt: skip
"""Fields in which processes may differ: how each finds the others, what goes by content (data), and
what the first one decides for all."""

_MESSAGE = 2**16
"""Bytes of what processes tell each other, at most."""


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """Joins the other processes that --coordinator tells of; nothing without one.

    An exception ends this process at once: to part in order would be to wait for the others, who
    may be dead or wait for this one. They stop too: the collective that they are in fails, or the
    coordinator misses this process's heartbeats for ``SILENCE`` seconds. A mistake is told; where
    all of them met it, they part in order.

    Where the others are not there within ``MEETING`` seconds, XLA ends the process by SIGABRT, with
    a trace of its own, and no exception.

    Raises:
        UserError: there is no cluster for ``auto``, or the coordinator's port is taken.
        SystemExit: after a mistake that was told.
    """
    if config.coordinator is None:
        yield
        return
    # All that tells what was waited for, where XLA ends it.
    print(f"waiting for {_awaited(config)}", file=sys.stderr, flush=True)
    # Between CPUs, programs that are under way at once would mix up their messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    address = None if config.coordinator == "auto" else config.coordinator
    try:
        jax.distributed.initialize(
            address,
            config.num_processes,
            config.process_id,
            local_device_ids=_local_device_ids(),
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=MEETING,
        )
    except (RuntimeError, ValueError) as error:
        elsewhere = "; to plan for it elsewhere, give every size of --mesh" if config.plan else ""
        reason = str(error).rstrip(".")
        if address is None and "should be defined" in reason:
            reason = "no cluster of SLURM's or of TPUs is found; elsewhere give HOST:PORT"
        raise UserError(
            f"coordinator={config.coordinator} could not be joined: {reason}{elsewhere}"
        ) from None
    try:
        yield
    except UserError as error:
        status = report_error(error)  # first of all: where others are missing, parting may abort
        if not _all_part():
            sys.stdout.flush()
            os._exit(status)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        raise SystemExit(status) from None
    except BaseException as error:
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops "
            f"({type(error).__name__}), and so will the others; --resume goes on from the last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    else:
        jax.distributed.shutdown()


def _all_part() -> bool:
    """Whether all processes come here: those that have not met a mistake wait elsewhere for it."""
    try:
        multihost.get_barrier_sync_fn()(key="parting", timeout_ms=1000 * PARTING)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def check_same(config: TrainConfig) -> None:
    """Refuses flags, but those in ``OWN``, in which a process differs from the first.

    Each would wait for the others in another collective than they are in.

    Raises:
        UserError: in all processes, naming what differs.
    """
    own = {name: value for name, value in to_dict(config).items() if name not in OWN}
    first = of_first(lambda: json.dumps(own))

    def compare() -> str:
        if found := differences(json.loads(first), own):
            raise UserError(f"{', '.join(found)}; expected the flags of process 0")
        return ""

    agreed(compare)


def _awaited(config: TrainConfig) -> str:
    """The processes that meet, which of them this is, and what becomes of it without the others."""
    who = "all processes that the cluster tells of"
    if config.coordinator != "auto":
        who = (
            f"all {config.num_processes} processes at {config.coordinator}, "
            f"this one being process {config.process_id}"
        )
    return f"{who}; XLA aborts this one if they are not there within {MEETING} seconds"


def _local_device_ids() -> list[int] | None:
    """Which devices of its host this process takes: all of them where this is empty.

    None leaves it to JAX, which takes all too, but under SLURM one for each process. That is right
    only where SLURM runs several on a host. JAX_LOCAL_DEVICE_IDS is read by JAX.
    """
    environment = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in environment or "SLURM_LOCALID" not in environment:
        return None
    # Of this step, such as "8(x2),4"; or what was asked for.
    asked = environment.get("SLURM_NTASKS_PER_NODE", "1")
    tasks = re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", asked))
    return [] if set(tasks.split(",")) == {"1"} else None


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def of_first(make: Callable[[], str]) -> str:
    """What ``make`` returns in the first process, in all of them; the others do not call it.

    Raises:
        UserError: what ``make`` raised in the first process, in all of them.
    """
    return agreed(lambda: make() if is_first() else "")[0]


def agreed(make: Callable[[], str]) -> list[str]:
    """What ``make`` returns in each process, in all of them.

    Raises:
        UserError: in all processes, where ``make`` raised it in any.
    """
    failed, text = False, ""
    try:
        text = make()
    except UserError as error:
        if jax.process_count() == 1:
            raise
        failed, text = True, str(error)
    if jax.process_count() == 1:
        return [text]
    message = np.zeros(1 + _MESSAGE, np.uint8)
    encoded = text.encode()[:_MESSAGE]
    message[0], message[1 : 1 + len(encoded)] = failed, np.frombuffer(encoded, np.uint8)
    every = multihost_utils.process_allgather(message).reshape(-1, len(message))
    texts = [bytes(row[1:]).rstrip(b"\0").decode(errors="replace") for row in every]
    wrong = {text: number for number, text in reversed([*enumerate(texts)]) if every[number][0]}
    if wrong:
        raise UserError("; ".join(f"process {number}: {text}" for text, number in wrong.items()))
    return texts


def on_this_host() -> int:
    """How many of the run's processes are on this one's host; all of them have to ask."""
    return agreed(platform.node).count(platform.node())


def preempted(step: int) -> bool:
    """Whether all processes are to stop after ``step``, since one of them received SIGTERM.

    All of them have to ask, at every step; the answer is the same in all.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
