"""distilcb: distil a language encoder into one of half the layers, on as many GPUs as a cluster lends."""

__version__ = "0.1.0"
