"""The shared 4-bit base: loading it, the adapters on it, and the roles they play."""
