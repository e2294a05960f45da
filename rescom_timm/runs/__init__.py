"""Runs: a recipe becomes a trained, evaluated and saved model."""
