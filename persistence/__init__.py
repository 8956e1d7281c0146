"""Persistence for AI agents: one interface, the same behaviour on every store."""
