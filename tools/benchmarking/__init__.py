"""The parts of tools/benchmark.py: each has `arguments(parser)` and `run(options)`."""
