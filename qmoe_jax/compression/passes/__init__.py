"""The passes of a walk over a model: attention up to a router, then the experts behind it."""
