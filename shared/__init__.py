"""What server and clients share: values, codec, models, data, training. No sockets, no SQL."""

__version__ = "0.1.0"
