"""Pictures of runs. Attic: nothing below imports this room.

Every figure is a module of three functions, so that each can be used, checked and redrawn alone:

    measure(...) -> a dataclass of numpy arrays      what is shown, computed from plain tensors or run folders
    draw(measured) -> matplotlib.figure.Figure       how it is shown; never touches matplotlib's global state
    table(measured) -> {column: values}              the same numbers, for the CSV beside the picture

and `style.save(figure, table, stem)` writes stem.png, stem.svg and stem.csv.

From run folders (`folder.RunFolder`): confusion, reliability, longtail, curves, schedule, robustness.
From a net, a queue and images: pairs, gradients, similarity, tsne, views, queues; `nets` measures them on a run that
`opened.open_run` has opened. `files` knows all by name, and report puts them into one HTML file.
Beside the runs: inference, the time of one net against ensembles.
"""
