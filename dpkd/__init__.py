"""dpkd: distil language models with any objective."""

__version__ = "0.1.0"
