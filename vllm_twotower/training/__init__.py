"""Training: data, loss, trainer."""
