"""MetaSchedule's loop: candidates are proposed, measured, and learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm.s_tir import meta_schedule as ms

FAILED_SECS = 1e10  # what MetaSchedule puts down for a candidate that did not run

Candidates = Sequence[ms.search_strategy.MeasureCandidate]


def evolve(
    context: ms.TuneContext,
    database: ms.database.Database,
    model: ms.cost_model.CostModel,
    measured: Callable[[Candidates, tvm.target.Target], list[ms.runner.RunnerResult]],
    first: Candidates = (),
    trace: Callable[[Any], Any] = lambda trace: trace,
    done: Callable[[], bool] = lambda: False,
) -> None:
    """Let a search propose until it has no more, or not all of what it proposed is measured.

    Parameters
    ----------
    context
        Ready to propose.
    measured
        Gives the results of candidates, in order.
    first
        Measured before all that is proposed.
    trace
        What of a candidate's trace the database gets.
    done
        Asked after every batch.
    """
    workload = database.commit_workload(context.mod)
    while True:
        proposed = context.generate_measure_candidates()
        candidates = [*first, *(proposed or ())]
        results = measured(candidates, context.target)
        for candidate, result in zip(candidates, results, strict=False):
            secs = result.run_secs or [FAILED_SECS]
            found = (
                trace(candidate.sch.trace),
                workload,
                secs,
                context.target,
                candidate.args_info,
            )
            database.commit_tuning_record(ms.database.TuningRecord(*found))
        if proposed is None or len(results) < len(candidates) or done():
            return
        context.notify_runner_results(proposed, results[len(first) :])
        model.update(context, candidates, results)
        first = ()
