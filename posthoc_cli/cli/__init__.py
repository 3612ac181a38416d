"""The command line: one module a command, reading options and drawing tables, nothing else."""
