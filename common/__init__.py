"""What both sides share: types, errors, configuration, formats; sockets only in `transport`."""
