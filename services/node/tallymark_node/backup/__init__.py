"""Backups of a cluster and what is made of them again: `taking`, `restoring`, in a `target`, as `layout` says."""
