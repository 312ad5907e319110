"""What a TwoTower costs to serve: a cost model, its fit to measurements, a simulator, and the choice of a mode."""
