"""Which epoch's student is kept and exported: a decision, tested as a value."""

from distill.training.checkpoints import quality


def epoch(exact, loss, train_loss=1.0):
    return {"val_exact": exact, "val_loss": loss, "train_loss": train_loss}


def test_more_exact_answers_are_better_and_then_a_lower_loss():
    ranked = [epoch(0.8, 0.1), epoch(0.9, 0.3), epoch(0.9, 0.2)]
    assert sorted(ranked, key=quality) == ranked


def test_without_validation_rows_the_training_loss_decides():
    assert quality(epoch(None, None, 0.2)) > quality(epoch(None, None, 0.3))
