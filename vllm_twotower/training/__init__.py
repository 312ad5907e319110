"""Training of small TwoTower models on generated problems."""
