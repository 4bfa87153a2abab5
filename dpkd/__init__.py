"""dpkd: distil language models with any objective."""

from dpkd.python import evaluate, train

__all__ = ["__version__", "evaluate", "train"]

__version__ = "0.1.0"
