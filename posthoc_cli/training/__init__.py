"""EMAs tracked while a network trains: `PostHocEMA`, `KarrasEMA`, callbacks for other libraries.

Importing this imports no torch; `posthoc_cli` has the classes.
"""
