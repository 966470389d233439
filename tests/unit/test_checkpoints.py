"""Which epoch's student is kept, and which is exported: decisions, tested as values."""

from distill.training.checkpoints import SCORE, choose, quality


def epoch(number, exact, loss):
    metrics = {"epoch": number, "val_exact": exact, "val_loss": loss, "train_loss": 1.0}
    return f"checkpoint-{number}", {**metrics, SCORE: quality(metrics)}


def test_more_exact_answers_are_better_and_then_a_lower_loss():
    ranked = [epoch(1, 0.8, 0.1), epoch(2, 0.9, 0.3), epoch(3, 0.9, 0.2)]
    assert [metrics["epoch"] for _, metrics in sorted(ranked, key=lambda e: e[1][SCORE])] == [
        1,
        2,
        3,
    ]


def test_the_last_epoch_is_exported_where_it_is_as_good_within_error():
    best, last = epoch(11, 0.89, 0.08), epoch(20, 0.88, 0.1)
    assert choose([best, last], num_val_rows=500) == last
    assert choose([best, last], num_val_rows=50_000) == best


def test_a_last_epoch_that_is_worse_is_not():
    best, last = epoch(2, 0.9, 0.1), epoch(9, 0.7, 0.9)
    assert choose([best, last], num_val_rows=500) == best


def test_without_validation_rows_the_training_loss_decides():
    def unvalidated(number, loss):
        metrics = {"epoch": number, "val_exact": None, "val_loss": None, "train_loss": loss}
        return f"checkpoint-{number}", {**metrics, SCORE: quality(metrics)}

    assert choose([unvalidated(1, 0.2), unvalidated(2, 0.3)], 0)[0] == "checkpoint-1"
