"""A trace of a few steps, on request."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

WARM_UP = 5
"""Steps before the trace: the first ones allocate and fill caches."""


class Profile:
    """Traces ``steps`` steps of a run, after its first ``WARM_UP``; none if ``steps`` is 0.

    The trace opens in TensorBoard, and its file perfetto_trace.json.gz in Perfetto.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._done = 0
        self._tracing = False

    def named(self, step: int) -> AbstractContextManager[None]:
        """The context in which a step is to be dispatched, so that the trace knows its number."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def step(self, state: Any) -> int:
        """Counts a step whose result is ``state``; starts or ends the trace when it is time.

        Returns:
            How many steps are in the trace, if it was written now; otherwise 0.
        """
        self._done += 1
        if self.steps and self._done == WARM_UP:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # A trace for Perfetto has room for a million events. Calls of Python's functions, of
            # which tracing an evaluation makes as many, would leave none to the steps.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self._tracing = True
        return self.end(state) if self._done == WARM_UP + self.steps else 0

    @property
    def missed(self) -> bool:
        """Whether steps are to be traced of which none has been done."""
        return self.steps > 0 and self._done <= WARM_UP

    def end(self, state: Any) -> int:
        """Ends the trace if it is going on; returns as ``step`` does."""
        if not self._tracing:
            return 0
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._tracing = False
        return self._done - WARM_UP
