"""Re-reading what a stopped store has on disk, and counting it again; see `directory`."""

from tallymark_store.verify.directory import StoreDirectory, verify_store
from tallymark_store.verify.findings import Finding, Report

__all__ = ["Finding", "Report", "StoreDirectory", "verify_store"]
