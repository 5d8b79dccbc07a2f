"""A bad loss is noticed, an ordinary one is not."""

import math

from latentdiff.training.loop.learner import LossWatch, name_batch


def test_losses_that_are_not_finite() -> None:
    watch = LossWatch(explosion=10)
    assert watch.fault(0.5, 1.0) is None
    assert "loss is nan" in str(watch.fault(math.nan, 1.0))
    assert "loss is inf" in str(watch.fault(math.inf, 1.0))
    assert "gradient's norm is nan" in str(watch.fault(0.5, math.nan))


def test_an_explosion_is_told_from_the_first_losses() -> None:
    watch = LossWatch(explosion=10)
    assert watch.fault(1e6, 1.0) is None  # nothing to compare with yet
    for _ in range(40):
        watch.add(0.5)
    assert watch.fault(4.0, 1.0) is None
    assert "after a mean of 0.5" in str(watch.fault(6.0, 1.0))


def test_the_mean_survives_a_stop() -> None:
    one, other = LossWatch(10), LossWatch(10)
    for i in range(30):
        one.add(float(i % 3))
    other.restore(one.state())
    assert (other.mean, other.seen) == (one.mean, one.seen)
    assert one.report()["loss"] == sum(i % 3 for i in range(30)) / 30
    assert one.report() == {}


def test_a_long_batch_is_named_in_short() -> None:
    assert name_batch(["a", "b"]) == "a, b"
    assert name_batch([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
