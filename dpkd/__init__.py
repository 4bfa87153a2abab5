"""Distill language models with any objective."""

from importlib import import_module

__version__ = "0.1.0"

# Importing a subpackage sets an attribute with its name. Import it first, so that `dpkd.train` is the function below.
import_module("dpkd.train")

from dpkd.python import evaluate, resume, train  # noqa: E402

__all__ = ["__version__", "evaluate", "resume", "train"]
