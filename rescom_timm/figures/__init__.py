"""Pictures of runs. Attic: nothing below imports this room.

Every figure is a module of three functions, so that each can be used, checked and redrawn alone:

    measure(...) -> a dataclass of numpy arrays      what is shown, computed from plain tensors or run folders
    draw(measured) -> matplotlib.figure.Figure       how it is shown; never touches matplotlib's global state
    table(measured) -> {column: values}              the same numbers, for the CSV beside the picture

and `style.save(figure, table, stem)` writes stem.png, stem.svg and stem.csv.

From run folders (`folder.RunFolder`): confusion, reliability, longtail, curves, schedule; report puts
them into one HTML file.
From a net and a queue: pairs, gradients, similarity, tsne, views, queues.
"""
