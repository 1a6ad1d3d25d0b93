"""What is to be placed where, and what that would do. Pure: knows numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlx_dist.cluster.costs import Machine, ModelCosts, Workload
from mlx_dist.cluster.placement import WHOLE, Placement, Problem, Share, Slice, best
from mlx_dist.cluster.prediction import Prediction, predict
from mlx_dist.cluster.problems import Links, problem
from mlx_dist.cluster.sums import Curve
from mlx_dist.config import Objective
from mlx_dist.errors import ConfigError, FamilyError, PlacementError
from mlx_dist.messages import Speeds


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be placed where, for which of the two rates, and in what order.

    `leader` is the machine that holds the first stage, or None for any. `remedies` say what would
    fit, for the error if this does not. `costs_of` counts a slice, where tensor groups are looked
    at, and raises FamilyError where nobody knows how to slice the model; `sums` are the seconds of
    sums that were measured, by the number of ranks and then by bytes.
    """

    costs: ModelCosts
    machines: tuple[Machine, ...]
    links: Links
    workload: Workload
    objective: Objective
    leader: int | None = None
    is_order_fixed: bool = False
    may_leave_out: bool = True
    remedies: tuple[str, ...] = ()
    costs_of: Callable[[Slice], ModelCosts] | None = None
    sums: Mapping[int, Curve] = field(default_factory=dict)

    def problem(self) -> Problem:
        return problem(
            self.costs,
            self.machines,
            self.links,
            self.workload,
            self.objective,
            leader=self.leader,
            is_order_fixed=self.is_order_fixed,
            may_leave_out=self.may_leave_out,
            remedies=self.remedies,
        )

    def placement(self) -> Placement:
        """The best placement. Raises PlacementError if the model does not fit."""
        return best(self.problem(), self.objective)

    def predicted(self, placement: Sequence[Share] | None = None) -> Prediction:
        """What `placement`, or the best one, does. Raises PlacementError if there is none."""
        shares = self.placement() if placement is None else placement
        slices = {share.slice: self.slice_costs(share.slice) for share in shares}
        return predict(
            self.costs,
            self.machines,
            self.links,
            shares,
            self.workload,
            slices=slices,
            sums=self.sums,
        )

    def slice_costs(self, slice_: Slice) -> ModelCosts:
        """Raises FamilyError where nobody knows how to slice the model."""
        if slice_ == WHOLE or self.costs_of is None:
            return self.costs
        return self.costs_of(slice_)

    def levelled(self) -> Case:
        """The case with machines of a kind as fast as the first of them, or noise decides."""
        first: dict[tuple[str, int], Speeds] = {}
        for machine in self.machines:
            first.setdefault((machine.chip, machine.memory_bytes), machine.speeds)
        machines = (replace(m, speeds=first[m.chip, m.memory_bytes]) for m in self.machines)
        return replace(self, machines=tuple(machines))

    def rate(self, way: Way | None = None) -> float:
        """The tokens a second that are asked for, 0 where the model cannot be placed.

        It is placed in this `way`, or as one pipeline.
        """
        # Times of prompts are not looked at.
        case = replace(self, workload=replace(self.workload, prompt_tokens=()))
        try:
            return self.rate_of(case.predicted(None if way is None else way(case)))
        except (PlacementError, ConfigError, FamilyError):
            return 0.0

    def rate_of(self, prediction: Prediction) -> float:
        """The tokens a second that are asked for, as predicted."""
        if self.objective is Objective.latency:
            return prediction.stream_tokens_per_s
        return prediction.total_tokens_per_s


# How a case is placed. Raises PlacementError, ConfigError or FamilyError where it cannot be.
Way = Callable[[Case], Placement]
