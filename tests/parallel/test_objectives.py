"""A step minimises what its objective says, in every layout; cross-entropy is one objective of several."""

import numpy as np
import pytest

from megatron_ft.training.objectives.cross_entropy import CrossEntropy
from megatron_ft.training.objectives.objective import Contribution
from tests.parallel.test_invariance import LLAMA, TOLERANCE


class Doubled(CrossEntropy):
    """Twice the loss over the same weights; logs one number more."""

    def contribution(self, output, batch, dataset):
        total, tokens, log = super().contribution(output, batch, dataset)
        return Contribution(2 * total, tokens, log.new_tensor([*log.tolist(), 7.0]))

    def log_size(self, dataset):
        return super().log_size(dataset) + 1

    def read(self, log, dataset):
        loss, more = super().read(log[:-1], dataset)
        return 2 * loss, more | {"sevens": log[-1]}


class EveryToken(CrossEntropy):
    """The plain mean over all real tokens, whoever speaks; the weight is not the batch's own."""

    def weight(self, batch):
        return (batch.groups[0] >= 0).sum().float()

    def contribution(self, output, batch, dataset):
        from megatron_ft.training.objectives.cross_entropy import weighted_sum

        real = (batch.groups[0] >= 0).float()
        return weighted_sum(output, real, batch.groups, [len(names) for names in dataset.group_names.values()])


def measure(case, objective):
    from megatron_ft.training import invariance

    return invariance.measure(invariance.Problem(LLAMA, objective=objective), case)


def test_twice_the_loss_is_twice_the_gradient_to_the_bit(one_rank):
    from megatron_ft.training.invariance import Case

    (once,), (twice,) = (one_rank.run(measure, Case("one", 1), objective) for objective in (CrossEntropy(), Doubled()))
    assert twice.loss == 2 * once.loss
    assert all(np.array_equal(twice.gradients[name], 2 * once.gradients[name]) for name in once.gradients)


@pytest.mark.parametrize("objective", [Doubled(), EveryToken()], ids=["doubled", "every token"])
def test_every_objective_is_the_same_in_every_layout(objective, one_rank, four_ranks):
    from megatron_ft.commands.verify_invariance import cases_for
    from megatron_ft.training.invariance import Case, compare

    (reference,) = one_rank.run(measure, Case("one", 1), objective)
    (plain,) = one_rank.run(measure, Case("one", 1), CrossEntropy())
    assert reference.loss != plain.loss
    for case in cases_for(LLAMA):
        if case.name in ("TP2 x PP2 + sequence parallel", "PP4", "DP4") and case.packing:
            found = compare(reference, four_ranks.run(measure, case, objective)[0])
            assert found.largest < TOLERANCE, (case.name, found)
