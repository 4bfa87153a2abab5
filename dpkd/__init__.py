"""dpkd: distil language models with any objective."""

from dpkd.python import evaluate, resume, train

__all__ = ["__version__", "evaluate", "resume", "train"]

__version__ = "0.1.0"
