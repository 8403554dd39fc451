"""Replication of one partition: the pure state machine. See docs/replication.md."""
