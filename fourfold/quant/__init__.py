"""Weights in int8 or int4, activations as they are: modules that hold codes, and what puts them into a model."""
