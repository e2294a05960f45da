"""The parts of `rescom-timm benchmark`: each has `arguments(parser)` and `run(options)`."""
