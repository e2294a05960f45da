"""Recipes: one YAML file, checked key by key."""
