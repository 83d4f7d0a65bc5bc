"""The command line: one verb, one file, with `add(parser)` and `run(args)`; `main` finds the file."""
