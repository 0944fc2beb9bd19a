"""Notebooks: finding one, checking its parameters before a kernel starts, running it, and telling its results.

`parameters` reads what the cell tagged `parameters` may set and executes a notebook through papermill; `results` says
what an executed notebook left behind. Start with `parameters.execute`.
"""
