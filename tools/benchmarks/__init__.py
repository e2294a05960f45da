"""The parts of `python tools/benchmark.py`: each has `arguments(parser)` and `run(options)`."""
