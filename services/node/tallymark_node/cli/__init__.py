"""The commands of `tallymark`, a module for each family; `main` puts them together.

These modules import click and each other at the top and everything else inside the commands, so that `--help` and
the commands that only talk to a server start at once and never load a kernel.
"""
