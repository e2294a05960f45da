"""Training: from a recipe to a trained, evaluated and saved net."""
