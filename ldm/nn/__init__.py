"""Leaf layers that the networks share; they know neither levels nor diffusion."""
