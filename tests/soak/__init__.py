"""The long tests: what a night on a cluster does to a tool, done to this one on purpose.

    python -m tests.soak                      # every section: half an hour
    python -m tests.soak fuzz kill --seed 7   # some of them, with another seed

Each section counts what it tried and what was lost: a file harmed, an exit code or a message that
is not what docs/reliability.md promises, a temporary file left behind, a traceback.
"""
