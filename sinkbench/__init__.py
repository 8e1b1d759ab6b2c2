"""sinkbench: find out when and why attention sinks emerge in language models."""

__version__ = "0.1.0"
