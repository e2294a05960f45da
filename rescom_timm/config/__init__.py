"""The recipe: its sections, loading, presets, overrides; recipes for your own data (own_data); tokens and passwords.

Not here: the config of data, views, loader, net and method, which stands in the module that uses it.
"""
