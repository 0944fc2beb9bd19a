"""Notebooks as commands: `ibqlab run explore_collapse preset=smoke` executes one as if somebody had clicked through it.

A notebook is the place where a question is asked; a command is how it is asked at night or on a cluster. The main idea:
every mistake in a parameter is found before a kernel starts, by the same class that the notebook's third cell uses.
`catalogue` finds notebooks and copies them out, `parameters` reads and checks what they may be told, `execution` runs
one, and `results` says what it left behind. Start with `parameters.read_settings` and `execution.execute`.

`start_page` is the page that opens first, a card per notebook; `status` looks up what has come of each; `app` serves
them without code.
"""
