"""What every other package stands on and nothing here knows the subject: files, locks, caches, processes, checks.

A file is written whole or not at all (`files`), a number that cannot be is refused with what to type (`checks`), text
from outside is shown harmlessly (`escaping`), and work that takes long says how far it is (`progress`). Nothing here
imports another package of ibqlab. Start with `files`.
"""
