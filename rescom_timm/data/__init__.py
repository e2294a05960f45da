"""Data sources, index files, long-tailed draws, transforms, samplers, loaders, checks of a data set (doctor).

Not here: recipes for your own data (config.own_data) and training (engine).
"""
