"""TLS, serialization and error translation: the only place in `common` that knows gRPC."""
