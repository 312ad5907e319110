"""How good and how fast a TwoTower is: answers to held-out problems through the engine, likelihoods, plots."""
