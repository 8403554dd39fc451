"""Re-reading what a stopped store has on disk, and counting it again; see `directory`."""

from tallymark_store.verify.directory import StoreDirectory, verify_store
from tallymark_store.verify.findings import Finding, Report
from tallymark_store.verify.scratch import Scratch

__all__ = ["Finding", "Report", "Scratch", "StoreDirectory", "verify_store"]
