"""Plots and reports of runs.

A plot is a module of three functions, so that each can be used, tested and redrawn alone:

    measure(...) -> a dataclass of numpy arrays      what is shown, computed from tensors or run folders
    draw(measured) -> matplotlib.figure.Figure       how it is shown; never changes matplotlib's global state
    table(measured) -> {column: values}              the same data, for the CSV file

and `style.save(figure, table, stem)` writes stem.png, stem.svg and stem.csv.

From run folders (`run_files.RunFolder`): confusion, reliability, longtail, curves, schedule, robustness.
From a net, a queue and images: pair_counts, gradients, similarity, tsne, augmentations, queues; `net_plots` measures
them on a run that `opened_run.open_run` has opened. `plots` lists all by name.
`report` writes one HTML file of them, with conclusions, tables (`report_tables`) and images of the worst classes
(`examples`); `doctor_page` that of a data set.
Not here: the metrics themselves (metrics) and evaluation (engine).
"""
