"""`python -m ibqlab`: the same as `ibqlab`, for torchrun and where scripts are not on the path."""

from ibqlab.cli import main

main(prog_name="ibqlab")
