"""The recipe: one YAML file, checked key by key, and recipes for own data.

Each section's config stands beside what it configures; not here: their meaning.
"""
