"""The callbacks' public names: `posthoc_cli.adapters.lightning` and `.transformers`."""

from posthoc_cli.training import adapters

__path__ = adapters.__path__
