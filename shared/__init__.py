"""What server and clients share: values, codec, models, data, training. No sockets, no SQL."""
